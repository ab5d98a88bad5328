"""The trainer on tasks that read maps: what it measures, written out; augmented images."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from repfusion_env import load_config
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.fusion import probe_input
from repfusion_env.step_batch import augmented
from repfusion_env.tasks import detection_losses
from repfusion_env.tasks.classification import ClassificationTask
from repfusion_env.trainer import DistillationTrainer

LAYERS = ["mid_block", "up_blocks.0"]  # 8x8 and 16x16 for scenes of 32x32, seen at 16x16
TASKS = ["segmentation", "landmarks", "detection"]


class MapTask(ClassificationTask):
    """Labels read off the last map."""

    reads = "last"  # type: ignore[assignment]


def _trainer(tiny: dict[str, Any], task: str, **overrides: Any) -> DistillationTrainer:
    dense = {
        "task": task,
        "data.name": "digit_scenes",
        "distillation.dense": True,
        "distillation.projection": "stages",
        "teacher.layers": LAYERS,
        "teacher.image_size": 16,
        "segmentation": {"head": "linear", "width": 8},
        "landmarks": {"head": "linear", "width": 8},
        "detection.width": 8,
    }
    config = load_config(load_config(load_config(tiny), dense), overrides)
    return DistillationTrainer(config, build_frozen_parts(config))


def _batch(step: int, size: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 40, (size,), generator=generator)
    timesteps = torch.randint(0, 5, (size,), generator=generator) * 200
    return ids, timesteps, torch.arange(step * size, (step + 1) * size)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_takes_the_same_steps_and_is_judged_by_its_own_loss(tiny, task):
    trainer = _trainer(tiny, task)
    before = copy.deepcopy(trainer.student.state_dict())
    for step in range(2):
        result = trainer.step(*_batch(step))
    for values in (result.reward, result.task_loss_before, result.correct.float()):
        assert values.shape == (4,) and values.isfinite().all()
    assert ((result.correct >= 0) & (result.correct <= 1)).all()
    moved = [k for k, v in trainer.student.state_dict().items() if not torch.equal(v, before[k])]
    for part in ("backbone.", "projections.", "head."):
        assert any(key.startswith(part) for key in moved), part
    judged = trainer.judge(trainer.parts.heldout, *_batch(5))
    ids = _batch(5)[0]
    outputs = trainer.outputs(trainer.parts.heldout.pixels(ids), trainer.evaluation_student)
    expected = trainer.task.losses(outputs, trainer.task.targets(trainer.parts.heldout, ids))
    torch.testing.assert_close(judged.task_loss_before, expected)
    metrics = trainer.heldout_metrics(8)
    assert trainer.task.headline in metrics
    assert f"student/{trainer.task.score}" in trainer.drain_metrics()


MOVED = {"rotation": 10.0, "scale": 0.1, "translation": 0.1, "jitter": 0.2}


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("segmentation", {"augmentation": {"flip": True, **MOVED}, "segmentation.auxiliary": 0.4}),
        ("segmentation", {"fusion": {"weights": "learned", "timesteps": [90]}}),
        ("segmentation", {"fusion.layers": [1.0, 2.0], "reward": "student_gain"}),
        ("segmentation", {"env.action": "timestep_and_layer"}),
        ("landmarks", {"augmentation": MOVED, "landmarks.head": "deconv"}),
        ("landmarks", {"landmarks.head": "hrnet", "reward": "teacher_probe"}),
        ("detection", {"augmentation": {"flip": True, **MOVED}}),
        ("detection", {"detection.head": "retinanet", "reward.lookahead": "gradient"}),
        ("detection", {"detection.head": "ssdlite"}),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)
def test_no_step_of_a_dense_task_waits_for_the_device(
    tiny, monkeypatch, no_waiting, task, overrides
):
    trainer = _trainer(tiny, task, **overrides)
    trainer.step(*_batch(0))
    monkeypatch.setattr(trainer.updates, "watch", lambda _: None)
    # On a CPU alone the columns without an object are left out.
    monkeypatch.setattr(detection_losses, "most_objects", lambda valid: valid.shape[1])
    batch = _batch(1)
    with no_waiting():
        trainer.step(*batch)
        trainer.judge(trainer.parts.heldout, *batch)
    assert trainer.steps == 2


def test_the_look_ahead_moves_every_position_and_the_head_judges_the_moved_maps(tiny):
    trainer = _trainer(tiny, "segmentation", **{"reward.damping": 0.2})
    trainer.step(*_batch(0))
    bank, (ids, timesteps, visits) = trainer.parts.heldout, _batch(1)
    found = trainer.judge(bank, ids, timesteps, visits).reward
    student = trainer.student.eval()
    teacher = trainer.parts.features(bank, ids, timesteps, visits, trainer.heldout_noise_seed)
    with torch.no_grad():
        maps = student.features(bank.pixels(ids))
    # Grids of 8 and 16 positions a side are those of the last and of the second stage.
    assert [m.shape[2] for m in maps] == [32, 16, 8]
    resting = student.head(maps[-1]).detach()
    for layer, stage in ((0, 2), (1, 1)):
        projection = student.projections[layer]
        J, b = (p.detach().double().numpy() for p in (projection.weight, projection.bias))
        move = J.T @ np.linalg.inv(J @ J.T + 0.2 * np.eye(len(J)))
        h, z = maps[stage].double().numpy(), teacher[layer].double().numpy()
        residual = np.einsum("fs,nshw->nfhw", J, h) + b[:, None, None] - z
        maps[stage] = torch.from_numpy(h - np.einsum("sf,nfhw->nshw", move, residual)).float()
    assert not torch.allclose(student.head(maps[-1]), resting, atol=1e-3)
    with torch.no_grad():
        logits = F.interpolate(student.head(maps[-1]), (32, 32), mode="bilinear")
    masks = bank.annotations["masks"].values[ids].long()
    expected = -F.cross_entropy(logits, masks, reduction="none").mean((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_leave_the_map_that_the_head_reads_alone_are_refused(tiny):
    # 16x16 and 32x32: nothing would be distilled into the last stage, and no reward differ.
    finer = {"teacher": {"layers": LAYERS, "image_size": None, "standardize_images": 8}}
    with pytest.raises(
        ValueError, match=r"last stage 'stage3' alone, .* matched at stage1, stage2;"
    ):
        _trainer(tiny, "segmentation", **finer)
    assert _trainer(tiny, "detection", **finer).student.all_stages
    pyramid = _trainer(tiny, "segmentation", **finer, **{"distillation.projection": "pyramid"})
    assert pyramid.student.all_stages


def test_with_the_linear_projection_the_map_that_the_head_reads_is_the_one_that_moves(tiny):
    trainer = _trainer(tiny, "segmentation", **{"distillation.projection": "linear"})
    trainer.step(*_batch(0))
    bank, (ids, timesteps, visits) = trainer.parts.heldout, _batch(1)
    rewards = trainer.judge(bank, ids, timesteps, visits).reward
    other = trainer.judge(bank, ids, (timesteps + 400) % 1000, visits)
    assert torch.equal(other.task_loss_before, trainer.judge(bank, *_batch(1)).task_loss_before)
    assert (rewards != other.reward).all()


def test_learned_fusion_reads_maps_and_gets_a_gradient(tiny):
    trainer = _trainer(tiny, "segmentation", fusion={"weights": "learned", "timesteps": [90]})
    logits = trainer.fusion.logits
    assert logits is not None
    before = logits.detach().clone()
    trainer.step(*_batch(0))
    assert not torch.equal(logits, before)
    ids, timesteps, visits = _batch(1)
    targets = trainer.targets(trainer.parts.train, ids, timesteps, visits, trainer.noise_seed)
    seen = probe_input(targets, pooled=False)
    assert seen.shape == (4, sum(trainer.parts.features.widths), 16, 16) and seen.requires_grad


def test_the_probe_head_sees_all_layers_on_the_finest_grid(tiny):
    trainer = _trainer(tiny, "segmentation", reward="teacher_probe")
    ids, timesteps, visits = _batch(0)
    features = trainer.parts.features(trainer.parts.train, ids, timesteps, visits, 3)
    targets = trainer.targets(trainer.parts.train, ids, timesteps, visits, 3)
    seen = probe_input(targets, pooled=False)
    small = F.interpolate(features[0], (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen, torch.cat((small, features[1]), dim=1))
    result = trainer.step(ids, timesteps, visits)
    assert result.reward.isfinite().all() and (result.reward <= 0).all()


def test_a_task_of_ones_own_that_reads_maps_needs_dense_features(tiny):
    config = load_config(load_config(tiny), {"task": f"{__name__}:MapTask"})
    with pytest.raises(ValueError, match="reads feature maps"):
        DistillationTrainer(config, build_frozen_parts(config))


def test_a_bank_without_masks_is_refused_before_the_teacher_is_loaded(tiny):
    overrides = {"task": "segmentation", "distillation.dense": True}
    config = load_config(load_config(tiny), overrides)
    with pytest.raises(ValueError, match="task 'segmentation' needs masks, but data set 'digits'"):
        build_frozen_parts(config)


def test_the_teacher_sees_the_very_images_that_the_student_sees(tiny, monkeypatch):
    """With every image mirrored: features of mirrored images, and mirrored masks."""
    trainer = _trainer(tiny, "segmentation", augmentation={"flip": True})
    seen: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(
        trainer.augmentation,
        "drawn_by",
        lambda seed, images, answers, *_: (images.flip(3), answers.flip(2)),
    )
    honest, losses = trainer.student.features, trainer.task.losses
    monkeypatch.setattr(
        trainer.student, "features", lambda x: honest(seen.setdefault("images", x.clone()))
    )
    monkeypatch.setattr(
        trainer.task, "losses", lambda o, t: losses(o, seen.setdefault("answers", t.clone()))
    )
    encode = trainer.parts.teacher.encode
    monkeypatch.setattr(
        trainer.parts.teacher, "encode", lambda x: encode(seen.setdefault("taught", x.clone()))
    )
    ids, timesteps, visits = _batch(0, size=8)
    trainer.step(ids, timesteps, visits)
    bank = trainer.parts.train
    assert torch.equal(seen["images"], bank.pixels(ids).flip(3))
    assert torch.equal(seen["taught"], seen["images"])
    assert torch.equal(seen["answers"], bank.annotations["masks"].values[ids].long().flip(2))


def test_a_resumed_trainer_draws_the_same_augmentations_and_keeps_earlier_images(tiny, learned):
    # Points of scenes know no mirror images of themselves, so none are mirrored.
    changed = {"augmentation": {"rotation": 20.0, "jitter": 0.3}}
    trainer, resumed = (_trainer(tiny, "landmarks", **changed) for _ in range(2))
    plain = _trainer(tiny, "landmarks")
    for step in range(2):
        trainer.step(*_batch(step, size=3))
        plain.step(*_batch(step, size=3))
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for step in range(2, 4):
        first, second = trainer.step(*_batch(step, size=3)), resumed.step(*_batch(step, size=3))
        assert torch.equal(first.reward, second.reward)
    pairs = zip(learned(trainer), learned(resumed), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(map(torch.equal, learned(trainer), learned(plain)))


def test_lanes_of_one_group_see_the_same_augmented_image(tiny):
    grouped = {"augmentation": {"rotation": 45.0}, "env": {"num_envs": 4, "group_size": 2}}
    trainer = _trainer(tiny, "segmentation", **grouped)
    ids = torch.tensor([5, 5, 9, 9])
    images, masks = augmented(trainer, ids, 1)
    assert torch.equal(images[0], images[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(images[0], trainer.parts.train.pixels(ids)[0])
