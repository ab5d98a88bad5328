from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

ModelMaker = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path) -> ModelMaker:
    """Saves a small random UNet2DModel and its scheduler in diffusers' layout."""

    def make(
        *, name: str = "model", subfolders: bool = False, safe: bool = True, **arguments: Any
    ) -> Path:
        defaults: dict[str, Any] = {
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (8, 16, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DModel(**{**defaults, **arguments})
        folder = tmp_path / name
        unet.save_pretrained(folder / "unet" if subfolders else folder, safe_serialization=safe)
        scheduler = DDPMScheduler(num_train_timesteps=1000)
        scheduler.save_pretrained(folder / "scheduler" if subfolders else folder)
        return folder

    return make
