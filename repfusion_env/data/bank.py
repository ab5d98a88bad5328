"""The image bank: a whole data set as one uint8 tensor on the device that trains on it.

Shape letters: M images in the bank, N lanes, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageBank:
    """Images and labels of one split.

    Args:
        name: What the bank is called in messages and figures.
        images: Pixels, uint8, (M, C, H, W).
        labels: Class of each image, int64, (M,), each in ``0..len(classes) - 1``.
        classes: Names of the classes, in the order of the labels.

    Raises:
        TypeError: Images or labels have another dtype or shape.
        ValueError: The bank is empty, images and labels differ in number, or a label is out of
            range.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(
                f"data set '{self.name}': images must be uint8 of shape (M, C, H, W), "
                f"not {_kind(images)}"
            )
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise TypeError(
                f"data set '{self.name}': labels must be int64 of shape (M,), not {_kind(labels)}"
            )
        if len(images) == 0 or 0 in images.shape:
            raise ValueError(f"data set '{self.name}' is empty: its images are {_kind(images)}")
        if len(images) != len(labels):
            raise ValueError(
                f"data set '{self.name}' has {len(images)} images but {len(labels)} labels"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(
                f"data set '{self.name}': labels must be in 0..{len(self.classes) - 1} "
                f"({len(self.classes)} classes), but they reach from {low} to {high}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of pixels, labels and class names; the same on every device."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> ImageBank:
        """The bank with its images and labels on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def head(self, count: int) -> ImageBank:
        """The first ``count`` images, or all where there are fewer."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def pixels(self, ids: Tensor) -> Tensor:
        """The images ``ids`` as networks take them, without a host synchronisation.

        Args:
            ids: Positions in the bank, int64, (N,), on the bank's device.

        Returns:
            Pixels in [-1, 1], float32, (N, C, H, W).
        """
        return self.images.index_select(0, ids).float().div_(127.5).sub_(1.0)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
