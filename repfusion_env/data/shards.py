"""WebDataset shards: tar files whose samples are neighbouring files of one name.

A sample is an image (``0007.jpg``) with its label: ``0007.cls`` (a number or a name) or
``0007.json`` with a ``label``; where no sample has one, the images are unlabelled. ``data.path`` is
a folder of ``train-*.tar`` and ``val-*.tar`` (or ``test-*.tar``), one shard, or a pattern such as
``shards/{train-{000..146},val-{000..006}}.tar``. Without such names a fixed random 20 % of the
images are held out. A ``classes.txt`` beside the shards names the classes, one in each line.

Shape letters: M images in all shards, C channels, H height, W width.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import torch

from repfusion_env.config import DataConfig
from repfusion_env.data import streamed_shards
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.decode import closed_up, decoded, in_threads, sentences
from repfusion_env.data.memory import reserve
from repfusion_env.data.shard_files import (
    CLASS_NAMES,
    IMAGES,
    Label,
    Shard,
    class_numbers,
    counted,
    damaged,
    found_shards,
    label_of,
    name_of,
    numbered,
    order_of,
    until,
    webdataset_library,
    where_of,
)
from repfusion_env.data.unreadable import Unreadable
from repfusion_env.progress import watched


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Decode the shards at ``data.path`` in their order; RGB unless ``data.channels`` is 1.

    Raises:
        ValueError: The library is missing, there are no shards, one is damaged, a sample has no
            image or label, more images than may be left out are damaged, sizes are mixed without
            data.image_size, or the images do not fit into memory.
    """
    wds = webdataset_library()
    if config.path is None:
        raise ValueError("data.path: data.name 'webdataset' needs a folder of shards or a pattern")
    if config.storage == "stream":
        return streamed_shards.load(config, wds)
    parts = found_shards(config.path, wds)
    found = tuple(counted(part, wds.tariterators.base_plus_ext) for part in parts)
    limits = (config.train_limit, config.heldout_limit)
    if found[1]:
        # Limited, the shards behind the last image wanted need not be read.
        found = tuple(until(part, limit) for part, limit in zip(found, limits, strict=True))
    shards = numbered([*found[0], *found[1]])
    order = order_of(found, limits)
    counts = (len(order[0]), len(order[1]))
    channels = config.channels or 3
    name = name_of(config.path)
    unreadable = Unreadable(sum(counts), config.skip_unreadable, name)
    height = width = config.image_size or 0
    if config.image_size is None:
        height, width = _first_size(shards[0], wds, channels, unreadable)
    reserve(name, counts, (channels, height, width))
    images = [torch.empty((n, channels, height, width), dtype=torch.uint8) for n in counts]
    bank_of, row_of = _places(order, sum(map(len, shards)))
    readable = [np.ones(count, bool) for count in counts]
    labels: list[Label | None] = [None] * len(bank_of)

    def read(shard: Shard) -> Shard:
        met = 0
        for index, sample in enumerate(_samples(shard, wds), shard.first):
            met += 1
            if bank_of[index] < 0:
                continue
            try:
                labels[index] = label_of(sample, shard)
                pixels = _pixels(sample, shard, config.image_size, channels)
            except ValueError as error:
                unreadable.add(str(error), bank_of[index])
                readable[bank_of[index]][row_of[index]] = False
                continue
            if pixels.shape[1:] != (height, width):
                raise ValueError(
                    f"data.path: images of mixed size: {where_of(sample, shard)} is "
                    f"{pixels.shape[2]}x{pixels.shape[1]}, the first {width}x{height} "
                    "(width x height); data.image_size resizes them"
                )
            images[bank_of[index]][row_of[index]].copy_(pixels)
        if met != len(shard):
            raise ValueError(f"data.path: shard '{shard.path}' changed while it was read")
        return shard

    total = sum(map(len, shards))
    for _ in watched(in_threads(read, shards), total, description="decode", unit="images"):
        pass
    unreadable.check_rest((int(readable[0].sum()), int(readable[1].sum())))
    kept = [torch.from_numpy(np.flatnonzero(part)) for part in readable]
    given = [
        [labels[index] for index in part[rows].tolist()]
        for part, rows in zip(order, kept, strict=True)
    ]
    classes, numbers = class_numbers(given, shards[0].path.parent / CLASS_NAMES, config.path)
    train, heldout = (
        ImageBank(
            name,
            closed_up(images[part], kept[part]),
            torch.tensor(numbers[part], dtype=torch.int64),
            classes,
            skipped=unreadable.listed(part),
        )
        for part in (0, 1)
    )
    unreadable.report()
    return train, heldout


def _first_size(shard: Shard, wds: Any, channels: int, unreadable: Unreadable) -> tuple[int, int]:
    """(H, W) of the first image that can be read; the others must have the same."""
    for sample in _samples(shard, wds):
        try:
            height, width = _pixels(sample, shard, None, channels).shape[1:]
        except ValueError:
            if unreadable.allowed == 0:
                raise
            continue
        return height, width
    raise ValueError(f"data.path: none of the images in shard '{shard.path}' can be read")


def _samples(shard: Shard, wds: Any) -> Iterator[dict[str, Any]]:
    dataset = iter(wds.WebDataset([str(shard.path)], shardshuffle=False, empty_check=False))
    while True:
        try:
            sample = next(dataset, None)
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise damaged(shard.path, error) from error
        if sample is None:
            return
        yield sample


def _places(order: tuple[torch.Tensor, torch.Tensor], count: int) -> tuple[Any, Any]:
    """Bank (-1: none) and row of each of all samples, (M,) each."""
    bank_of, row_of = np.full(count, -1, np.int8), np.zeros(count, np.int64)
    for bank, ids in enumerate(order):
        bank_of[ids.numpy()] = bank
        row_of[ids.numpy()] = np.arange(len(ids))
    return bank_of, row_of


def _pixels(sample: dict[str, Any], shard: Shard, side: int | None, channels: int) -> torch.Tensor:
    suffix = next(suffix for suffix in IMAGES if suffix in sample)
    with sentences(f"{where_of(sample, shard)} (.{suffix})"):
        return decoded(BytesIO(sample[suffix]), side=side, channels=channels)
