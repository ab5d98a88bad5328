"""What is known of an image beside its class: a mask, points, or boxes, for a whole bank at once.

All of them live on the bank's device in tensors of fixed shape, so that a step looks up its rows
without asking the host. They change with their images: :meth:`resized` follows
:func:`repfusion_env.data.splits.resize`.

Shape letters: M images, H,W pixels, P points, G most boxes of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

# A pixel of no class: unlabelled, or a border that nobody is to be judged by.
IGNORE = 255
NO_BOX = -1


@dataclass(frozen=True, eq=False)
class Masks:
    """A class for every pixel.

    Args:
        values: uint8 (M, H, W): ids in ``0..len(classes) - 1``, or :data:`IGNORE`.
        classes: Names of the classes, in the order of the ids.
        mirror: The class that each one becomes in a mirrored image (left and right eye), K ids;
            None: the same.

    Raises:
        TypeError: Another dtype or shape.
        ValueError: An id outside the classes, or a ``mirror`` that is no exchange of classes.
    """

    values: Tensor
    classes: tuple[str, ...]
    mirror: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.values.dtype != torch.uint8 or self.values.ndim != 3:
            raise TypeError(f"masks must be uint8 of shape (M, H, W), not {_kind(self.values)}")
        if not 0 < len(self.classes) <= IGNORE:
            raise ValueError(f"{len(self.classes)} classes given; a mask has 1 to {IGNORE}")
        for value in torch.unique(self.values).tolist():
            if value >= len(self.classes) and value != IGNORE:
                where = int((self.values == value).flatten(1).any(1).nonzero()[0])
                raise ValueError(
                    f"the mask of image {where} holds the id {value}; allowed: "
                    f"0..{len(self.classes) - 1} ({len(self.classes)} classes), or {IGNORE} for "
                    "pixels that do not count"
                )
        _check_mirror(self.mirror, len(self.classes), "classes")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the bank's fingerprint covers, each (M, ...)."""
        return (self.values,)

    @property
    def names(self) -> tuple[str, ...]:
        """What is told apart."""
        return self.classes

    def to(self, device: torch.device | str) -> Masks:
        """The same on ``device``."""
        return _moved(self, values=self.values.to(device))

    def take(self, rows: Tensor | slice) -> Masks:
        """The images ``rows`` alone."""
        return _moved(self, values=self.values[rows])

    def resized(self, size: tuple[int, int], side: int) -> Masks:
        """For images of ``size`` (H, W) brought to squares of ``side``; ids are never mixed."""
        if size == (side, side):
            return self
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as transforms

        values = transforms.resize(self.values[:, None], [side], InterpolationMode.NEAREST_EXACT)
        return _moved(self, values=transforms.center_crop(values, [side, side])[:, 0])


@dataclass(frozen=True, eq=False)
class Keypoints:
    """The same P points in every image.

    Args:
        points: float32 (M, P, 2), x to the right and y down, in pixels; the centre of the pixel in
            the corner is (0, 0). Where a point is not visible the value means nothing.
        visible: bool (M, P): whether it is known where the point is.
        normalizer: Two points whose distance is the unit of the error (the outer eye corners);
            None: the square root of the area of the box around the image's visible points.
        mirror: The point that each one becomes in a mirrored image, P numbers; None: unknown, so
            that images cannot be mirrored.

    Raises:
        TypeError: Another dtype or shape.
        ValueError: A visible point is no number, or ``normalizer`` or ``mirror`` names none.
    """

    points: Tensor
    visible: Tensor
    normalizer: tuple[int, int] | None = None
    mirror: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        points, visible = self.points, self.visible
        if points.dtype != torch.float32 or points.ndim != 3 or points.shape[2] != 2:
            raise TypeError(f"keypoints must be float32 of shape (M, P, 2), not {_kind(points)}")
        if visible.dtype != torch.bool or visible.shape != points.shape[:2]:
            raise TypeError(
                f"visibility must be bool of shape {tuple(points.shape[:2])}, not {_kind(visible)}"
            )
        broken = (~points.isfinite().all(2) & visible).nonzero()
        if len(broken):
            image, point = broken[0].tolist()
            raise ValueError(f"point {point} of image {image} is visible, but no finite number")
        count = points.shape[1]
        if self.normalizer is not None and not all(0 <= i < count for i in self.normalizer):
            raise ValueError(f"the normaliser {self.normalizer} names none of the {count} points")
        _check_mirror(self.mirror, count, "points")

    def __len__(self) -> int:
        return len(self.points)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the bank's fingerprint covers, each (M, ...)."""
        return self.points, self.visible

    @property
    def names(self) -> tuple[str, ...]:
        """What is told apart."""
        return tuple(str(number) for number in range(self.points.shape[1]))

    def to(self, device: torch.device | str) -> Keypoints:
        """The same on ``device``."""
        return _moved(self, points=self.points.to(device), visible=self.visible.to(device))

    def take(self, rows: Tensor | slice) -> Keypoints:
        """The images ``rows`` alone."""
        return _moved(self, points=self.points[rows], visible=self.visible[rows])

    def resized(self, size: tuple[int, int], side: int) -> Keypoints:
        """For images of ``size`` (H, W) brought to squares of ``side``; what is cut off is gone."""
        if size == (side, side):
            return self
        scale, left, top = _middle_square(size, side)
        # Between pixel centres: the outer edge of the corner pixel is at -0.5.
        offset = torch.tensor([left, top], device=self.points.device)
        points = (self.points + 0.5) * scale - offset - 0.5
        inside = ((points > -0.5 - 1e-4) & (points < side - 0.5 + 1e-4)).all(2)
        return _moved(self, points=points, visible=self.visible & inside)


