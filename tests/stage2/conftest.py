"""A finished run with a random student of the digits' shape, and a few of their images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from repfusion_env.config import DataConfig
from repfusion_env.config_loading import load_config, to_yaml
from repfusion_env.data import ImageBank, load_data
from repfusion_env.weights import save_weights
from students import Backbone, build_backbone, linear_head


class _Parts(torch.nn.Module):
    """What a run's student.safetensors holds besides the backbone must not matter."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.head = backbone, linear_head(128, 10)


@pytest.fixture(scope="module")
def banks() -> tuple[ImageBank, ImageBank]:
    """96 images to train on, 60 held out."""
    return load_data(DataConfig(train_limit=96, heldout_limit=60))


@pytest.fixture(scope="module")
def student() -> Backbone:
    """A small CNN with random weights, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build_backbone("small_cnn", in_channels=1, image_size=16)


@pytest.fixture
def finished_run(tmp_path: Path, student: Backbone) -> Path:
    """A run folder as training commands leave it."""
    folder = tmp_path / "runs" / "digits-reinforce"
    folder.mkdir(parents=True)
    data = {"data.train_limit": 96, "data.heldout_limit": 60, "device": "cpu"}
    (folder / "config.yaml").write_text(to_yaml(load_config("digits", data)))
    about = {"agent": "reinforce", "label": "digits", "created": "2026-01-01T00:00:00+0000"}
    (folder / "run.json").write_text(json.dumps(about))
    save_weights(_Parts(student), folder / "student.safetensors")
    summary = {"decisions": 6400, "student": {"linear_probe_accuracy": 0.875}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
