"""Augmentation of a batch on the device, drawn for each image.

torchvision's geometric transforms draw once for a whole batch, so crops and flips are done here by
indexing; mixup and cutmix, which mix a batch with one weight, are torchvision's.

Shape letters: B images, C,H,W image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from repfusion_env.stage2.settings import FinetuneConfig

# Ratio of a crop's sides at the extreme, as in torchvision's RandomResizedCrop.
RATIO = 4.0 / 3.0
Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def augment(images: Tensor, config: FinetuneConfig) -> Tensor:
    """Crop and mirror each image by itself, as ``config`` says.

    Draws from the device's global generator.

    Args:
        images: (B, C, H, W) in [-1, 1].
        config: ``resized_crop``, ``crop`` and ``flip``.

    Returns:
        Images of the same shape.
    """
    if config.resized_crop < 1:
        images = resized_crops(images, config.resized_crop)
    if config.crop:
        images = shifts(images, config.crop)
    if config.flip:
        mirrored = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images


def shifts(images: Tensor, most: int) -> Tensor:
    """Shift each image by up to ``most`` pixels along both axes; black (-1) comes in."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (most,) * 4, value=-1.0)
    device = images.device
    corner = torch.randint(2 * most + 1, (2, count, 1), device=device)
    rows = corner[0] + torch.arange(height, device=device)  # (B, H)
    columns = corner[1] + torch.arange(width, device=device)  # (B, W)
    which = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[which, channel, rows[:, None, :, None], columns[:, None, None, :]]


def resized_crops(images: Tensor, smallest: float) -> Tensor:
    """Crop a random box of each image and resize it to the whole, bilinearly.

    The box has between ``smallest`` and all of the area and sides in a ratio between 3/4 and 4/3,
    cut off at the image's own sides.
    """
    count, device = len(images), images.device
    area = smallest + (1 - smallest) * torch.rand(count, device=device)
    stretch = RATIO ** (torch.rand(count, device=device) - 0.5)  # square root of the sides' ratio
    sides = torch.stack((area.sqrt() * stretch, area.sqrt() / stretch), dim=1).clamp(max=1.0)
    centre = (1 - sides) * (2 * torch.rand(count, 2, device=device) - 1)  # (B, 2) as (x, y)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = sides[:, 0], sides[:, 1], centre
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def mixer(config: FinetuneConfig, classes: int) -> Mixer | None:
    """Mixup, cutmix, or a random choice of both; None where neither is on.

    Returns:
        From images (B, C, H, W) and labels (B,) to mixed images and targets (B, K).
    """
    if not (config.mixup or config.cutmix):
        return None
    from torchvision.transforms import v2

    mixers = []
    if config.mixup:
        mixers.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        mixers.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    chosen: Mixer = mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)
    return chosen
