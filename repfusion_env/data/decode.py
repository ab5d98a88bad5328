"""Image files into banks: decoded, resized and stacked by threads.

Each image is brought to its final size before it is kept, and the banks are allocated once, so that
a data set takes the memory of its uint8 pixels and no more.

Shape letters: M images, C channels, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from repfusion_env.config import DataConfig
from repfusion_env.data.memory import reserve
from repfusion_env.progress import watched

SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".avif"),
)
GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")
# Files of one task: enough that handing it to a thread costs nothing beside the decoding.
BLOCK = 64
MOST_THREADS = 16

P = TypeVar("P")
R = TypeVar("R")


def decode_files(
    name: str, listings: tuple[Sequence[Path], Sequence[Path]], config: DataConfig
) -> tuple[Tensor, Tensor]:
    """Pixels of the training and of the held-out files, uint8 (M, C, H, W), of one shape.

    Grey where all files are grey (or ``data.channels`` says so), RGB otherwise.

    Raises:
        ValueError: A file is no image, truncated or damaged; sizes are mixed without
            ``data.image_size``; or the banks exceed the machine's memory.
    """
    paths = [*listings[0], *listings[1]]
    side, channels = config.image_size, config.channels
    height = width = side or 0
    if side is None or channels is None:
        # Headers alone tell size and colour; with both given there is nothing to look for.
        heads = list(_headers(paths))
        if side is None:
            width, height = _one_size(paths, [head[0] for head in heads])
        if channels is None:
            channels = 1 if all(mode in GREY_MODES for _, mode in heads) else 3
    counts = (len(listings[0]), len(listings[1]))
    shape = (channels, height, width)
    reserve(name, counts, shape)
    banks = tuple(torch.empty((count, *shape), dtype=torch.uint8) for count in counts)

    def decode(block: range) -> range:
        for index in block:
            with sentences(f"'{paths[index]}'"):
                pixels = decoded(paths[index], side=side, channels=channels or 3)
            heldout = index >= counts[0]
            banks[heldout][index - counts[0] * heldout].copy_(pixels)
        return block

    blocks = _blocks(len(paths))
    for _ in watched(in_threads(decode, blocks), len(paths), description="decode", unit="images"):
        pass
    return banks[0], banks[1]


def decoded(source: Path | BytesIO, *, side: int | None, channels: int) -> Tensor:
    """One image, uint8 (C, H, W); with a side its middle square at this size, antialiased."""
    with Image.open(source) as image:
        if side is not None:
            # A JPEG can be decoded at 1/2, 1/4 or 1/8: what is left is still twice the side.
            image.draft(None, (2 * side, 2 * side))
        picture = _eight_bits(image).convert("L" if channels == 1 else "RGB")
    if side is not None and picture.size != (side, side):
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR)
    array = torch.from_numpy(np.array(picture))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits grey brought to 8; Pillow's own conversion would make nearly everything white."""
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode '{image.mode}' have no known range; save 8 or 16 bits")
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


@contextmanager
def sentences(named: str) -> Iterator[None]:
    """Whatever Pillow raises inside, as one sentence about ``named``."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"data.path: {named} is not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"data.path: {named} is truncated or damaged ({error})") from error


def in_threads(work: Callable[[P], R], pieces: Sequence[P]) -> Iterator[R]:
    """``work`` of each piece, in order, by threads; the first error ends it at once."""
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(work, pieces)
    finally:
        # After an error or Ctrl-C the pieces that still wait are not begun.
        pool.shutdown(cancel_futures=True)


def _blocks(count: int) -> list[range]:
    return [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _headers(paths: Sequence[Path]) -> Iterator[tuple[tuple[int, int], str]]:
    """((W, H), mode) of each file, without its pixels."""

    def read(block: range) -> list[tuple[tuple[int, int], str]]:
        found = []
        for index in block:
            with sentences(f"'{paths[index]}'"), Image.open(paths[index]) as image:
                found.append((image.size, image.mode))
        return found

    pieces = in_threads(read, _blocks(len(paths)))
    for piece in watched(pieces, len(paths), description="look at", unit="images"):
        yield from piece


def _one_size(paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise ValueError(
                f"data.path: images of mixed size: '{paths[0]}' is {_size(sizes[0])} and "
                f"'{path}' is {_size(size)} (width x height); data.image_size resizes them"
            )
    return sizes[0]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
