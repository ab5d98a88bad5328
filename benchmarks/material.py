"""What the speed measurements run on: a real architecture with random weights, random images.

Speed does not depend on the values of weights and pixels, so nothing has to be downloaded.

Shape letters: M images, C,H,W image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# The network and the noise scheduler of google/ddpm-cifar10-32: 35.7 M parameters.
DDPM_CIFAR10_UNET: Mapping[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "act_fn": "silu",
    "downsample_padding": 0,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "center_input_sample": False,
}
DDPM_CIFAR10_SCHEDULER: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "variance_type": "fixed_large",
    "clip_sample": True,
}
# The same shape of network, small enough for a test.
TINY_UNET: Mapping[str, Any] = {
    **DDPM_CIFAR10_UNET,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}
LAYER = "mid_block.resnets.1.conv2"
CLASSES = 10


@dataclass(frozen=True)
class Material:
    """Where teacher and images lie.

    Attributes:
        teacher: Folder of the untrained UNet and its scheduler.
        bank: ``.npz`` image bank.
        parameters: Of the whole UNet.
    """

    teacher: Path
    bank: Path
    parameters: int


def make_material(folder: Path, unet: Mapping[str, Any], images: int) -> Material:
    """Write an untrained teacher and a bank of random images into ``folder``.

    Args:
        folder: Exists.
        unet: Arguments of diffusers' ``UNet2DModel``.
        images: M of the training split; a tenth of it is held out.
    """
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2DModel(**unet)
    teacher = folder / "teacher"
    network.save_pretrained(teacher)
    DDPMScheduler(**DDPM_CIFAR10_SCHEDULER).save_pretrained(teacher)
    random = np.random.default_rng(0)
    side, channels = unet["sample_size"], unet["in_channels"]
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", images), ("test", max(1, images // 10))):
        shape = (count, side, side, channels)
        arrays[f"{split}_images"] = random.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = random.integers(0, CLASSES, count)
    arrays["classes"] = np.array([str(number) for number in range(CLASSES)])
    bank = folder / "random_images.npz"
    np.savez(bank, **arrays)  # type: ignore[arg-type]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Material(teacher, bank, parameters)
