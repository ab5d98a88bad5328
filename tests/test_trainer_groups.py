"""Lanes of one image share what depends on the image alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from repfusion_env import load_config
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.groups import spread
from repfusion_env.trainer import DistillationTrainer
from repfusion_env.vector_env import RepFusionVectorEnv

# SGD, since AdamW's first steps blow a gradient's rounding up to the step size.
GROUPED = {
    "env": {"num_envs": 8, "group_size": 2},
    "optimizer": {"name": "sgd", "batch_size": 8, "learning_rate": 0.05},
    # Measured on what training saw; running statistics are looked at on their own.
    "reward.student": "training",
}
DENSE = {
    "task": "segmentation",
    "data.name": "digit_scenes",
    "distillation.dense": True,
    "distillation.projection": "stages",
    "teacher.layers": ["mid_block", "up_blocks.0"],
    "teacher.image_size": 16,
    "segmentation": {"head": "linear", "width": 8},
    "augmentation": {"rotation": 20.0},
}
CASES: dict[str, dict[str, Any]] = {
    "pooled": {},
    "relational, learned fusion": {
        "distillation.losses": {"hint": 1.0, "rkd_distance": 0.5},
        "fusion": {"weights": "learned", "timesteps": [100]},
    },
    "dense": DENSE,
}


def _trainer(tiny: dict[str, Any], **overrides: Any) -> DistillationTrainer:
    config = load_config(load_config(load_config(tiny), GROUPED), overrides)
    return DistillationTrainer(config, build_frozen_parts(config))


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids of four images, each in two lanes, timesteps of the grid and visits."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randperm(40, generator=generator)[:4].repeat_interleave(2)
    timesteps = torch.randint(0, 5, (8,), generator=generator) * 200
    return ids, timesteps, torch.arange(step * 8, (step + 1) * 8)


def _parameters(trainer: DistillationTrainer) -> list[torch.Tensor]:
    return [*trainer.student.parameters(), *trainer.fusion.parameters()]


@pytest.mark.parametrize("case", CASES)
def test_a_group_learns_and_earns_what_its_lanes_would_have_alone(tiny, case):
    shared, alone = _trainer(tiny, **CASES[case]), _trainer(tiny, **CASES[case])
    start = [value.clone() for value in _parameters(alone)]
    seen: list[int] = []
    shared.student.backbone.register_forward_hook(lambda _m, given, _o: seen.append(len(given[0])))
    for step in range(2):
        mine, theirs = shared.step(*_batch(step), 2), alone.step(*_batch(step))
        for name in ("reward", "distillation_loss", "task_loss_before", "correct"):
            one, other = getattr(mine, name).float(), getattr(theirs, name).float()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)
    assert seen == [4, 4]
    for one, other in zip(_parameters(shared), _parameters(alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    moved = zip(_parameters(shared), start, strict=True)
    assert sum(not torch.allclose(now, then, atol=1e-4) for now, then in moved) > len(start) // 2


def test_running_variances_take_the_images_for_the_sample(tiny):
    """Bessel's factor is n / (n - 1) with the values of different images, not of copies."""
    shared, alone = _trainer(tiny), _trainer(tiny)
    counts: dict[str, int] = {}
    names = {module: name for name, module in shared.student.named_modules()}

    def count(module: nn.Module, given: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        counts[names[module]] = given[0].numel() // given[0].shape[1]

    for module in names:
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count)
    shared.step(*_batch(0), 2)
    alone.step(*_batch(0))
    assert counts
    for name, count in counts.items():
        mine, theirs = shared.student.get_submodule(name), alone.student.get_submodule(name)
        torch.testing.assert_close(mine.running_mean, theirs.running_mean)
        variances = [
            (norm.running_var - 0.9) / 0.1 * (n - 1) / n
            for norm, n in ((mine, count), (theirs, 2 * count))
        ]
        torch.testing.assert_close(*variances, rtol=1e-3, atol=1e-4)


def test_an_image_of_a_group_is_encoded_once(tiny, monkeypatch):
    env = RepFusionVectorEnv(config=load_config(load_config(tiny), GROUPED))
    env.reset(seed=0)
    teacher, seen = env.trainer.parts.teacher, []
    honest = teacher.encode
    monkeypatch.setattr(teacher, "encode", lambda x: seen.append(len(x)) or honest(x))
    env.step([0, 1, 2, 3, 4, 0, 1, 2])
    assert seen == [4]


@pytest.mark.parametrize(("batch_size", "group"), [(12, 2), (8, 8)])
def test_cut_groups_and_a_single_image_are_not_shared(tiny, batch_size, group):
    """A batch that is filled up may cut a group; one image has no batch statistics."""
    settings = {"optimizer.batch_size": batch_size, "env.group_size": group}
    shared, alone = _trainer(tiny, **settings), _trainer(tiny, **settings)
    for step in range(2):
        ids, timesteps, visits = _batch(step)
        ids = ids[:1].expand(8) if group == 8 else ids
        mine = shared.step(ids, timesteps, visits, group)
        assert torch.equal(mine.reward, alone.step(ids, timesteps, visits).reward)


def test_spread_rows_stand_next_to_each_other_and_gather_their_gradients():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    found = spread(values, 3)
    assert torch.equal(found, values.repeat_interleave(3, 0))
    (found * torch.arange(12.0).view(6, 2)).sum().backward()
    assert torch.equal(values.grad, torch.tensor([[6.0, 9.0], [24.0, 27.0]]))
