"""The CIFAR-10 configuration, whole, on the real images and a small teacher with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.train_reinforce import main


@pytest.fixture
def color_teacher(tmp_path: Path) -> str:
    from diffusers import DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    unet.save_pretrained(tmp_path / "teacher")
    DDPMScheduler(num_train_timesteps=1000).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_the_configuration_runs_on_the_real_images(real_data, color_teacher, tmp_path):
    arguments = {
        "config": "cifar10",
        "data.path": str(real_data / "cifar10.npz"),
        "data.train_limit": 200,
        "data.heldout_limit": 60,
        "teacher.model": color_teacher,
        "teacher.standardize_images": 16,
        "timesteps.count": 4,
        "env.num_envs": 16,
        "optimizer.batch_size": 16,
        "run.decisions": 96,
        "run.folder": str(tmp_path / "runs"),
        "run.name": "real",
    }
    assert main([f"--{key}={value}" for key, value in arguments.items()]) == 0
    summary = json.loads((tmp_path / "runs" / "real" / "summary.json").read_text())
    assert summary["decisions"] == 96
    assert summary["heldout_images"] == 60
    assert len(summary["reward"]["fixed"]) == 4
    assert 0.0 <= summary["student"]["linear_probe_accuracy"] <= 1.0
