"""Training, sampling and measuring a denoiser: the pieces of ``repfusion_env.teachers.train``.

Shape letters: N images in a batch, M images in a bank, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from repfusion_env.data import ImageBank

HELDOUT_TIMESTEPS = (0, 10, 50, 100, 200, 400, 600, 800, 999)
HELDOUT_IMAGES = 1024


def build_unet(
    shape: tuple[int, int, int],
    *,
    widths: Sequence[int],
    layers_per_block: int,
    attention_levels: Sequence[int],
    norm_groups: int,
    attention_head_dim: int | None,
) -> UNet2DModel:
    """A UNet2DModel for images of one shape.

    Args:
        shape: Of one image, (C, H, W).
        widths: Channels of each level, highest resolution first; each level halves the side.
        layers_per_block: Residual blocks per level.
        attention_levels: Levels with self-attention, 0 is the highest resolution.
        norm_groups: Groups of the group normalisation.
        attention_head_dim: Channels per attention head; None is one head.

    Raises:
        ValueError: The levels do not fit the image or the groups do not divide a width.
    """
    channels, height, width = shape
    levels = len(widths)
    factor = 2 ** (levels - 1)
    if height != width or height % factor:
        raise ValueError(
            f"--widths: {levels} levels need square images whose side {factor} divides, but they "
            f"are {height}x{width}; --data.image_size resizes"
        )
    odd = [width for width in widths if width % norm_groups]
    if odd:
        raise ValueError(f"--widths: {odd[0]} cannot be divided into {norm_groups} --norm-groups")
    if attention_head_dim is not None and widths[-1] % attention_head_dim:
        raise ValueError(
            f"--attention-head-dim: heads of {attention_head_dim} channels do not divide the "
            f"last width {widths[-1]}"
        )
    outside = [level for level in attention_levels if not 0 <= level < levels]
    if outside:
        raise ValueError(
            f"--attention-levels: {outside[0]} given; the {levels} levels are 0..{levels - 1}"
        )

    def blocks(kind: str) -> tuple[str, ...]:
        return tuple(
            f"{'Attn' if level in attention_levels else ''}{kind}Block2D" for level in range(levels)
        )

    return UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        down_block_types=blocks("Down"),
        up_block_types=blocks("Up")[::-1],
        norm_num_groups=norm_groups,
        attention_head_dim=attention_head_dim,
    )


def build_scheduler(timesteps: int) -> DDPMScheduler:
    """DDPM's noise schedule: linear betas 1e-4..0.02 (Ho et al., 2020, section 4)."""
    return DDPMScheduler(
        num_train_timesteps=timesteps, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers that depend on seed and step alone.

    So a resumed run draws what the uninterrupted one would have drawn, and nothing of a generator
    has to be kept.
    """
    return torch.Generator(device).manual_seed(((seed << 32) + step) % 2**63)


def learning_rate(step: int, *, peak: float, steps: int, warmup: int) -> float:
    """Linear warmup over ``warmup`` steps, then half a cosine down to zero at ``steps``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def denoising_loss(
    unet: nn.Module,
    scheduler: DDPMScheduler,
    bank: ImageBank,
    *,
    batch_size: int,
    flip: bool,
    generator: torch.Generator,
    precision: str = "fp32",
) -> Tensor:
    """Mean squared error of the predicted noise on one random batch (Ho et al., 2020, eq. 14).

    The network runs in ``precision``, ``fp32`` or ``bf16``; the error is taken in fp32.
    """
    device = bank.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (batch_size,), generator=generator, device=device)

    images = bank.pixels(draw(len(bank)))  # (N, C, H, W)
    if flip:
        mirrored = draw(2).bool()[:, None, None, None]
        images = torch.where(mirrored, images.flip(-1), images)
    timesteps = draw(scheduler.config.num_train_timesteps)
    noise = torch.randn(images.shape, generator=generator, device=device)
    noisy = scheduler.add_noise(images, noise, timesteps)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        predicted = unet(noisy, timesteps).sample
    return mse_loss(predicted.float(), noise)


def update_average(average: nn.Module, unet: nn.Module, *, decay: float, step: int) -> None:
    """Move the averaged weights; early steps average over fewer, or the start would linger."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)


@torch.inference_mode()
def heldout_losses(
    unet: nn.Module, scheduler: DDPMScheduler, bank: ImageBank, *, batch_size: int
) -> dict[int, float]:
    """Denoising loss on held-out images by timestep, always with the same noise.

    Args:
        unet: Predicts the noise.
        scheduler: Adds it.
        bank: Held-out images; the first :data:`HELDOUT_IMAGES` are used.
        batch_size: Images per forward.

    Returns:
        Mean squared error by timestep.
    """
    bank = bank.head(HELDOUT_IMAGES)
    last = scheduler.config.num_train_timesteps - 1
    losses = {}
    for timestep in sorted({min(t, last) for t in HELDOUT_TIMESTEPS}):
        generator = torch.Generator(bank.device).manual_seed(timestep)
        total = torch.zeros((), device=bank.device)
        for start in range(0, len(bank), batch_size):
            ids = torch.arange(start, min(start + batch_size, len(bank)), device=bank.device)
            images = bank.pixels(ids)
            noise = torch.randn(images.shape, generator=generator, device=bank.device)
            timesteps = torch.full_like(ids, timestep)
            predicted = unet(scheduler.add_noise(images, noise, timesteps), timesteps).sample
            total += mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3)).sum()
        losses[timestep] = float(total) / len(bank)
    return losses


@torch.inference_mode()
def sample_images(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    *,
    count: int,
    seed: int,
    steps: int = 50,
) -> Tensor:
    """Draw images with DDIM (Song et al., 2021), always from the same starting noise.

    Returns:
        uint8, (count, C, H, W), on the CPU.
    """
    sampler: Any = DDIMScheduler.from_config(scheduler.config)
    sampler.set_timesteps(min(steps, scheduler.config.num_train_timesteps))
    size = unet.config.sample_size
    shape = (count, unet.config.in_channels, size, size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(unet.device)
    for timestep in sampler.timesteps:
        noise = unet(images, timestep.to(unet.device)).sample
        images = sampler.step(noise, timestep, images).prev_sample
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def image_grid(images: Tensor, *, columns: int = 8, least_side: int = 48) -> Tensor:
    """Arrange images in rows on a grey ground; small ones are magnified.

    Args:
        images: uint8, (N, C, H, W).
        columns: Images per row.
        least_side: Pixels that an image's height must at least have in the grid.

    Returns:
        uint8, (rows * height, columns * width, C).
    """
    scale = max(1, math.ceil(least_side / images.shape[-2]))
    images = images.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    images = nn.functional.pad(images, (1, 1, 1, 1), value=128)
    missing = -len(images) % columns
    images = nn.functional.pad(images, (0, 0, 0, 0, 0, 0, 0, missing), value=128)
    count, channels, height, width = images.shape
    grid = images.view(count // columns, columns, channels, height, width)
    return grid.permute(0, 3, 1, 4, 2).reshape(-1, columns * width, channels)
