"""The trainer against a plain re-implementation, and what a step must leave alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch.nn import functional as F

from repfusion_env import load_config
from repfusion_env.devices import resolve_device
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.fusion import Targets
from repfusion_env.noise import keyed_noise
from repfusion_env.student import learning_rate_factor
from repfusion_env.trainer import DistillationTrainer, NonFiniteError

LAYER = "mid_block.resnets.1.conv2"


def _trainer(tiny: dict[str, Any], **overrides: Any) -> DistillationTrainer:
    config = load_config(load_config(tiny), overrides)
    return DistillationTrainer(config, build_frozen_parts(config))


def _batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, timesteps of the grid and visits of one step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 96, (size,), generator=generator)
    timesteps = torch.randint(0, 5, (size,), generator=generator) * 200
    return ids, timesteps, torch.arange(step * size, (step + 1) * size)


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def _poison(trainer: DistillationTrainer, monkeypatch: pytest.MonkeyPatch, rows: slice) -> None:
    """Teacher features of these lanes become NaN."""
    honest = trainer.parts.features.at

    def features(*arguments: Any) -> list[torch.Tensor]:
        found = honest(*arguments)
        for z in found:
            z[rows] = float("nan")
        return found

    monkeypatch.setattr(trainer.parts.features, "at", features)


@pytest.mark.parametrize("scope", ["grid", "timestep"])
def test_three_steps_are_plain_torch_with_diffusers_and_adamw(tiny, tiny_teacher, scope):
    settings = {"gradient_clip": 0.5, "weight_decay": 0.01}
    trainer = _trainer(tiny, optimizer=settings, **{"teacher.standardize": scope})
    unet = UNet2DModel.from_pretrained(tiny_teacher).eval()
    scheduler = DDPMScheduler.from_pretrained(tiny_teacher)
    taps: list[torch.Tensor] = []
    unet.get_submodule(LAYER).register_forward_hook(lambda *found: taps.append(found[2]))
    ((mean, deviation),) = trainer.parts.features._statistics
    student = copy.deepcopy(trainer.student)
    head = [*student.head.parameters(), *student.probe.parameters()]
    body = [*student.backbone.parameters(), *student.projections.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": body}, {"params": head}], lr=2e-3, weight_decay=0.01, foreach=False
    )
    bank = trainer.parts.train
    for step in range(3):
        ids, timesteps, visits = _batch(step)
        result = trainer.step(ids, timesteps, visits)

        images = bank.images[ids].float() / 127.5 - 1
        noise = keyed_noise(bank.shape, trainer.noise_seed, ids, timesteps, visits)
        taps.clear()
        with torch.no_grad():
            unet(scheduler.add_noise(images, noise, timesteps), timesteps)
        rows = timesteps if scope == "timestep" else timesteps * 0
        teacher = (taps[0].mean((2, 3)) - mean[rows]) / deviation[rows]
        student.train()
        feature = student.backbone(images)["stage3"].mean((2, 3))
        projected = feature @ student.projections[0].weight.T + student.projections[0].bias
        distilled = (projected - teacher).square().mean(1)
        logits = feature.detach() @ student.head.weight.T + student.head.bias
        task = F.cross_entropy(logits, bank.labels[ids], reduction="none")
        optimizer.zero_grad()
        (distilled.mean() + task.mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        assert norm > 0.5  # or clipping would go untested
        optimizer.step()

        torch.testing.assert_close(result.distillation_loss, distilled.detach())
        torch.testing.assert_close(result.task_loss_before, task.detach())
        assert torch.equal(result.correct, logits.argmax(1) == bank.labels[ids])
    for mine, theirs in zip(trainer.student.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
    for mine, theirs in zip(trainer.student.buffers(), student.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("scope", ["grid", "timestep"])
def test_features_have_mean_0_and_deviation_1_over_bank_and_grid(tiny, scope, dense):
    # Clean input has no noise, and all images are measured: the statistics are exact.
    grid = [200] if scope == "grid" else [0, 400, 900]
    trainer = _trainer(
        tiny,
        **{
            "teacher.input": "clean",
            "teacher.standardize": scope,
            "teacher.standardize_images": 96,
            "timesteps": grid,
            "distillation.dense": dense,
        },
    )
    ids = torch.arange(96)
    for timestep in grid:
        timesteps = torch.full_like(ids, timestep)
        (z,) = trainer.parts.features(trainer.parts.train, ids, timesteps, ids, 0)
        values = z.double().transpose(0, 1).flatten(1)  # (F, samples)
        torch.testing.assert_close(values.mean(1), torch.zeros(32).double(), atol=1e-4, rtol=0)
        deviation = values.std(1, correction=0)
        torch.testing.assert_close(deviation, torch.ones(32).double(), atol=1e-3, rtol=0)


def test_a_seeded_reset_repeats_everything_and_touches_no_random_state(tiny, learned):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    config = load_config(tiny, {"student.ema": 0.9})
    parts = build_frozen_parts(config)
    before = states()
    trainer = DistillationTrainer(config, parts)
    runs = []
    for seed in (1, 1, 2):
        trainer.reset(seed)
        rewards = [trainer.step(*_batch(step)).reward for step in range(3)]
        runs.append([*rewards, *learned(trainer)])
    assert states() == before
    assert _same(runs[0], runs[1])
    assert not _same(runs[0], runs[2])


def test_dropout_is_drawn_from_the_trainers_own_seed(tiny, learned):
    trainer = _trainer(tiny)
    runs = []
    for caller_seed in (0, 1):
        trainer.reset(3)
        trainer.student.backbone.stage1.append(torch.nn.Dropout2d(0.5))
        torch.manual_seed(caller_seed)
        state = torch.get_rng_state()
        trainer.step(*_batch(0))
        assert torch.equal(torch.get_rng_state(), state)
        trainer.step(*_batch(0))
        runs.append(learned(trainer))
    assert _same(*runs)


@pytest.mark.parametrize(
    "reward", ["student_lookahead", "student", "student_gain", "teacher_probe"]
)
def test_measuring_the_reward_leaves_the_student_as_training_made_it(tiny, learned, reward):
    measured = _trainer(tiny, reward=reward)
    plain = _trainer(tiny, reward="student_lookahead" if reward != "teacher_probe" else reward)
    plain._measure_after = lambda *_: (None, None)  # type: ignore[method-assign]
    plain.rule = type(plain.rule)(lambda m: -m.loss_before, probe=plain.rule.probe)
    for step in range(2):
        measured.step(*_batch(step))
        plain.step(*_batch(step))
    assert _same(learned(measured), learned(plain))
    state = learned(measured)
    ids, timesteps, visits = _batch(0)
    result = measured.judge(measured.parts.heldout, ids % 40, timesteps, visits)
    assert _same(learned(measured), state)
    assert result.reward.isfinite().all()


def test_student_gain_is_the_inference_loss_before_minus_after(tiny):
    trainer = _trainer(tiny, reward="student_gain")
    trainer.step(*_batch(0))
    ids = _batch(1)[0]
    images, labels = trainer.parts.train.pixels(ids), trainer.parts.train.labels[ids]

    def loss():
        student = copy.deepcopy(trainer.student).eval()
        with torch.no_grad():
            feature = student.backbone(images)["stage3"].mean((2, 3))
            return F.cross_entropy(student.head(feature), labels, reduction="none")

    before = loss()
    result = trainer.step(*_batch(1))
    after = loss()
    torch.testing.assert_close(result.reward, before - after)
    torch.testing.assert_close(result.task_loss_after, after)


def test_judged_rewards_belong_to_their_own_lane(tiny):
    trainer = _trainer(tiny)
    trainer.step(*_batch(0))
    ids, timesteps, visits = _batch(1)
    rewards = trainer.judge(trainer.parts.train, ids, timesteps, visits).reward
    changed = timesteps.clone()
    changed[3] = (changed[3] + 400) % 1000
    others = trainer.judge(trainer.parts.train, ids, changed, visits).reward
    keep = torch.arange(8) != 3
    torch.testing.assert_close(rewards[keep], others[keep])
    assert (rewards[3] - others[3]).abs() > 1e-4


def test_the_averaged_student_is_the_closed_form_of_its_decay(tiny):
    trainer = _trainer(tiny, **{"student.ema": 0.75})
    weights = [trainer.student.head.weight.detach().double().clone()]
    for step in range(4):
        trainer.step(*_batch(step))
        weights.append(trainer.student.head.weight.detach().double().clone())
    expected = 0.75**4 * weights[0] + sum(0.25 * 0.75 ** (4 - k) * weights[k] for k in range(1, 5))
    torch.testing.assert_close(trainer.average.head.weight.double(), expected, atol=1e-6, rtol=0)
    assert trainer.evaluation_student is trainer.average
    assert _same(list(trainer.average.buffers()), list(trainer.student.buffers()))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_without_a_finite_loss_is_skipped_counted_and_names_causes(
    tiny, learned, monkeypatch, optimizer
):
    trainer = _trainer(
        tiny, **{"student.ema": 0.9, "optimizer": optimizer, "optimizer.nonfinite_patience": 3}
    )
    trainer.step(*_batch(0))
    before = learned(trainer)
    with monkeypatch.context() as poison:
        _poison(trainer, poison, slice(2, 3))
        for step in (1, 2):
            result = trainer.step(*_batch(step))
            assert result.reward.isfinite().all()
        assert _same(learned(trainer), before)
        assert trainer.drain_metrics()["student/nonfinite_steps"] == 2
        with pytest.raises(NonFiniteError, match=r"3 steps in a row .*learning_rate.*NaN"):
            trainer.step(*_batch(3))
    trainer.step(*_batch(4))
    after = learned(trainer)
    assert all(value.isfinite().all() for value in after)
    assert not _same(after, before)
    assert int(trainer.updates.bad_in_a_row) == 0


def test_one_poisoned_decision_does_not_spoil_the_steps_it_would_fill_up(
    tiny, learned, monkeypatch
):
    trainer = _trainer(tiny)
    trainer.step(*_batch(0, size=2))
    with monkeypatch.context() as poison:
        _poison(trainer, poison, slice(1, 2))
        trainer.step(*_batch(1, size=2))
    before = learned(trainer)
    trainer.step(*_batch(2, size=2))
    assert trainer.drain_metrics()["student/nonfinite_steps"] == 1
    assert not _same(learned(trainer), before)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_task_reaches_the_backbone_only_with_a_task_weight(tiny, weight):
    trainer = _trainer(tiny, **{"distillation.task_weight": weight})
    other = _trainer(tiny, **{"distillation.task_weight": weight})
    labels = other.parts.train.labels
    object.__setattr__(other.parts.train, "labels", (labels + 1) % 10)
    for step in range(2):
        trainer.step(*_batch(step))
        other.step(*_batch(step))
    same = torch.equal(
        trainer.student.backbone.stage1[0].weight, other.student.backbone.stage1[0].weight
    )
    assert same == (weight == 0.0)
    assert not torch.equal(trainer.student.head.weight, other.student.head.weight)


def test_fewer_lanes_are_filled_up_with_the_most_recent_decisions(tiny):
    trainer = _trainer(tiny)
    batches: list[list[int]] = []
    for step in range(4):
        ids, timesteps, visits = _batch(step, size=3)
        new = trainer.parts.features(
            trainer.parts.train, ids, timesteps, visits, trainer.noise_seed
        )
        batches.insert(0, ids.tolist())
        found, targets, _ = trainer.recent.fill_up(ids, Targets(new))
        assert found.tolist() == [image for batch in batches for image in batch][:8]
        assert torch.equal(targets.features[0][:3], new[0])


@pytest.mark.parametrize(
    "overrides",
    [
        {"teacher.layers": [LAYER, "down_blocks.0.resnets.0.conv2"]},
        {"distillation.dense": True, "distillation.losses": {"hint": 1.0, "attention": 1.0}},
        {"distillation.dense": True, "teacher.layers": [LAYER, "down_blocks.0.resnets.0.conv2"]},
        {"distillation": {"cosine": 1.0, "rkd_distance": 1.0, "rkd_angle": 1.0}},
        {"student.precision": "bf16", "teacher.precision": "bf16", "optimizer": "sgd"},
        {"student.channels_last": True, "teacher.channels_last": True},
        {"reward": {"kind": "teacher_probe", "probe_hidden": 8}, "teacher.input": "clean"},
        {
            "teacher.layers": [LAYER, "down_blocks.0.resnets.0.conv2"],
            "distillation": {
                "projection": "pyramid",
                "dense": True,
                "losses": {"hint": 1.0, "attention": 10.0},
            },
        },
        {"distillation.projection": "pyramid", "student.precision": "bf16"},
        {"distillation": {"vid": 1.0, "infonce": 1.0}, "distillation.projection": "pyramid"},
        {"fusion.timesteps": [50], "distillation": "factor_transfer"},
    ],
    ids=lambda overrides: "-".join(map(str, overrides)),
)
def test_distillation_lowers_its_loss_in_every_mode(tiny, overrides):
    trainer = _trainer(tiny, **{"optimizer.learning_rate": 5e-3, **overrides})
    ids, timesteps, _ = _batch(0, size=16)
    losses = [
        trainer.step(ids, timesteps * 0 + 200, torch.arange(16)).distillation_loss.mean()
        for _ in range(25)
    ]
    assert losses[-1] < 0.95 * losses[0]
    result = trainer.judge(trainer.parts.heldout, ids % 40, timesteps, torch.zeros_like(ids))
    assert result.reward.isfinite().all()
    assert trainer.drain_metrics()["student/nonfinite_steps"] == 0


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"reward": "student_gain", "student.ema": 0.9, "distillation": {"cosine": 1.0}},
        {"reward": "teacher_probe", "distillation.dense": True, "optimizer": "sgd"},
        {"distillation": {"rkd_distance": 1.0}, "student.precision": "bf16"},
        {"distillation.projection": "pyramid", "distillation": {"crd": 1.0, "vid": 1.0}},
        {"fusion": {"weights": "learned", "timesteps": [90]}, "reward.lookahead": "gradient"},
    ],
)
def test_no_step_waits_for_the_device(tiny, monkeypatch, no_waiting, overrides):
    """Whatever would make the host wait on CUDA raises here."""
    trainer = _trainer(tiny, **overrides)
    trainer.step(*_batch(0, size=4))
    ids, timesteps, visits = _batch(1, size=4)
    heldout = ids % 40
    monkeypatch.setattr(trainer.updates, "watch", lambda _: None)
    with no_waiting():
        trainer.step(ids, timesteps, visits)
        trainer.judge(trainer.parts.heldout, heldout, timesteps, visits)
    assert trainer.steps == 2


def test_a_saved_trainer_goes_on_to_the_last_bit(tiny, learned):
    overrides = {"student.ema": 0.9, "optimizer.schedule": "cosine"}
    trainer, resumed = _trainer(tiny, **overrides), _trainer(tiny, **overrides)
    trainer.reset(7)
    for step in range(3):
        trainer.step(*_batch(step, size=3))
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for step in range(3, 6):
        first, second = trainer.step(*_batch(step, size=3)), resumed.step(*_batch(step, size=3))
        assert torch.equal(first.reward, second.reward)
    assert _same(learned(trainer), learned(resumed))
    assert trainer.drain_metrics() == resumed.drain_metrics()


def test_a_trainer_saved_by_an_earlier_version_goes_on(tiny):
    trainer, resumed = _trainer(tiny), _trainer(tiny)
    trainer.step(*_batch(0, size=3))
    state = copy.deepcopy(trainer.state_dict())
    del state["recent"]["beside"]  # augmented images: once there were none
    resumed.load_state_dict(state)
    first, second = trainer.step(*_batch(1, size=3)), resumed.step(*_batch(1, size=3))
    assert torch.equal(first.reward, second.reward)


def test_learning_rates_follow_their_schedule_over_the_runs_decisions(tiny):
    # 400 decisions of 4 lanes: 100 steps.
    trainer = _trainer(tiny, **{"optimizer.schedule": "multistep"})
    rates = {}
    for step in (0, 49, 50, 74, 75, 150):
        trainer.steps = step
        trainer.step(*_batch(step))
        rates[step] = trainer.optimizer.param_groups[0]["lr"]
    expected = {0: 2e-3, 49: 2e-3, 50: 2e-4, 74: 2e-4, 75: 2e-5, 150: 2e-5}
    assert rates == pytest.approx(expected)
    assert learning_rate_factor("cosine", 0.5) == pytest.approx(0.5)
    assert learning_rate_factor("cosine", 1.0) == pytest.approx(0.0)
    assert learning_rate_factor("constant", 0.9) == 1.0


def test_heads_may_learn_at_their_own_rate(tiny):
    trainer = _trainer(tiny, **{"optimizer.head_learning_rate": 0.5, "optimizer": "sgd"})
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [2e-3, 0.5]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=f"device: '{name}' given.*0 usable.*allowed here"):
        resolve_device(name)
