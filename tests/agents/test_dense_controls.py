"""Controls of students for masks, points and boxes: the same start, images, head and metric."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.controls import ControlStudent, ControlTrainer
from agents.train_control import main
from repfusion_env.config_loading import load_config, merge
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.stage2.labels import task_subset
from repfusion_env.student import Student

TASKS = ("segmentation", "landmarks", "detection")
DENSE = {
    "distillation.dense": True,
    "segmentation.width": 16,
    "landmarks.width": 16,
    "detection.width": 16,
    "env.num_envs": 8,
    "optimizer.batch_size": 8,
}
MOVED = {"augmentation.flip": True, "augmentation.rotation": 20.0, "augmentation.jitter": 0.3}


@pytest.fixture
def dense(tiny: dict[str, Any], squares: str) -> Callable[..., Any]:
    """The configuration of an experiment on rectangles, by its task."""

    def make(task: str, **more: Any) -> Any:
        data = {"task": task, "data.name": "npz", "data.path": squares}
        return load_config("digits", merge(merge(tiny, DENSE | data), more))

    return make


@pytest.mark.parametrize("task", TASKS)
def test_targets_teach_the_supervised_control(task: str, dense: Callable[..., Any]) -> None:
    control = ControlTrainer(dense(task, **{"optimizer.learning_rate": 5e-3}), "supervised")
    losses = []
    for _ in range(20):
        control.step()
        metrics = control.drain_metrics()
        losses.append(metrics["student/task_loss"])
        assert 0 <= metrics[f"student/{control.task.score}"] <= 1
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    found = control.heldout_metrics()
    assert control.task.headline in found


def test_control_and_distilled_student_begin_alike_and_see_the_same_changed_images(
    dense: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dense("segmentation", seed=5, **MOVED, **{"env.group_size": 2})
    config_few = dense("segmentation", seed=5, **MOVED, **{"optimizer.batch_size": 12})
    shown: dict[type, list[torch.Tensor]] = {ControlStudent: [], Student: []}
    for kind in shown:
        features = kind.features

        def watch(
            self: Any, images: torch.Tensor, kind: type = kind, features: Any = features
        ) -> Any:
            if self.training:
                shown[kind].append(images.clone())
            return features(self, images)

        monkeypatch.setattr(kind, "features", watch)
    for experiment in (config, config_few):
        for seen in shown.values():
            seen.clear()
        control = ControlTrainer(experiment, "supervised")
        env = RepFusionVectorEnv(config=experiment)
        mine, theirs = (t.student.backbone.state_dict() for t in (control, env.trainer))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        env.reset(seed=5)
        for _ in range(2):
            env.step([0] * 8)
            control.step()
        assert len(shown[ControlStudent]) == 2
        for one, other in zip(shown[ControlStudent], shown[Student], strict=True):
            assert torch.equal(one, other)


def test_a_few_images_are_all_that_is_shown(dense: Callable[..., Any]) -> None:
    config = dense("segmentation", **{"env.num_envs": 2})
    control = ControlTrainer(config, "supervised", labels="10%")
    allowed = task_subset("masks", control.parts.train, 5, 0)
    seen: set[int] = set()
    for _ in range(8):
        control.step()
        seen |= set(control.recent.tolist())
    assert control.labels == 5 and seen == set(allowed.tolist())


def test_a_resumed_control_is_shown_the_same_changed_images(dense: Callable[..., Any]) -> None:
    config = dense("detection", **MOVED, **{"env.num_envs": 4})
    whole, first, second = (ControlTrainer(config, "supervised") for _ in range(3))
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.step()
    mine, theirs = second.student.state_dict(), whole.student.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_views_teach_a_backbone_whatever_the_task(dense: Callable[..., Any]) -> None:
    control = ControlTrainer(dense("landmarks"), "simclr")
    before = [weight.clone() for weight in control.student.backbone.parameters()]
    control.step()
    after = control.student.backbone.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert control.student.head is None and control.heldout_metrics() == {}


def test_a_dense_control_leaves_its_metric(
    experiment: Callable[..., Path], squares: str, tmp_path: Path
) -> None:
    data = {"task": "segmentation", "data.name": "npz", "data.path": squares}
    config = experiment(**DENSE, **data, **{"run.decisions": 16})
    assert main(["--config", str(config), "--run.name", "one", "--method", "supervised"]) == 0
    summary = json.loads((tmp_path / "one" / "summary.json").read_text(encoding="utf-8"))
    assert summary["labels"] == 48
    assert summary["student"]["linear_probe_accuracy"] is None
    assert summary["student"]["headline"] == "miou"
    assert 0 <= summary["student"]["metrics"]["miou"] <= 1


def test_views_for_masks_are_refused(
    experiment: Callable[..., Path], squares: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"task": "segmentation", "data.name": "npz", "data.path": squares}
    config = experiment(**DENSE, **data)
    assert main(["--config", str(config), "--method", "supervised", "--augment"]) == 2
    assert "--augment: its views move an image and not its masks" in capsys.readouterr().err
