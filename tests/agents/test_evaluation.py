from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from agents.evaluation import Evaluation, evaluate, linear_probe_accuracy, reward_table
from repfusion_env.envs import RepFusionVectorEnv


def by_brightness(observations: torch.Tensor) -> torch.Tensor:
    """A policy that tells images apart."""
    return (observations.sum(1).abs() * 7).long() % 5


@pytest.fixture
def env(tiny: dict[str, Any]) -> RepFusionVectorEnv:
    """After some training."""
    env = RepFusionVectorEnv(config=tiny, student={"ema": 0.9})
    env.reset(seed=3)
    for step in range(6):
        env.step(torch.full((4,), step % 5))
    return env


def test_means_are_those_of_a_loop_over_images():
    rng = np.random.default_rng(0)
    rewards, actions = rng.normal(size=(7, 4)), np.array([0, 3, 3, 1, 0, 2, 3])
    valid = np.array([True, True, False, True])
    found = Evaluation(rewards, actions, (0, 10, 20, 30), "student_lookahead", valid)
    assert found.learned == pytest.approx(sum(rewards[i][a] for i, a in enumerate(actions)) / 7)
    open_ones = [[row[k] for k in (0, 1, 3)] for row in rewards]
    assert found.random == pytest.approx(sum(sum(row) for row in open_ones) / 21)
    assert found.best_per_image == pytest.approx(sum(max(row) for row in open_ones) / 7)
    assert found.by_timestep.tolist() == pytest.approx(
        [sum(row[k] for row in rewards) / 7 for k in range(4)]
    )
    assert found.counts.tolist() == [2, 1, 1, 3]


def test_the_table_holds_each_images_reward_at_each_timestep(env: RepFusionVectorEnv):
    table = reward_table(env.trainer, env.trainer.parts.heldout, 6)
    assert table.shape == (6, 5) and table.dtype == np.float64
    for image in (0, 5):
        for column, timestep in enumerate((0, 200, 400, 600, 800)):
            one = torch.tensor([image])
            judged = env.trainer.judge(
                env.trainer.parts.heldout, one, torch.tensor([timestep]), torch.zeros_like(one)
            )
            assert table[image, column] == pytest.approx(float(judged.reward), abs=1e-5)
    assert len(np.unique(table)) == 30


def test_a_policy_is_worth_what_it_earns_step_by_step_on_the_heldout_view(env: RepFusionVectorEnv):
    found = evaluate(env, by_brightness)
    assert found.rewards.shape == (40, 5)
    view = env.heldout_view()
    observations, _ = view.reset(seed=0)
    rewards, actions = [], []
    for _ in range(10):
        actions.append(by_brightness(observations))
        observations, reward, *_ = view.step(actions[-1])
        rewards.append(reward)
    np.testing.assert_array_equal(torch.cat(actions), found.actions)
    assert len(set(found.actions.tolist())) > 2
    assert float(torch.cat(rewards).double().mean()) == pytest.approx(found.learned, abs=1e-5)
    limited = evaluate(env, by_brightness, 16)
    np.testing.assert_allclose(limited.rewards, found.rewards[:16], atol=1e-5)
    assert len(evaluate(env, by_brightness, 1000).actions) == 40


@pytest.mark.parametrize(
    ("kind", "judged"),
    [("teacher_probe", "teacher_probe"), ("student_gain", "student_lookahead")],
)
def test_a_reward_that_needs_an_update_is_judged_by_the_look_ahead(
    tiny: dict[str, Any], kind: str, judged: str
):
    env = RepFusionVectorEnv(config=tiny, reward=kind)
    assert evaluate(env, by_brightness, 8).kind == judged


def test_closed_timesteps_do_not_count_for_random(tiny: dict[str, Any]):
    env = RepFusionVectorEnv(config=tiny, **{"timesteps.min_snr": 0.1})
    found = evaluate(env, by_brightness, 8)
    assert found.valid.tolist() == env.action_masks()[0].tolist() != [True] * 5
    assert found.random == pytest.approx(found.by_timestep[found.valid].mean())


def test_evaluation_changes_nothing(
    env: RepFusionVectorEnv, learned: Callable[[Any], list[torch.Tensor]]
):
    before, state = learned(env.trainer), torch.get_rng_state()
    saved = deepcopy(env.state_dict())
    evaluate(env, by_brightness)
    linear_probe_accuracy(env.trainer, 50)
    assert all(map(torch.equal, before, learned(env.trainer)))
    assert torch.equal(torch.get_rng_state(), state)
    assert env.trainer.student.training is True
    one = env.step(torch.zeros(4, dtype=torch.int64))
    metrics = env.drain_metrics()
    env.load_state_dict(saved)
    two = env.step(torch.zeros(4, dtype=torch.int64))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert metrics == env.drain_metrics()


def test_the_linear_probe_is_a_logistic_regression_on_the_averaged_students_features(
    env: RepFusionVectorEnv,
):
    parts = env.trainer.parts
    student = env.trainer.average
    assert student is not None

    def features(bank: Any, count: int) -> np.ndarray:
        with torch.no_grad():
            maps = student.backbone(bank.pixels(torch.arange(count)))
        return maps[student.backbone.stages[-1]].mean((2, 3)).numpy()

    train, heldout = features(parts.train, 60), features(parts.heldout, 40)
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation < 1e-12] = 1.0  # a dead feature
    probe = LogisticRegression(max_iter=1000)
    probe.fit((train - mean) / deviation, parts.train.labels[:60])
    right = probe.predict((heldout - mean) / deviation) == parts.heldout.labels[:40].numpy()
    assert linear_probe_accuracy(env.trainer, 60) == pytest.approx(right.mean())
    assert 0.2 < right.mean() < 1.0
