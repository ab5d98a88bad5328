"""The folder that a training leaves: diffusers' layout, samples and a model card."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from repfusion_env.atomic import atomic_file, write_text
from repfusion_env.data import ImageBank
from repfusion_env.teachers.training.denoising import image_grid

DATA_NOTES = {
    "digits": (
        "scikit-learn's copy of the UCI data set 'Optical Recognition of Handwritten Digits' "
        "(E. Alpaydin, C. Kaynak), licence CC BY 4.0; 8x8 pixels brought to 16x16"
    ),
    "digit_scenes": (
        "scenes composed by this package of scikit-learn's copy of the UCI data set 'Optical "
        "Recognition of Handwritten Digits' (E. Alpaydin, C. Kaynak), licence CC BY 4.0"
    ),
    "cifar10": (
        "CIFAR-10 (A. Krizhevsky, 2009); published without an explicit licence, for research"
    ),
}


@dataclass(frozen=True)
class TrainingRecord:
    """What the model card tells of a training."""

    command: str
    data: ImageBank
    heldout: ImageBank
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    ema: float
    loss: float
    heldout_losses: dict[int, float]
    seconds: float
    device: torch.device


def write_model_folder(
    folder: Path,
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    samples: Tensor,
    record: TrainingRecord,
    dtype: torch.dtype,
) -> None:
    """Write configs, weights, samples and card; a file is there whole or not at all.

    Args:
        folder: Made where it is missing.
        unet: The network whose weights are saved.
        scheduler: Its noise scheduler.
        samples: Drawn images, uint8, (N, C, H, W).
        record: For the card.
        dtype: Of the saved weights.
    """
    weights = {
        name: weight.detach().to("cpu", dtype).contiguous()
        for name, weight in unet.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", unet.to_json_string())
    write_text(folder / "scheduler_config.json", scheduler.to_json_string())
    with atomic_file(folder / "diffusion_pytorch_model.safetensors") as file:
        file.write(safetensors_bytes(weights, metadata={"format": "pt"}))
    write_samples(folder / "samples.png", samples)
    parameters = sum(weight.numel() for weight in unet.parameters())
    write_text(folder / "README.md", model_card(unet, scheduler, record, parameters, dtype))


def write_samples(path: Path, images: Tensor) -> None:
    """Write images, uint8 (N, C, H, W), as one PNG grid."""
    pixels = image_grid(images).numpy()
    grey = pixels.shape[-1] == 1
    picture = Image.fromarray(pixels[..., 0] if grey else pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def model_card(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    record: TrainingRecord,
    parameters: int,
    dtype: torch.dtype,
) -> str:
    """The README of a trained teacher."""
    channels, height, width = record.data.shape
    machine = (
        torch.cuda.get_device_name(record.device)
        if record.device.type == "cuda"
        else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    table = "\n".join(f"| {t} | {loss:.4f} |" for t, loss in record.heldout_losses.items())
    widths = ", ".join(str(width) for width in unet.config.block_out_channels)
    return f"""\
# DDPM of '{record.data.name}', {channels}x{height}x{width}

A small denoising diffusion model (diffusers `UNet2DModel`, {parameters:,} parameters, widths
{widths}) that predicts the noise of {scheduler.config.num_train_timesteps} linear steps.

Intended use: a frozen teacher whose inner features, read at a timestep, are distilled into a small
recognition network. Its samples show that it has learnt the data and are no end in themselves.

![samples](samples.png)

| | |
| --- | --- |
| data | {len(record.data):,} training images, {len(record.heldout):,} held out (never seen) |
| source and licence of the data | {DATA_NOTES.get(record.data.name, "as given by the user")} |
| fingerprint of the training images | `{record.data.fingerprint}` |
| input | [-1, 1], {channels} channel(s), {height}x{width}; no class labels |
| steps | {record.steps:,} of {record.batch_size} images, AdamW {record.learning_rate:g}, cosine |
| weights | exponential average ({record.ema:g}), saved as {str(dtype).removeprefix("torch.")} |
| seed | {record.seed} |
| training loss, last 1,000 steps | {record.loss:.4f} |
| trained on | {machine}, {record.seconds / 60:.1f} min, {datetime.date.today().isoformat()} |
| libraries | {libraries} |

Denoising loss on held-out images (mean squared error of the predicted noise, fixed noise):

| timestep | loss |
| --- | --- |
{table}

Made by

    {record.command}

Not meant for generating images, nor for images unlike the data above.
"""
