"""Splits and image sizes that every data set shares.

Shape letters: M images, C channels, H height, W width, S side asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPLIT_SEED = 20250101
TRAIN_FRACTION = 0.8


def permutation(count: int) -> Tensor:
    """A fixed random order of ``0..count - 1``, int64, (count,).

    It does not depend on the experiment's seed, so that all runs hold out the same images.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))


def split(count: int, *, train: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions of the training and of the held-out images, in a fixed random order.

    Args:
        count: Images to divide.
        train: How many of them are for training; default 80 %, at least one left for each side
            where there are two or more.

    Returns:
        Two int64 vectors that together hold each of ``0..count - 1`` once.
    """
    if train is None:
        train = min(max(round(count * TRAIN_FRACTION), 1), max(count - 1, 0))
    order = permutation(count)
    return order[:train], order[train:]


def resize(images: Tensor, side: int) -> Tensor:
    """Bring the shorter side to ``side`` pixels, antialiased, and cut the middle square.

    Args:
        images: uint8, (..., C, H, W).
        side: S, pixels.

    Returns:
        uint8, (..., C, S, S).
    """
    if images.shape[-2:] == (side, side):
        return images
    # Its import takes longer than everything else that an environment on digits needs.
    from torchvision.transforms.v2 import functional as transforms

    resized = transforms.resize(images, [side], antialias=True)
    return transforms.center_crop(resized, [side, side])


def recolor(images: Tensor, channels: int) -> Tensor:
    """Grey images as RGB (the same value three times), or RGB as grey (ITU-R BT.601 luma).

    Args:
        images: uint8, (M, C, H, W), C is 1 or 3.
        channels: 1 or 3.

    Raises:
        ValueError: The images have another number of channels.
    """
    have = images.shape[1]
    if have == channels:
        return images
    if have not in (1, 3):
        raise ValueError(
            f"data.channels: images with {have} channels cannot become {channels}; only 1 (grey) "
            "and 3 (RGB) can"
        )
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    from torchvision.transforms.v2 import functional as transforms

    return transforms.rgb_to_grayscale(images)
