from __future__ import annotations

import numpy as np

from benchmarks.lookahead import MOVES, judged, probe_accuracy, rank_correlation
from repfusion_env.envs import RepFusionVectorEnv


def test_every_move_is_judged_on_the_whole_grid_and_leaves_the_configuration(tiny):
    env = RepFusionVectorEnv(config=tiny)
    env.reset(seed=0)
    env.step([0] * env.num_envs)
    before = env.trainer.config
    tables = [judged(env, settings) for settings in MOVES.values()]
    assert env.trainer.config is before
    assert all(table.shape == (len(env.grid),) and (table < 0).all() for table in tables)
    assert not np.allclose(tables[0], tables[1])


def test_the_reference_probe_gives_an_accuracy_for_each_timestep(tiny):
    accuracy = probe_accuracy(RepFusionVectorEnv(config=tiny))
    assert accuracy.shape == (5,)
    assert accuracy[0] > accuracy[-1]  # t = 0 shows the digit, t = 800 is noise
    assert 0.0 <= accuracy.min() <= accuracy.max() <= 1.0


def test_rank_correlation_sees_order_alone():
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 11.0])) == 1.0
