"""Observations that are kept instead of made twice, and flags that wait for no transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from repfusion_env.lane_outputs import flags
from repfusion_env.vector_env import RepFusionVectorEnv


def _counted(env: RepFusionVectorEnv, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lanes of every look that is made from now on."""
    seen: list[int] = []
    honest = env.observer.source
    monkeypatch.setattr(
        env.observer,
        "source",
        lambda trainer, bank, ids: seen.append(len(ids)) or honest(trainer, bank, ids),
    )
    return seen


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_a_step_of_one_step_episodes_looks_once(tiny, monkeypatch, source):
    env = RepFusionVectorEnv(4, tiny, observation=source)
    seen = _counted(env, monkeypatch)
    shown, _ = env.reset(seed=0)
    for _ in range(3):
        before = shown.clone()
        shown, *_, info = env.step([0, 1, 2, 3])
        assert torch.equal(info["final_obs"], before)
    assert seen == [4] * 4


def test_a_look_at_a_student_that_has_learned_since_is_made_again(tiny, monkeypatch):
    env = RepFusionVectorEnv(4, tiny, observation="student")
    view = env.heldout_view(2)
    env.reset(seed=0)
    old, _ = view.reset()
    env.step([0, 1, 2, 3])
    expected = view.observe()
    found = view.step([0, 1])[-1]["final_obs"]
    assert torch.equal(found, expected)
    assert not torch.equal(found, old)
    # Nor is another student of the same age taken for it.
    shown, _ = view.reset()
    env.reset(seed=7)
    env.step([0, 1, 2, 3])
    expected = view.observe()
    assert env.trainer.steps == 1
    assert torch.equal(view.step([0, 1])[-1]["final_obs"], expected)
    assert not torch.equal(expected, shown)


def test_a_partial_reset_and_a_resume_show_what_is_there(tiny):
    env, resumed = (RepFusionVectorEnv(4, tiny, observation="student") for _ in range(2))
    env.reset(seed=0)
    env.step([0, 1, 2, 3])
    mask = np.array([True, False, False, True])
    shown, _ = env.reset(options={"reset_mask": mask})
    again = resumed.load_state_dict(env.state_dict())
    assert torch.equal(again, shown)
    for one in (env, resumed):
        assert torch.equal(one.step([0, 1, 2, 3])[-1]["final_obs"], shown)


@pytest.mark.parametrize("mask", [[True] * 3, [False] * 3, [True, False, True]])
def test_flags_are_the_mask(mask: list[bool]) -> None:
    found: Any = flags(np.array(mask), torch.device("cpu"))
    assert found.dtype == torch.bool
    assert found.tolist() == mask
