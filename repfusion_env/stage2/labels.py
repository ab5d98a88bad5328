"""Which training images keep their label, or mask, points, boxes, where only a few may.

Shape letters: M images.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from repfusion_env.data import ImageBank


def label_count(labels: str | int | float, images: int) -> int:
    """How many labels ``"10%"``, ``0.1`` or ``140`` means of ``images``.

    Args:
        labels: A percentage as text, a part in (0, 1) as a float, or a count of 1 or more. A float
            1.0 is all; the whole number 1 is one label.
        images: Training images in all.

    Raises:
        ValueError: It is none of these, or more than there are.
    """
    count = _count(labels, images)
    if count is None:
        raise ValueError(
            f"labels: {labels!r} given; it must be a percentage such as '10%' (above 0%, up to "
            "100%), or a number of images of 1 or more"
        )
    if count > images:
        raise ValueError(f"labels: {labels} given, but there are {images:,} training images")
    return count


def labelled_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose ``count`` images, as many of each class as there can be.

    Images come in rounds: each round takes one image of every class that has any left, in random
    order. So any count is balanced to within one image, has every class as soon as it reaches their
    number, and a smaller count's images are the first of a larger count's with the same seed.

    Args:
        labels: (M,) int64 classes.
        count: Images to choose, 1 to M.
        seed: Any int of 0 or more; the draw does not depend on the device.

    Returns:
        (count,) int64 positions, on the device of ``labels``.

    Raises:
        ValueError: ``count`` is out of range.
    """
    import torch

    from repfusion_env.noise import derive_seed

    if not 1 <= count <= len(labels):
        raise ValueError(
            f"labels: {count} given; it must be 1 to {len(labels)}, the images' number"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "labels"))
    order = torch.randperm(len(labels), generator=generator)
    sorted_labels, by_class = torch.sort(labels.cpu()[order], stable=True)
    sizes = torch.bincount(sorted_labels)
    starts = sizes.cumsum(0) - sizes
    rounds = torch.empty_like(by_class)  # (M,) how many of its class come before an image
    rounds[by_class] = torch.arange(len(labels)) - starts[sorted_labels]
    # Stable, so images of one round stay in the random order.
    chosen = order[torch.argsort(rounds, stable=True)][:count]
    return chosen.to(labels.device)


def task_subset(annotation: str, bank: ImageBank, count: int, seed: int) -> Tensor:
    """The ``count`` images of ``bank`` that a task learns from, as :func:`labelled_subset`.

    Args:
        annotation: What the task predicts. Of ``labels`` the draw is balanced over the classes; of
            all else an image counts as one, whatever is in it.
        bank: M training images.
        count: Images to choose, 1 to M.
        seed: Of the draw.
    """
    labels = bank.labels if annotation == "labels" else bank.labels.new_zeros(len(bank))
    return labelled_subset(labels, count, seed)


def _count(labels: str | int | float, images: int) -> int | None:
    if isinstance(labels, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", labels)
        if not match:
            return None
        number = float(match[1])
        if match[2]:
            return min(images, max(1, round(number / 100 * images))) if 0 < number <= 100 else None
        return int(number) if number >= 1 and number == int(number) else None
    if isinstance(labels, bool) or not isinstance(labels, int | float):
        return None
    if isinstance(labels, int):
        return labels if labels >= 1 else None
    return min(images, max(1, round(labels * images))) if 0 < labels <= 1 else None
