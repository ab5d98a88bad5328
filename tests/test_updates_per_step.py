"""Several updates of a step, scaled fp16 updates, and rewards without a forward of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from repfusion_env import load_config
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.rewards import look_ahead
from repfusion_env.trainer import DistillationTrainer, NonFiniteError


def _trainer(tiny: dict[str, Any], **overrides: Any) -> DistillationTrainer:
    config = load_config(load_config(tiny), overrides)
    return DistillationTrainer(config, build_frozen_parts(config))


def _batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 96, (size,), generator=generator)
    timesteps = torch.randint(0, 5, (size,), generator=generator) * 200
    return ids, timesteps, torch.arange(step * size, (step + 1) * size)


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_three_updates_are_three_steps_on_one_batch_with_one_look_of_the_teacher(tiny, learned):
    # Fixed noise, so that a second step on a batch has the same targets.
    settings = {"teacher.noise": "fixed", "student.ema": 0.5, "optimizer.name": "sgd"}
    once = _trainer(tiny, **settings)
    thrice = _trainer(tiny, **settings, **{"optimizer.updates": 3})
    looks: list[int] = []
    honest = thrice.parts.teacher.features
    thrice.parts.teacher.features = lambda *given: looks.append(1) or honest(*given)
    first = once.step(*_batch(0))
    for _ in range(2):
        last = once.step(*_batch(0))
    found = thrice.step(*_batch(0))
    assert looks == [1]
    assert _same(learned(thrice), learned(once))
    assert torch.equal(found.distillation_loss, first.distillation_loss)
    assert torch.equal(found.task_loss_before, first.task_loss_before)
    assert torch.equal(found.reward, last.reward)
    assert torch.equal(found.task_loss_after, last.task_loss_after)
    assert thrice.steps == 1


def test_learned_fusion_moves_with_the_first_update_alone(tiny):
    fusion = {"weights": "learned", "timesteps": [100]}
    moved = []
    for updates in (1, 2):
        trainer = _trainer(tiny, fusion=fusion, **{"optimizer.updates": updates})
        trainer.step(*_batch(0))
        moved.append(trainer.fusion.logits.detach().clone())
    assert moved[0].abs().max() > 0
    assert torch.equal(*moved)


def test_a_step_of_several_updates_counts_once_where_it_is_not_finite(tiny, learned):
    trainer = _trainer(tiny, **{"optimizer.updates": 3, "optimizer.nonfinite_patience": 3})
    trainer.step(*_batch(5))
    honest = trainer.task.losses
    before = learned(trainer)
    trainer.task.losses = lambda *given: honest(*given) * float("nan")
    for step in range(2):
        trainer.step(*_batch(step))
    assert trainer.drain_metrics()["student/nonfinite_steps"] == 2
    assert _same(learned(trainer), before)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        trainer.step(*_batch(2))


def test_a_step_is_bad_where_only_its_last_update_is(tiny):
    trainer = _trainer(tiny, **{"optimizer.updates": 2})
    honest, calls = trainer.task.losses, []

    def losses(*given: Any) -> torch.Tensor:
        calls.append(1)
        return honest(*given) * (float("nan") if len(calls) == 2 else 1.0)

    trainer.task.losses = losses
    trainer.step(*_batch(0))
    assert trainer.drain_metrics()["student/nonfinite_steps"] == 1
    assert int(trainer.updates.bad_in_a_row) == 1


def test_the_look_ahead_may_start_from_the_updates_own_forward(tiny):
    trainer = _trainer(tiny, **{"reward.student": "training"})
    calls: list[bool] = []
    trainer.student.backbone.register_forward_hook(lambda m, *_: calls.append(m.training))
    twin = copy.deepcopy(trainer.student)
    ids, timesteps, visits = _batch(0)
    measured = []
    rule = trainer.rule
    trainer.rule = type(rule)(
        lambda m: measured.append(m) or rule.compute(m), after=True, attributable=True
    )
    result = trainer.step(ids, timesteps, visits)
    assert calls == [True]
    assert result.task_loss_after is None
    # The features of the training forward, moved and judged by projection and head as updated.
    expected = twin.train().features(trainer.parts.train.pixels(ids))[-1].mean((2, 3))
    torch.testing.assert_close(measured[0].student[0], expected.detach())
    residual = trainer.student.projections[0](expected) - measured[0].teacher[0]
    weight = trainer.student.projections[0].weight
    damped = weight @ weight.T + 0.1 * torch.eye(len(weight))
    moved = expected - residual @ torch.linalg.solve(damped, weight)
    torch.testing.assert_close(look_ahead(measured[0])[0], moved, rtol=1e-3, atol=1e-4)
    losses = torch.nn.functional.cross_entropy(
        trainer.student.head(moved), trainer.parts.train.labels[ids], reduction="none"
    )
    torch.testing.assert_close(-result.reward, losses, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["student", "student_gain", "teacher_probe"])
def test_other_rewards_refuse_to_start_from_training(tiny, kind):
    with pytest.raises(ValueError, match=rf"reward.student: 'training' .*'{kind}'"):
        load_config(load_config(tiny), {"reward": {"kind": kind, "student": "training"}})


FP16 = {"student.precision": "fp16"}


def test_fp16_learns_as_fp32_does_to_its_rounding(tiny):
    trainers = [_trainer(tiny, **{"optimizer.name": "sgd"}, **p) for p in ({}, FP16)]
    starts = [[v.clone() for v in t.student.backbone.parameters()] for t in trainers]
    for step in range(3):
        first, second = (trainer.step(*_batch(step)) for trainer in trainers)
    torch.testing.assert_close(first.distillation_loss, second.distillation_loss, rtol=2e-2, atol=0)
    moves = [
        torch.cat([(v - s).detach().flatten() for v, s in zip(now, start, strict=True)])
        for now, start in zip(
            (t.student.backbone.parameters() for t in trainers), starts, strict=True
        )
    ]
    assert (moves[0] - moves[1]).norm() < 0.2 * moves[0].norm()
    assert moves[0].norm() > 0
    assert trainers[1].updates.scaler.get_scale() == 2.0**16
    assert not trainers[0].updates.scaler.is_enabled()


def test_a_scale_too_large_skips_the_step_and_halves_without_counting(tiny, learned):
    trainer = _trainer(tiny, **FP16, **{"optimizer.nonfinite_patience": 2})
    trainer.step(*_batch(0))
    trainer.updates.scaler.update(2.0**30)
    before = learned(trainer)
    for step in (1, 2, 3):
        result = trainer.step(*_batch(step))
        assert result.reward.isfinite().all()
    assert _same(learned(trainer), before)
    assert trainer.updates.scaler.get_scale() == 2.0**27
    assert trainer.drain_metrics()["student/nonfinite_steps"] == 0


def test_a_loss_that_is_not_finite_counts_in_fp16_too(tiny):
    trainer = _trainer(tiny, **FP16)
    honest = trainer.task.losses
    trainer.task.losses = lambda *given: honest(*given) * float("nan")
    trainer.step(*_batch(0))
    assert trainer.drain_metrics()["student/nonfinite_steps"] == 1


@pytest.mark.parametrize("settings", [FP16, {"optimizer.updates": 2, "reward.student": "training"}])
def test_a_saved_trainer_goes_on_to_the_last_bit(tiny, learned, settings):
    trainer, resumed = _trainer(tiny, **settings), _trainer(tiny, **settings)
    trainer.step(*_batch(0))
    if trainer.updates.scaler.is_enabled():
        trainer.updates.scaler.update(2.0**12)  # not what a new one begins with
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for step in (1, 2):
        mine, theirs = trainer.step(*_batch(step)), resumed.step(*_batch(step))
        assert torch.equal(mine.reward, theirs.reward)
    assert _same(learned(trainer), learned(resumed))
    states = [each.updates.scaler.state_dict() for each in (trainer, resumed)]
    assert states[0] == states[1]


@pytest.mark.parametrize("settings", [FP16, {"optimizer.updates": 2, "reward.student": "training"}])
def test_no_step_waits_for_the_device(tiny, monkeypatch, no_waiting, settings):
    trainer = _trainer(tiny, **settings)
    monkeypatch.setattr(trainer.updates, "watch", lambda steps: None)
    trainer.step(*_batch(0))
    batch = _batch(1)
    with no_waiting():
        trainer.step(*batch)


def test_moments_of_another_memory_layout_belong_to_the_same_weights(tiny, learned):
    plain, other = _trainer(tiny), _trainer(tiny, **{"student.channels_last": True})
    for step in range(3):
        plain.step(*_batch(step))
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    for trainer in (plain, other):
        trainer.step(*_batch(3))
    for mine, theirs in zip(learned(other), learned(plain), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
