"""Shards whose training images stay on disk: indexed once by their headers, then read by place.

Shape letters: M images in all shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.decode import decode_each, in_threads
from repfusion_env.data.memory import reserve
from repfusion_env.data.shard_files import (
    CLASS_NAMES,
    IMAGES,
    LABELS,
    Label,
    Place,
    Shard,
    Splitter,
    class_numbers,
    contents,
    damaged,
    found_shards,
    label_of,
    name_of,
    numbered,
    order_of,
    until,
)
from repfusion_env.data.streamed_files import streamed_bank
from repfusion_env.data.streaming_sources import ShardSource
from repfusion_env.data.unreadable import Unreadable
from repfusion_env.progress import watched


@dataclass(frozen=True)
class _Index:
    """What one shard holds, a row for each sample.

    Attributes:
        names: Of the images, with their suffixes.
        places: (m, 2) first byte and bytes of each, int64.
        labels: Of each; an error where it cannot be read.
    """

    names: list[str]
    places: np.ndarray
    labels: list[Label | ValueError | None]

    def __len__(self) -> int:
        return len(self.names)


def load(config: DataConfig, wds: Any) -> tuple[ImageBank, ImageBank]:
    """A streamed training bank and a resident held-out one; see :func:`shards.load`.

    Raises:
        ValueError: As there; also, a shard is compressed, so that its samples have no places.
    """
    assert config.path is not None
    limits = (config.train_limit, config.heldout_limit)
    split_name = wds.tariterators.base_plus_ext
    parts = [_indexed(paths, split_name) for paths in found_shards(config.path, wds)]
    shards = tuple([Shard(path, len(index)) for path, index in part] for part in parts)
    if shards[1]:
        shards = tuple(until(part, limit) for part, limit in zip(shards, limits, strict=True))
    indexes = [dict(part)[s.path] for part, kept in zip(parts, shards, strict=True) for s in kept]
    files = numbered([*shards[0], *shards[1]])
    order = order_of(shards, limits)
    name, channels = name_of(config.path), config.channels or 3
    unreadable = Unreadable(sum(map(len, order)), config.skip_unreadable, name)
    everything = _source([file.path for file in files], indexes, config.image_size, channels)

    labels = [label for index in indexes for label in index.labels]
    rows: list[np.ndarray] = []
    for part, wanted in enumerate(order):
        kept = []
        for row in wanted.tolist():
            label = labels[row]
            if isinstance(label, ValueError):
                unreadable.add(str(label), part)
            else:
                kept.append(row)
        rows.append(np.array(kept, np.int64))
    unreadable.check_rest((len(rows[0]), len(rows[1])))

    side = config.image_size
    shape = (channels, side, side) if side else _first_shape(everything, rows[0], unreadable)
    heldout, kept_rows = _decoded(name, everything, rows[1], shape, unreadable)
    given: list[list[Any]] = [[labels[row] for row in part] for part in (rows[0], kept_rows)]
    classes, numbers = class_numbers(given, files[0].path.parent / CLASS_NAMES, config.path)
    train = streamed_bank(
        name,
        everything.take(rows[0]),
        shape,
        torch.tensor(numbers[0], dtype=torch.int64),
        classes,
        config,
        unreadable,
    )
    second = torch.tensor(numbers[1], dtype=torch.int64)
    bank = ImageBank(name, heldout, second, classes, skipped=unreadable.listed(1))
    unreadable.report()
    return train, bank


def _indexed(paths: Sequence[Path], split_name: Splitter) -> list[tuple[Path, _Index]]:
    """The shards with what they hold."""
    packed = [path for path in paths if path.suffix != ".tar"]
    if packed:
        raise ValueError(
            "data.storage: 'stream' reads single images of a shard, which a compressed one such as "
            f"'{packed[0]}' does not allow; unpack it to .tar (its images are compressed already)"
        )

    def index(path: Path) -> list[_Index]:
        names: list[str] = []
        places: list[tuple[int, int]] = []
        labels: list[Label | ValueError | None] = []
        # Unbuffered: a buffer would read eight kilobytes for a label of three bytes.
        with path.open("rb", buffering=0) as file:
            for key, files in contents(path, split_name):
                found = {place.suffix: place for place in files}
                if len(found) != len(files):
                    raise damaged(path, ValueError(f"'{key}' has two files of one suffix"))
                suffix = next(suffix for suffix in IMAGES if suffix in found)
                names.append(f"{key}.{suffix}")
                places.append((found[suffix].offset, found[suffix].size))
                labels.append(_label(file, key, found, Shard(path, 0)))
        return [_Index(names, np.array(places, np.int64), labels)]

    done = watched(in_threads(index, paths), len(paths), description="index", unit="shards")
    return [(path, found) for path, (found,) in zip(paths, done, strict=True)]


def _label(file: Any, key: str, found: dict[str, Place], shard: Shard) -> Label | ValueError | None:
    sample: dict[str, Any] = {"__key__": key}
    for kind in LABELS:
        if kind in found:
            file.seek(found[kind].offset)
            sample[kind] = file.read(found[kind].size)
    try:
        return label_of(sample, shard)
    except ValueError as error:
        return error


def _source(
    paths: list[Path], indexes: list[_Index], side: int | None, channels: int
) -> ShardSource:
    places = np.concatenate([index.places for index in indexes])
    counts = [len(index) for index in indexes]
    return ShardSource(
        shards=tuple(paths),
        shard=np.repeat(np.arange(len(paths), dtype=np.int32), counts),
        offset=places[:, 0],
        size=places[:, 1],
        names=np.array([name for index in indexes for name in index.names], object),
        side=side,
        channels=channels,
    )


def _first_shape(
    source: ShardSource, rows: np.ndarray, unreadable: Unreadable
) -> tuple[int, int, int]:
    """(C, H, W) of the first image that can be read; the others must have the same."""
    for row in rows.tolist():
        try:
            channels, height, width = source.read(row).shape
        except ValueError:
            if unreadable.allowed == 0:
                raise
            continue
        return channels, height, width
    raise ValueError(f"data set '{unreadable.name}': none of the training images can be read")


def _decoded(
    name: str,
    source: ShardSource,
    rows: np.ndarray,
    shape: tuple[int, int, int],
    unreadable: Unreadable,
) -> tuple[Tensor, np.ndarray]:
    """The held-out images, uint8 (m, C, H, W), and which of ``rows`` could be read."""
    reserve(name, (0, len(rows)), shape)
    others: list[str] = []

    def read(row: int) -> tuple[Tensor]:
        pixels = source.read(row)
        if pixels.shape != shape:
            others.append(f"{source.named(row)} is {pixels.shape[2]}x{pixels.shape[1]}")
            pixels = np.zeros(shape, np.uint8)
        return (torch.from_numpy(pixels),)

    _, part = decode_each(name, ([], rows.tolist()), read, [(shape, torch.uint8)], unreadable)
    if others:
        raise ValueError(
            f"data.path: images of mixed size: {min(others)}, the first {shape[2]}x{shape[1]} "
            "(width x height); data.image_size resizes them"
        )
    return part.tensors[0], rows[part.kept.numpy()]
