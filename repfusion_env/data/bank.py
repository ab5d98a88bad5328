"""The image bank: a whole data set as one uint8 tensor on the device that trains on it.

Shape letters: M images in the bank, N lanes, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from repfusion_env.data.annotations import Annotation
from repfusion_env.data.splits import resize

# The classes of images that come without any.
UNLABELLED = ("unlabelled",)


@dataclass(frozen=True, eq=False)
class ImageBank:
    """Images and labels of one split.

    Args:
        name: What the bank is called in messages and figures.
        images: Pixels, uint8, (M, C, H, W).
        labels: Class of each image, int64, (M,), each in ``0..len(classes) - 1``.
        classes: Names of the classes, in the order of the labels.
        given: Where the labels are clusters, the same images with the labels that they came with;
            None where they came with none, and where the labels are these.
        annotations: What dense tasks learn from, each for all M images: ``masks``, ``keypoints``,
            ``boxes``. Images that come with these alone are :data:`UNLABELLED`.
        skipped: Files that could not be read and that ``data.skip_unreadable`` left out, each with
            the reason.

    Raises:
        TypeError: Images or labels have another dtype or shape.
        ValueError: The bank is empty, images and labels differ in number, or a label is out of
            range.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    given: ImageBank | None = None
    annotations: Mapping[str, Annotation] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

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
        for kind, annotation in self.annotations.items():
            if len(annotation) != len(images):
                raise ValueError(
                    f"data set '{self.name}' has {len(images)} images but {len(annotation)} {kind}"
                )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def labelled(self) -> bool:
        """Whether the images came with classes."""
        return self.classes != UNLABELLED

    @property
    def judged(self) -> ImageBank:
        """What a probe is fitted and scored on: the labels that the images came with, if any."""
        return self.given or self

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of pixels, labels, annotations and names; the same on every device."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        for kind, annotation in sorted(self.annotations.items()):
            digest.update(repr((kind, annotation.names)).encode())
            for tensor in annotation.tensors:
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> ImageBank:
        """The bank with its images, labels and annotations on ``device``."""
        images, labels = self.images.to(device), self.labels.to(device)
        given = self.given.labels.to(device) if self.given else None
        annotations = {kind: found.to(device) for kind, found in self.annotations.items()}
        return replace(self._with(images, labels, given), annotations=annotations)

    def head(self, count: int) -> ImageBank:
        """The first ``count`` images, or all where there are fewer."""
        return self.take(slice(count))

    def take(self, rows: Tensor | slice) -> ImageBank:
        """The images ``rows`` alone, with all that is known of them."""
        labels = self.given.labels[rows] if self.given else None
        annotations = {kind: found.take(rows) for kind, found in self.annotations.items()}
        bank = replace(self, given=None, annotations={})
        bank = bank._with(self.images[rows], self.labels[rows], None)
        if self.given is not None and labels is not None:
            given = replace(self.given, images=bank.images, labels=labels, annotations={})
            bank = replace(bank, given=given)
        return replace(bank, annotations=annotations)

    def resized(self, side: int) -> ImageBank:
        """The middle squares at ``side`` pixels; annotations follow their images."""
        size = self.shape[1], self.shape[2]
        annotations = {k: found.resized(size, side) for k, found in self.annotations.items()}
        return replace(self, images=resize(self.images, side), annotations=annotations)

    def relabelled(self, labels: Tensor, classes: tuple[str, ...]) -> ImageBank:
        """The same images with other labels, (M,); those that they came with stay beside them."""
        given = self if self.labelled else None
        return replace(self, labels=labels, classes=classes, given=given)

    def _with(self, images: Tensor, labels: Tensor, given: Tensor | None) -> ImageBank:
        # The pixels are never held twice.
        bank = replace(self, images=images, labels=labels, given=None)
        if self.given is None or given is None:
            return bank
        return replace(bank, given=replace(self.given, images=images, labels=given))

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