@dataclass(frozen=True, eq=False)
class Boxes:
    """Any number of objects in every image, filled up to the most that one holds.

    Args:
        boxes: float32 (M, G, 4), left, top, right, bottom in pixels from the image's outer edge, so
            that a box around everything is (0, 0, W, H).
        labels: int64 (M, G) in ``0..len(classes) - 1``; :data:`NO_BOX` where there is no object.
        classes: Names of the classes, in the order of the labels.

    Raises:
        TypeError: Another dtype or shape.
        ValueError: A box without an area, or a label outside the classes.
    """

    boxes: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        boxes, labels = self.boxes, self.labels
        if boxes.dtype != torch.float32 or boxes.ndim != 3 or boxes.shape[2] != 4:
            raise TypeError(f"boxes must be float32 of shape (M, G, 4), not {_kind(boxes)}")
        if labels.dtype != torch.int64 or labels.shape != boxes.shape[:2]:
            raise TypeError(
                f"box labels must be int64 of shape {tuple(boxes.shape[:2])}, not {_kind(labels)}"
            )
        wrong = ((labels >= len(self.classes)) | (labels < NO_BOX)).nonzero()
        if len(wrong):
            image, box = wrong[0].tolist()
            raise ValueError(
                f"box {box} of image {image} has the label {int(labels[image, box])}; allowed: "
                f"0..{len(self.classes) - 1} ({len(self.classes)} classes)"
            )
        sides = boxes[..., 2:] - boxes[..., :2]
        flat = (~(sides > 0).all(2) & (labels >= 0)).nonzero()
        if len(flat):
            image, box = flat[0].tolist()
            raise ValueError(
                f"box {box} of image {image} has no area: left, top, right, bottom are "
                f"{', '.join(f'{v:g}' for v in boxes[image, box].tolist())}"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the bank's fingerprint covers, each (M, ...)."""
        return self.boxes, self.labels

    @property
    def names(self) -> tuple[str, ...]:
        """What is told apart."""
        return self.classes

    def to(self, device: torch.device | str) -> Boxes:
        """The same on ``device``."""
        return _moved(self, boxes=self.boxes.to(device), labels=self.labels.to(device))

    def take(self, rows: Tensor | slice) -> Boxes:
        """The images ``rows`` alone."""
        return _moved(self, boxes=self.boxes[rows], labels=self.labels[rows])

    def resized(self, size: tuple[int, int], side: int) -> Boxes:
        """For images of ``size`` (H, W) brought to squares of ``side``.

        Boxes are cut at the new edges; one of which less than a pixel's width is left is gone.
        """
        if size == (side, side):
            return self
        scale, left, top = _middle_square(size, side)
        offset = torch.tensor([left, top, left, top], device=self.boxes.device)
        boxes = (self.boxes * scale - offset).clamp(0, side)
        kept = ((boxes[..., 2:] - boxes[..., :2]) >= 1.0).all(2) & (self.labels >= 0)
        labels = torch.where(kept, self.labels, NO_BOX)
        return _moved(self, boxes=boxes * kept[..., None], labels=labels)


Annotation = Masks | Keypoints | Boxes
A = TypeVar("A", Masks, Keypoints, Boxes)


def padded_boxes(
    boxes: list[Tensor], labels: list[Tensor], classes: tuple[str, ...], most: int | None = None
) -> Boxes:
    """Boxes of M images, one (n, 4) and (n,) each, filled up to the most of them.

    Args:
        boxes: Left, top, right, bottom in pixels, per image; none at all is allowed.
        labels: Their classes.
        classes: Names.
        most: G; default: the most boxes of an image, at least 1. Of more the largest stay.
    """
    count = max([1, *map(len, labels)]) if most is None else most
    kept = torch.zeros(len(boxes), count, 4)
    names = torch.full((len(boxes), count), NO_BOX)
    for row, (places, numbers) in enumerate(zip(boxes, labels, strict=True)):
        sides = places[:, 2:] - places[:, :2]
        order = torch.argsort(-(sides[:, 0] * sides[:, 1]), stable=True)[:count]
        kept[row, : len(order)] = places[order].float()
        names[row, : len(order)] = numbers[order].long()
    return Boxes(kept, names, classes)


def _middle_square(size: tuple[int, int], side: int) -> tuple[float, int, int]:
    """Scale, and what is cut off left and top, as :func:`repfusion_env.data.splits.resize` does."""
    height, width = size
    scale = side / min(size)
    new = (
        (side, int(side * width / height))
        if height <= width
        else (int(side * height / width), side)
    )
    top, left = round((new[0] - side) / 2.0), round((new[1] - side) / 2.0)
    return scale, left, top


def _moved(annotation: A, **tensors: Tensor) -> A:
    """A copy with other tensors; what was checked once is not checked again."""
    copy = object.__new__(type(annotation))
    copy.__dict__.update(annotation.__dict__ | tensors)
    return copy


def _check_mirror(mirror: tuple[int, ...] | None, count: int, what: str) -> None:
    if mirror is None:
        return
    if sorted(mirror) != list(range(count)) or any(mirror[m] != i for i, m in enumerate(mirror)):
        raise ValueError(f"mirror {mirror} is no exchange of {count} {what} in pairs")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
