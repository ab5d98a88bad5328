"""The image bank: a whole data set as one uint8 tensor on the device that trains on it.

Where it does not fit, images that are decoded as they are needed take the tensor's place.

Shape letters: M images in the bank, N lanes, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from repfusion_env.data.annotations import Annotation
from repfusion_env.data.splits import recolor, resize
from repfusion_env.data.streamed import StreamedImages

# The classes of images that come without any.
UNLABELLED = ("unlabelled",)


@dataclass(frozen=True, eq=False)
class ImageBank:
    """Images and labels of one split.

    Args:
        name: What the bank is called in messages and figures.
        images: Pixels, uint8, (M, C, H, W); under ``data.storage: stream`` what decodes them.
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
    images: Tensor | StreamedImages
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
    def streamed(self) -> bool:
        """Whether the images are decoded as they are needed."""
        return isinstance(self.images, StreamedImages)

    @property
    def ahead(self) -> int:
        """Steps whose images are decoded ahead; 0 where all are here."""
        return self.images.ahead if isinstance(self.images, StreamedImages) else 0

    @property
    def unreadable(self) -> tuple[str, ...]:
        """A sentence for each file that could not be read, those met while streaming among them."""
        met = self.images.skipped if isinstance(self.images, StreamedImages) else ()
        return (*self.skipped, *met)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of pixels, labels, annotations and names; the same on every device.

        Of streamed images the files' names, sizes and times of change stand for the pixels.
        """
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        if isinstance(self.images, StreamedImages):
            digest.update(b"streamed" + self.images.identity())
        else:
            digest.update(self.images.cpu().contiguous().numpy().data)
        digest.update(self.labels.cpu().contiguous().numpy().data)
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
        if isinstance(self.images, StreamedImages):
            return self  # decoded at the configured size
        return replace(self, images=resize(self.images, side), annotations=annotations)

    def recolored(self, channels: int) -> ImageBank:
        """The same images in grey (1) or RGB (3)."""
        if isinstance(self.images, StreamedImages):
            return self  # decoded in the configured colours
        return replace(self, images=recolor(self.images, channels))

    def relabelled(self, labels: Tensor, classes: tuple[str, ...]) -> ImageBank:
        """The same images with other labels, (M,); those that they came with stay beside them."""
        given = self if self.labelled else None
        return replace(self, labels=labels, classes=classes, given=given)

    def stage(self, ids: Tensor, host: np.ndarray, ahead: Sequence[np.ndarray] = ()) -> None:
        """Say which images are asked for next and after that; a resident bank has them all.

        Args:
            ids: (N,) the very tensor that :meth:`pixels` will be asked with, on the bank's device.
            host: Its different ids on the host, int64; see :meth:`StreamedImages.stage`.
            ahead: The same of the batches that follow.
        """
        if isinstance(self.images, StreamedImages):
            self.images.stage(ids, host, ahead)

    def announced(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """``pieces`` of ids, (n,) each, one by one; of a streamed bank the next are decoded."""
        if not isinstance(self.images, StreamedImages):
            yield from pieces
            return
        pieces, ahead = list(pieces), self.images.ahead
        hosts = [piece.cpu().numpy() for piece in pieces]
        for index, piece in enumerate(pieces):
            self.stage(piece, hosts[index], hosts[index + 1 : index + 1 + ahead])
            yield piece

    def close(self) -> None:
        """Decode no more of what was announced; the bank can be used all the same."""
        if isinstance(self.images, StreamedImages):
            self.images.close()

    def drain_metrics(self) -> dict[str, float]:
        """Under ``data.storage: stream`` the share of time spent waiting for images, by its tag."""
        return self.images.drain_metrics() if isinstance(self.images, StreamedImages) else {}

    def _with(
        self, images: Tensor | StreamedImages, labels: Tensor, given: Tensor | None
    ) -> ImageBank:
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


def _kind(tensor: Tensor | StreamedImages) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
