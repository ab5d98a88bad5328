"""A square of an image at the bank's size, and where points and boxes of the image are in it.

Both kinds of data set that look at more than the middle of an image use it: faces are cut out of
theirs, and images of objects are kept whole, within the smallest square around them. What of the
square lies outside the image is grey.

Shape letters: C channels, S side asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repfusion_env.config import DataConfig
from repfusion_env.data.decode import eight_bits, sentences

# The middle of the range: nothing bright or dark that a teacher would take for an object.
GREY = 128
# Of an image's longer side: how far outside of it an annotation may reach. People do guess where a
# cut-off chin would be; what lies farther away belongs to another image, or to none.
OUTSIDE = 0.25


@dataclass(frozen=True)
class Square:
    """A square in an image, in pixels from the image's outer edge; it may reach beyond."""

    left: float
    top: float
    side: float

    def points(self, points: Tensor, side: int) -> Tensor:
        """Points (..., 2) between pixel centres, in the square at ``side`` pixels."""
        corner = torch.tensor([self.left, self.top], dtype=points.dtype)
        return (points + 0.5 - corner) * (side / self.side) - 0.5

    def boxes(self, boxes: Tensor, side: int) -> Tensor:
        """Boxes (..., 4) from the outer edge, in the square at ``side`` pixels."""
        corner = torch.tensor([self.left, self.top] * 2, dtype=boxes.dtype)
        return (boxes - corner) * (side / self.side)


def around(box: Sequence[float], margin: float = 0.0) -> Square:
    """The square around the middle of a box (left, top, right, bottom), with a margin in all."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top) * (1.0 + margin)
    return Square((left + right - side) / 2, (top + bottom - side) / 2, side)


def asked_size(config: DataConfig) -> tuple[int, int]:
    """Side and channels of the bank.

    Raises:
        ValueError: No side is configured.
    """
    if config.image_size is None:
        raise ValueError(
            f"data.image_size: data.name '{config.name}' needs a side in pixels, such as 64"
        )
    return config.image_size, config.channels or 3


def opened(path: Path) -> Image.Image:
    """An image of which the header alone is read.

    Raises:
        ValueError: There is no such file, or it is no image.
    """
    if not is_there(path):
        raise ValueError(f"data.path: there is no image '{path}'")
    with sentences(f"'{path}'"):
        return Image.open(BytesIO(path.read_bytes()))


def is_there(path: Path) -> bool:
    """Whether there is such a file; names that no file can have are those of none."""
    try:
        return path.is_file()
    except OSError:  # too long a name
        return False


def cut(image: Image.Image, square: Square, side: int, channels: int) -> Tensor:
    """The square at ``side`` pixels, antialiased, uint8 (C, S, S)."""
    scale = 1.0
    if square.side >= 2 * side:
        # A JPEG can be decoded at 1/2, 1/4 or 1/8: what is left is still twice the side.
        least = [math.ceil(length * 2 * side / square.side) for length in image.size]
        width = image.size[0]
        drafted = image.draft(None, (least[0], least[1]))
        scale = width / drafted[1][2] if drafted else 1.0
    mode = "L" if channels == 1 else "RGB"
    picture = eight_bits(image).convert(mode)
    left, top, length = square.left / scale, square.top / scale, square.side / scale
    x, y = math.floor(left), math.floor(top)
    width, height = math.ceil(left + length) - x, math.ceil(top + length) - y
    canvas = Image.new(mode, (width, height), GREY if channels == 1 else (GREY,) * 3)
    canvas.paste(picture, (-x, -y))
    left, top = left - x, top - y
    box = (left, top, min(left + length, width), min(top + length, height))
    array = torch.from_numpy(np.array(canvas.resize((side, side), Image.Resampling.BILINEAR, box)))
    return array[None] if channels == 1 else array.permute(2, 0, 1)


def inside(folder: Path, name: str, where: str) -> Path:
    """A file that an annotation names.

    Raises:
        ValueError: The name leads out of the folder.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(
            f"data.path: {where} names the image '{name}'; expected is a file in '{folder}'"
        )
    return folder / path
