"""Held-out images on which nothing can be measured are refused before a teacher is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.controls import ControlTrainer
from repfusion_env import ConfigError, load_config
from repfusion_env.config import ExperimentConfig
from repfusion_env.frozen import build_frozen_parts

SIDE = 16


def _known(images: int) -> dict[str, Any]:
    """A mask, two points and a box for each image."""
    masks = np.zeros((images, SIDE, SIDE), np.uint8)
    masks[:, 4:8] = 1
    return {
        "masks": masks,
        "keypoints": np.tile(np.array([[3, 3], [9, 12]], "f4"), (images, 1, 1)),
        "boxes": np.tile(np.array([[0.25, 0.25, 0.75, 0.5]], "f4"), (images, 1)),
        "box_labels": np.zeros(images, int),
        "box_image": np.arange(images),
    }


def _nothing(kind: str, images: int, found: dict[str, Any]) -> dict[str, Any]:
    """The same, of which the first ``images`` say nothing."""
    changed = {key: value.copy() for key, value in found.items()}
    if kind == "segmentation":
        changed["masks"][:images] = 255
    elif kind == "landmarks":
        changed["keypoints"][:images] = np.nan
    else:
        for key in ("boxes", "box_labels", "box_image"):
            changed[key] = changed[key][images:]
    return changed


def _config(path: Path, tiny: dict[str, Any], task: str, empty: int) -> ExperimentConfig:
    parts = {"train_": _known(8), "test_": _nothing(task, empty, _known(6))}
    arrays = {f"{prefix}{key}": a for prefix, part in parts.items() for key, a in part.items()}
    for prefix, images in (("train_", 8), ("test_", 6)):
        arrays[f"{prefix}images"] = np.zeros((images, SIDE, SIDE), np.uint8)
    np.savez(path, **arrays)
    dense = {"task": task, "distillation.dense": True, "data.name": "npz", "data.path": str(path)}
    limits = {"data.train_limit": None, "data.heldout_limit": None}
    return load_config(load_config(tiny), dense | limits)


@pytest.mark.parametrize("task", ["segmentation", "landmarks", "detection"])
@pytest.mark.parametrize("build", [build_frozen_parts, lambda c: ControlTrainer(c, "supervised")])
def test_heldout_images_that_say_nothing_are_refused_at_once(
    tmp_path, tiny, monkeypatch, task, build
):
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr("repfusion_env.frozen.load_teacher", loaded)
    config = _config(tmp_path / "toy.npz", tiny, task, 6)
    with pytest.raises(ValueError, match="meant are the held-out images") as caught:
        build(config)
    assert "'toy'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mirroring_points_without_pairs_is_refused_before_a_teacher_is_loaded(
    tmp_path, tiny, monkeypatch
):
    monkeypatch.setattr("repfusion_env.frozen.load_teacher", lambda *_, **__: pytest.fail("loaded"))
    config = _config(tmp_path / "toy.npz", tiny, "landmarks", 0)
    with pytest.raises(ConfigError, match=r"augmentation\.flip: the keypoints of data set 'toy'"):
        build_frozen_parts(load_config(config, {"augmentation.flip": True}))


@pytest.mark.parametrize("task", ["segmentation", "landmarks", "detection"])
def test_one_heldout_image_that_says_something_is_enough(tmp_path, tiny, task):
    trainer = ControlTrainer(_config(tmp_path / "toy.npz", tiny, task, 5), "supervised")
    assert np.isfinite(trainer.heldout_metrics()[trainer.task.headline])
