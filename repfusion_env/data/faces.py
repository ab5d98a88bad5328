"""Faces with landmarks as image banks: cut out around the face, points in the cut-out's pixels.

Shape letters: M images, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repfusion_env.config import DataConfig
from repfusion_env.data.annotations import Keypoints
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.data.decode import decode_each, sentences
from repfusion_env.data.memory import reserve
from repfusion_env.data.squares import OUTSIDE, around, asked_size, cut, opened
from repfusion_env.data.unreadable import Unreadable


@dataclass(frozen=True)
class Face:
    """A face as it is annotated.

    Args:
        image: The file.
        where: What holds the annotation, for messages.
        points: float32 (P, 2), x and y in the image's pixels; the centre of the pixel in the corner
            is (0, 0). NaN where it is not known where the point is.
        box: Left, top, right, bottom that a face detector found; None: there is none.
    """

    image: Path
    where: str
    points: Tensor
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Layout:
    """What is known of a way to place points on a face.

    Args:
        normalizer: The outer corners of the eyes, by whose distance errors are divided.
        pairs: Points that change places in a mirrored image.
    """

    normalizer: tuple[int, int]
    pairs: tuple[tuple[int, int], ...]

    def mirror(self, count: int) -> tuple[int, ...]:
        """The point that each of ``count`` becomes in a mirrored image."""
        swapped = dict(self.pairs) | {right: left for left, right in self.pairs}
        return tuple(swapped.get(point, point) for point in range(count))


def _reversed(first: range, last: int) -> tuple[tuple[int, int], ...]:
    """Pairs of the points ``first`` with those that count down from ``last``."""
    return tuple((point, last - step) for step, point in enumerate(first))


# By the number of points. 68: iBUG's (300W). 98: WFLW's, as its Mirror98.txt has them.
LAYOUTS = {
    68: Layout(
        (36, 45),
        (
            *_reversed(range(0, 8), 16),  # jaw
            *_reversed(range(17, 22), 26),  # brows
            *_reversed(range(31, 33), 35),  # nostrils
            *_reversed(range(36, 40), 45),  # upper lids
            *_reversed(range(40, 42), 47),  # lower lids
            *_reversed(range(48, 51), 54),  # upper lip, outside
            *_reversed(range(55, 57), 59),  # lower lip, outside
            *_reversed(range(60, 62), 64),  # upper lip, inside
            *_reversed(range(65, 66), 67),  # lower lip, inside
        ),
    ),
    98: Layout(
        (60, 72),
        (
            *_reversed(range(0, 16), 32),  # jaw
            *_reversed(range(33, 38), 46),  # brows, upper edge
            *_reversed(range(38, 42), 50),  # brows, lower edge
            *_reversed(range(55, 57), 59),  # nostrils
            *_reversed(range(60, 65), 72),  # upper lids
            *_reversed(range(65, 68), 75),  # lower lids
            *_reversed(range(76, 79), 82),  # upper lip, outside
            *_reversed(range(83, 85), 87),  # lower lip, outside
            *_reversed(range(88, 90), 92),  # upper lip, inside
            *_reversed(range(93, 94), 95),  # lower lip, inside
            (96, 97),  # pupils
        ),
    ),
}


def banks(
    name: str, faces: tuple[Sequence[Face | str], Sequence[Face | str]], config: DataConfig
) -> tuple[ImageBank, ImageBank]:
    """Cut out the faces and place their points.

    The square around a face holds the detector's box and all points, and ``data.margin`` more.

    Args:
        name: Of the data set.
        faces: Training and held-out ones, all with the same number of points; a sentence instead of
            one that is annotated wrongly.
        config: Side, channels, limits and margin.

    Raises:
        ValueError: An annotation or image is wrong, and ``data.skip_unreadable`` does not allow it.
    """
    side, channels = asked_size(config)
    train, heldout = faces[0][: config.train_limit], faces[1][: config.heldout_limit]
    unreadable = Unreadable(len(train) + len(heldout), config.skip_unreadable, name)
    reserve(name, (len(train), len(heldout)), (channels, side, side))

    def read(face: Face | str) -> tuple[Tensor, Tensor]:
        if isinstance(face, str):
            raise ValueError(face)
        image = opened(face.image)
        square = around(_checked_box(face, image.size), config.margin)
        with sentences(f"'{face.image}'"):
            pixels = cut(image, square, side, channels)
        return pixels, square.points(face.points, side)

    count = _points([*train, *heldout])
    rows = [((channels, side, side), torch.uint8), ((count, 2), torch.float32)]
    parts = decode_each(name, (train, heldout), read, rows, unreadable)
    first, second = (
        _bank(name, part.tensors[0], part.tensors[1], unreadable.listed(index))
        for index, part in enumerate(parts)
    )
    unreadable.report()
    return first, second


def _points(faces: Sequence[Face | str]) -> int:
    """P, of the first face that has any."""
    return next((len(face.points) for face in faces if isinstance(face, Face)), 0)


def _bank(name: str, images: Tensor, points: Tensor, skipped: tuple[str, ...]) -> ImageBank:
    count = points.shape[1]
    layout = LAYOUTS.get(count)
    keypoints = Keypoints(
        points.nan_to_num(0.0),
        points.isfinite().all(2),
        layout.normalizer if layout else None,
        layout.mirror(count) if layout else None,
    )
    labels = torch.zeros(len(images), dtype=torch.int64)
    annotations = {"keypoints": keypoints}
    return ImageBank(name, images, labels, UNLABELLED, annotations=annotations, skipped=skipped)


def _checked_box(face: Face, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """What must be in the picture: the detector's box and the points; each near the image."""
    limits = torch.tensor(size, dtype=torch.float32)
    slack = OUTSIDE * float(limits.max())
    known = face.points.isfinite().all(1)
    astray = known & ((face.points < -slack) | (face.points > limits + slack)).any(1)
    if astray.any():
        point = int(astray.nonzero()[0])
        x, y = face.points[point].tolist()
        raise ValueError(
            f"data.path: {face.where} has point {point} at x {x:g}, y {y:g}, far outside the image "
            f"'{face.image}' of {size[0]}x{size[1]} pixels; expected are pixels from its upper left"
        )
    if not known.any():
        raise ValueError(
            f"data.path: {face.where} has no point with a known place; expected is at least one"
        )
    places = face.points[known]
    low, high = places.amin(0) + 0.5, places.amax(0) + 0.5
    if face.box is not None:
        corners = torch.tensor(face.box)
        if not (corners[2:] > corners[:2]).all() or not corners.isfinite().all():
            raise ValueError(
                f"data.path: {face.where} has the face box {_numbers(face.box)} without an area; "
                "expected are left, top, right, bottom"
            )
        near = (corners[:2] >= -slack).all() and (corners[2:] <= limits + slack).all()
        if not near or (corners[:2] >= limits).any() or (corners[2:] <= 0).any():
            raise ValueError(
                f"data.path: {face.where} has the face box {_numbers(face.box)} outside the image "
                f"'{face.image}' of {size[0]}x{size[1]} pixels; expected are left, top, right, "
                "bottom in pixels"
            )
        low, high = torch.minimum(low, corners[:2]), torch.maximum(high, corners[2:])
    if float((high - low).max()) < 1.0:
        raise ValueError(
            f"data.path: {face.where} has all its points within one pixel; expected is a face"
        )
    return (*low.tolist(), *high.tolist())  # type: ignore[return-value]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
