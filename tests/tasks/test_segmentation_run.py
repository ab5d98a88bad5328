"""Segmentation in the environment: rewards, what auxiliary heads change, held-out mIoU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from repfusion_env.config_loading import check
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.trainer import DistillationTrainer

IDS = torch.arange(8)
VISITS = torch.zeros(8, dtype=torch.int64)


@pytest.fixture
def scenes(tiny: dict[str, Any]) -> dict[str, Any]:
    """Overrides under which digits are found in scenes of 16 pixels."""
    return {
        **tiny,
        "task": "segmentation",
        "data": {"name": "digit_scenes", "image_size": 16, "train_limit": 32, "heldout_limit": 16},
        "distillation": {"dense": True},
    }


def _step(overrides: dict[str, Any], **segmentation: Any) -> tuple[DistillationTrainer, Any]:
    config = check({**overrides, "segmentation": segmentation})
    trainer = DistillationTrainer(config, build_frozen_parts(config))
    return trainer, trainer.step(IDS, torch.full((8,), 200), VISITS)


@pytest.mark.parametrize("head", ["fcn", "lraspp"])
def test_a_lanes_reward_does_not_depend_on_the_lanes_beside_it(scenes, head):
    trainer, _ = _step(scenes, head=head, width=16)
    timesteps = torch.full((8,), 200)
    bank = trainer.parts.train
    together = trainer.judge(bank, IDS, timesteps, VISITS)
    alone = trainer.judge(bank, IDS[3:4], timesteps[3:4], VISITS[3:4])
    torch.testing.assert_close(together.reward[3:4], alone.reward, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        together.task_loss_before[3:4], alone.task_loss_before, rtol=1e-3, atol=1e-4
    )
    assert together.reward.std() > 0


def test_auxiliary_heads_count_where_it_learns_and_not_in_rewards(scenes):
    # Of one layer each: the first answer of all heads costs about log 11.
    trainer, learning = _step(scenes, head="linear", width=16, auxiliary=1.0)
    _, alone = _step(scenes, head="linear", width=16)
    assert learning.task_loss_before.mean() > 2 * alone.task_loss_before.mean()
    assert learning.reward.mean() > 2 * -alone.task_loss_before.mean()
    found = trainer.heldout_metrics()
    assert 0 <= found["miou"] <= 1 and "iou/background" in found
