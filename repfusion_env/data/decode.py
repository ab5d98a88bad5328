"""Image files into banks: decoded, resized and stacked by threads.

Each image is brought to its final size before it is kept, and the banks are allocated once, so that
a data set takes the memory of its uint8 pixels and no more. What cannot be read is left out as far
as ``data.skip_unreadable`` allows, and refused otherwise.

Shape letters: M images, C channels, H height, W width, S side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from repfusion_env.config import DataConfig
from repfusion_env.data.memory import reserve
from repfusion_env.data.unreadable import Unreadable
from repfusion_env.progress import watched

SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".avif"),
)
GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")
# Files of one task: enough that handing it to a thread costs nothing beside the decoding.
BLOCK = 64
MOST_THREADS = 16
ROWS_MOVED = 1024

P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Decoded:
    """What was read of one part of a data set.

    Args:
        tensors: What each job gave, stacked, each (M, ...).
        kept: Positions of the M jobs that could be read among those given, int64, ascending.
    """

    tensors: tuple[Tensor, ...]
    kept: Tensor


@dataclass(frozen=True)
class Outline:
    """What all images of a data set have in common.

    Args:
        shape: (C, H, W).
        looked_at: Positions of the files whose headers could be read, for training and held-out.
    """

    shape: tuple[int, int, int]
    looked_at: tuple[list[int], list[int]]


def decode_files(
    name: str,
    listings: tuple[Sequence[Path], Sequence[Path]],
    config: DataConfig,
    unreadable: Unreadable,
) -> tuple[Decoded, Decoded]:
    """Pixels of the training and of the held-out files, uint8 (M, C, H, W), of one shape.

    Grey where all files are grey (or ``data.channels`` says so), RGB otherwise.

    Raises:
        ValueError: More files than may be left out are no image, truncated or damaged; sizes are
            mixed without ``data.image_size``; or the banks exceed the machine's memory.
    """
    return decode_outlined(
        name, listings, outline(listings, config, unreadable), config, unreadable
    )


def decode_outlined(
    name: str,
    listings: tuple[Sequence[Path], Sequence[Path]],
    found: Outline,
    config: DataConfig,
    unreadable: Unreadable,
) -> tuple[Decoded, Decoded]:
    """As :func:`decode_files`, of the files in ``found`` alone; a part of it may be empty."""
    reserve(name, (len(found.looked_at[0]), len(found.looked_at[1])), found.shape)

    def read(path: Path) -> tuple[Tensor]:
        with sentences(f"'{path}'"):
            return (decoded(path, side=config.image_size, channels=found.shape[0]),)

    train, heldout = (
        [listing[index] for index in places]
        for listing, places in zip(listings, found.looked_at, strict=True)
    )
    parts = decode_each(name, (train, heldout), read, [(found.shape, torch.uint8)], unreadable)
    first, second = (
        Decoded(part.tensors, torch.tensor(places, dtype=torch.int64)[part.kept])
        for part, places in zip(parts, found.looked_at, strict=True)
    )
    return first, second


def outline(
    listings: tuple[Sequence[Path], Sequence[Path]], config: DataConfig, unreadable: Unreadable
) -> Outline:
    """Size and colour of the images; from the files' headers where the configuration is silent.

    Raises:
        ValueError: Sizes are mixed without ``data.image_size``, or more files than may be left out
            have no header that can be read.
    """
    side, channels = config.image_size, config.channels
    everything = list(range(len(listings[0]))), list(range(len(listings[1])))
    if side is not None and channels is not None:
        return Outline((channels, side, side), everything)
    paths = [*listings[0], *listings[1]]
    heads: list[tuple[Path, tuple[int, int], str]] = []
    looked_at: tuple[list[int], list[int]] = ([], [])
    for index, (path, head) in enumerate(zip(paths, _headers(paths), strict=True)):
        heldout = index >= len(listings[0])
        if isinstance(head, str):
            unreadable.add(head, heldout)
            continue
        heads.append((path, *head))
        looked_at[heldout].append(index - len(listings[0]) * heldout)
    if not heads:
        raise ValueError(f"data.path: none of the {len(paths):,} images can be read")
    width, height = (side, side) if side is not None else _one_size(heads)
    grey = all(mode in GREY_MODES for _, _, mode in heads)
    return Outline((channels or (1 if grey else 3), height, width), looked_at)


def decode_each(
    name: str,
    jobs: tuple[Sequence[P], Sequence[P]],
    read: Callable[[P], tuple[Tensor, ...]],
    rows: Sequence[tuple[tuple[int, ...], torch.dtype]],
    unreadable: Unreadable,
) -> tuple[Decoded, Decoded]:
    """The results of ``read`` for the training and for the held-out jobs, by threads.

    Args:
        name: Of the data set, for messages.
        jobs: One for each image.
        read: Gives one row of every tensor; called by several threads at once. The ValueErrors it
            raises, one sentence with the file's name each, say that the image cannot be read.
        rows: Shape and dtype of what it gives.
        unreadable: Who decides about images that cannot be read.

    Raises:
        ValueError: More images than may be left out cannot be read, or all of a part.
    """
    counts = (len(jobs[0]), len(jobs[1]))
    parts = [
        [torch.empty((count, *shape), dtype=dtype) for shape, dtype in rows] for count in counts
    ]
    readable = [np.ones(count, bool) for count in counts]

    def decode(block: range) -> range:
        for index in block:
            part = int(index >= counts[0])
            row = index - counts[0] * part
            try:
                values = read(jobs[part][row])
            except ValueError as error:
                unreadable.add(str(error), part)
                readable[part][row] = False
                continue
            for tensor, value in zip(parts[part], values, strict=True):
                tensor[row].copy_(value)
        return block

    total, blocks = sum(counts), _blocks(sum(counts))
    for _ in watched(in_threads(decode, blocks), total, description="decode", unit="images"):
        pass
    # A part without jobs is none of ours: streamed images are decoded later.
    left = [int(found.sum()) if len(found) else 1 for found in readable]
    unreadable.check_rest((left[0], left[1]))
    train, heldout = (
        Decoded(tuple(closed_up(tensor, kept) for tensor in tensors), kept)
        for tensors, kept in zip(
            parts, (torch.from_numpy(np.flatnonzero(found)) for found in readable), strict=True
        )
    )
    return train, heldout


def closed_up(tensor: Tensor, kept: Tensor) -> Tensor:
    """The rows ``kept`` (ascending) moved to the front of ``tensor`` itself, and only these.

    A copy of a bank that fills the memory would not fit beside it.
    """
    if len(kept) == len(tensor):
        return tensor
    for start in range(0, len(kept), ROWS_MOVED):
        rows = kept[start : start + ROWS_MOVED]
        # Rows only move forward, so that none is overwritten before it has moved.
        tensor[start : start + len(rows)] = tensor[rows]
    return tensor[: len(kept)]


def decoded(source: Path | BytesIO, *, side: int | None, channels: int) -> Tensor:
    """One image, uint8 (C, H, W); with a side its middle square at this size, antialiased."""
    return torch.from_numpy(decoded_array(source, side=side, channels=channels))


def decoded_array(source: Path | BytesIO, *, side: int | None, channels: int) -> np.ndarray:
    """As :func:`decoded`."""
    with Image.open(source) as image:
        return _array(image, side=side, channels=channels)


def pixels(image: Image.Image, *, side: int | None, channels: int) -> Tensor:
    """An opened image, uint8 (C, H, W); with a side its middle square at this size, antialiased."""
    return torch.from_numpy(_array(image, side=side, channels=channels))


def _array(image: Image.Image, *, side: int | None, channels: int) -> np.ndarray:
    if side is not None:
        # A JPEG can be decoded at 1/2, 1/4 or 1/8: what is left is still twice the side.
        image.draft(None, (2 * side, 2 * side))
    picture = eight_bits(image).convert("L" if channels == 1 else "RGB")
    if side is not None and picture.size != (side, side):
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR)
    array = np.array(picture)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def eight_bits(image: Image.Image) -> Image.Image:
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
    except FileNotFoundError as error:
        raise ValueError(f"data.path: there is no file {named}") from error
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


def _headers(paths: Sequence[Path]) -> Iterator[tuple[tuple[int, int], str] | str]:
    """((W, H), mode) of each file, without its pixels; or what is wrong with it, as a sentence."""

    def read(block: range) -> list[tuple[tuple[int, int], str] | str]:
        found: list[tuple[tuple[int, int], str] | str] = []
        for index in block:
            try:
                with sentences(f"'{paths[index]}'"), Image.open(paths[index]) as image:
                    found.append((image.size, image.mode))
            except ValueError as error:
                found.append(str(error))
        return found

    pieces = in_threads(read, _blocks(len(paths)))
    for piece in watched(pieces, len(paths), description="look at", unit="images"):
        yield from piece


def _one_size(heads: Sequence[tuple[Path, tuple[int, int], str]]) -> tuple[int, int]:
    first, wanted, _ = heads[0]
    for path, size, _ in heads:
        if size != wanted:
            raise ValueError(
                f"data.path: images of mixed size: '{first}' is {size_of(wanted)} and "
                f"'{path}' is {size_of(size)} (width x height); data.image_size resizes them"
            )
    return wanted


def size_of(size: tuple[int, int]) -> str:
    """(W, H) as text."""
    return f"{size[0]}x{size[1]}"
