"""WebDataset shards: tar files whose samples are neighbouring files of one name.

A sample is an image (``0007.jpg``) with its label: ``0007.cls`` (a number or a name) or
``0007.json`` with a ``label``; where no sample has one, the images are unlabelled. ``data.path`` is
a folder of ``train-*.tar`` and ``val-*.tar`` (or ``test-*.tar``), one shard, or a pattern such as
``shards/{train-{000..146},val-{000..006}}.tar``. Without such names a fixed random 20 % of the
images are held out. A ``classes.txt`` beside the shards names the classes, one in each line.

Shape letters: M images in all shards, C channels, H height, W width.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.data.decode import SUFFIXES, closed_up, decoded, in_threads, sentences
from repfusion_env.data.memory import reserve
from repfusion_env.data.splits import split
from repfusion_env.data.unreadable import Unreadable
from repfusion_env.progress import watched
from repfusion_env.registry import did_you_mean

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
HELDOUT_PREFIXES = ("val", "test")
IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
LABELS = ("cls", "json")
KEYS = ("label", "cls", "class")
CLASS_NAMES = "classes.txt"
Label = int | str
Splitter = Callable[[str], tuple[str | None, str | None]]


@dataclass(frozen=True)
class _Shard:
    """One tar file, how many samples it holds, and the position of its first among all."""

    path: Path
    count: int
    first: int = 0

    def __len__(self) -> int:
        return self.count


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Decode the shards at ``data.path`` in their order; RGB unless ``data.channels`` is 1.

    Raises:
        ValueError: The library is missing, there are no shards, one is damaged, a sample has no
            image or label, more images than may be left out are damaged, sizes are mixed without
            data.image_size, or the images do not fit into memory.
    """
    wds = _library()
    if config.path is None:
        raise ValueError("data.path: data.name 'webdataset' needs a folder of shards or a pattern")
    parts = _shards(config.path, wds)
    counted = tuple(_counted(part, wds.tariterators.base_plus_ext) for part in parts)
    limits = (config.train_limit, config.heldout_limit)
    if counted[1]:
        # Limited, the shards behind the last image wanted need not be read.
        counted = tuple(_until(part, limit) for part, limit in zip(counted, limits, strict=True))
    shards = _numbered([*counted[0], *counted[1]])
    order = _order(counted, limits)
    counts = (len(order[0]), len(order[1]))
    channels = config.channels or 3
    name = _name(config.path)
    unreadable = Unreadable(sum(counts), config.skip_unreadable, name)
    height = width = config.image_size or 0
    if config.image_size is None:
        height, width = _first_size(shards[0], wds, channels, unreadable)
    reserve(name, counts, (channels, height, width))
    images = [torch.empty((n, channels, height, width), dtype=torch.uint8) for n in counts]
    bank_of, row_of = _places(order, sum(map(len, shards)))
    readable = [np.ones(count, bool) for count in counts]
    labels: list[Label | None] = [None] * len(bank_of)

    def read(shard: _Shard) -> _Shard:
        found = 0
        for index, sample in enumerate(_samples(shard, wds), shard.first):
            found += 1
            if bank_of[index] < 0:
                continue
            try:
                labels[index] = _label(sample, shard)
                pixels = _pixels(sample, shard, config.image_size, channels)
            except ValueError as error:
                unreadable.add(str(error), bank_of[index])
                readable[bank_of[index]][row_of[index]] = False
                continue
            if pixels.shape[1:] != (height, width):
                raise ValueError(
                    f"data.path: images of mixed size: {_where(sample, shard)} is "
                    f"{pixels.shape[2]}x{pixels.shape[1]}, the first {width}x{height} "
                    "(width x height); data.image_size resizes them"
                )
            images[bank_of[index]][row_of[index]].copy_(pixels)
        if found != len(shard):
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
    classes, numbers = _classes(given, shards[0].path.parent / CLASS_NAMES, config.path)
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


def _first_size(shard: _Shard, wds: Any, channels: int, unreadable: Unreadable) -> tuple[int, int]:
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


def _library() -> Any:
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise ValueError(
            "data.name: 'webdataset' needs the library webdataset; "
            'pip install "repfusion-env[webdataset]"'
        ) from error
    return webdataset


def _shards(given: str, wds: Any) -> tuple[list[Path], list[Path]]:
    """Shards to train on, and held-out ones; none of these where the names tell no split."""
    path = Path(given).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(SHARD_SUFFIXES))
        if not found:
            raise ValueError(
                f"data.path: there are no shards ({', '.join(SHARD_SUFFIXES)}) in '{path}'"
            )
    else:
        found = [Path(name) for name in wds.shardlists.expand_urls(str(path))]
        missing = [file for file in found if not file.is_file()]
        if missing:
            folder = missing[0].parent
            names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
            raise ValueError(
                f"data.path: there is no folder or shard '{missing[0]}'"
                f"{f' ({len(missing)} of {len(found)} are missing)' if len(found) > 1 else ''}."
                f"{did_you_mean(missing[0].name, names)}"
            )
    train = [file for file in found if file.name.startswith("train")]
    for prefix in HELDOUT_PREFIXES:
        heldout = [file for file in found if file.name.startswith(prefix)]
        if train and heldout:
            return train, heldout
    return train or found, []


def _counted(paths: Sequence[Path], split_name: Splitter) -> list[_Shard]:
    """How many samples each shard holds, from its headers alone; each with its image."""

    def count(path: Path) -> _Shard:
        found = 0
        for key, suffixes in _contents(path, split_name):
            if not any(suffix in IMAGES for suffix in suffixes):
                raise ValueError(
                    f"data.path: sample '{key}' of shard '{path}' has no image: it has "
                    f"{', '.join(suffixes)}; known are {', '.join(IMAGES)}"
                )
            found += 1
        if found == 0:
            raise ValueError(f"data.path: shard '{path}' holds no samples")
        return _Shard(path, found)

    return list(in_threads(count, paths))


def _contents(path: Path, split_name: Splitter) -> Iterator[tuple[str, list[str]]]:
    """(key, suffixes) of each sample, as the library groups neighbouring files."""
    try:
        with tarfile.open(path, "r:*") as archive:
            names = [split_name(member.name) for member in archive if member.isreg()]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from error
    files = [(key, suffix.lower()) for key, suffix in names if key is not None and suffix]
    files = [file for file in files if not file[0].startswith("__")]
    for key, group in groupby(files, key=lambda file: file[0]):
        yield key, [suffix for _, suffix in group]


def _samples(shard: _Shard, wds: Any) -> Iterator[dict[str, Any]]:
    dataset = iter(wds.WebDataset([str(shard.path)], shardshuffle=False, empty_check=False))
    while True:
        try:
            sample = next(dataset, None)
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise _damaged(shard.path, error) from error
        if sample is None:
            return
        yield sample


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error.args[0]) if error.args else type(error).__name__
    return ValueError(f"data.path: shard '{path}' is truncated or damaged ({reason})")


def _until(shards: list[_Shard], limit: int | None) -> list[_Shard]:
    kept: list[_Shard] = []
    for shard in shards:
        if limit is not None and sum(map(len, kept)) >= limit:
            break
        kept.append(shard)
    return kept


def _numbered(shards: Sequence[_Shard]) -> list[_Shard]:
    first, numbered = 0, []
    for shard in shards:
        numbered.append(_Shard(shard.path, shard.count, first))
        first += len(shard)
    return numbered


def _order(
    counted: tuple[list[_Shard], ...], limits: tuple[int | None, int | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (among all samples) of the training and of the held-out images."""
    train, heldout = (sum(map(len, part)) for part in counted)
    if heldout:
        order = torch.arange(train), torch.arange(train, train + heldout)
    elif train < 2:
        raise ValueError("data.path: the shards hold 1 image; at least 2 are needed")
    else:
        order = split(train)
    return order[0][: limits[0]], order[1][: limits[1]]


def _places(order: tuple[torch.Tensor, torch.Tensor], count: int) -> tuple[Any, Any]:
    """Bank (-1: none) and row of each of all samples, (M,) each."""
    bank_of, row_of = np.full(count, -1, np.int8), np.zeros(count, np.int64)
    for bank, ids in enumerate(order):
        bank_of[ids.numpy()] = bank
        row_of[ids.numpy()] = np.arange(len(ids))
    return bank_of, row_of


def _pixels(sample: dict[str, Any], shard: _Shard, side: int | None, channels: int) -> torch.Tensor:
    suffix = next(suffix for suffix in IMAGES if suffix in sample)
    with sentences(f"{_where(sample, shard)} (.{suffix})"):
        return decoded(BytesIO(sample[suffix]), side=side, channels=channels)


def _label(sample: dict[str, Any], shard: _Shard) -> Label | None:
    """A number or a name; None where the sample has neither file."""
    kind = next((kind for kind in LABELS if kind in sample), None)
    if kind is None:
        return None
    try:
        if kind == "cls":
            text = sample["cls"].decode("utf-8").strip()
            return int(text) if text.lstrip("-").isdigit() else text
        content = json.loads(sample["json"])
    except ValueError as error:
        raise ValueError(
            f"data.path: the .{kind} of {_where(sample, shard)} cannot be read ({error})"
        ) from error
    found = content if isinstance(content, dict) else {}
    label = next((found[key] for key in KEYS if key in found), None)
    if label is None and "json" in sample:
        return None
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(
            f"data.path: the label of {_where(sample, shard)} is {label!r}; it must be a whole "
            "number or a name"
        )
    return label


def _classes(
    labels: list[list[Label | None]], names: Path, given: str
) -> tuple[tuple[str, ...], list[list[int]]]:
    """Names of the classes, and the labels of both splits as numbers."""
    everything = [label for part in labels for label in part]
    without = sum(label is None for label in everything)
    if without == len(everything):
        return UNLABELLED, [[0] * len(part) for part in labels]
    if without:
        raise ValueError(
            f"data.path: {without:,} of {len(everything):,} samples in '{given}' have no label "
            f"(.cls, or .json with {' or '.join(KEYS)}); all need one, or none"
        )
    if all(isinstance(label, int) for label in everything):
        numbers = [[int(label or 0) for label in part] for part in labels]
        highest = max(map(max, numbers))
        known = names.read_text("utf-8").splitlines() if names.is_file() else []
        classes = known or [str(number) for number in range(highest + 1)]
        if highest >= len(classes) or min(map(min, numbers)) < 0:
            raise ValueError(
                f"data.path: labels reach from {min(map(min, numbers))} to {highest}, but they "
                f"must be in 0..{len(classes) - 1}"
                f"{f', the lines of {names}' if known else ''}"
            )
        return tuple(classes), numbers
    if not all(isinstance(label, str) for label in everything):
        raise ValueError(f"data.path: labels in '{given}' are numbers and names; give one kind")
    named = tuple(sorted({str(label) for label in everything}))
    place = {name: number for number, name in enumerate(named)}
    return named, [[place[str(label)] for label in part] for part in labels]


def _where(sample: dict[str, Any], shard: _Shard) -> str:
    return f"sample '{sample['__key__']}' of shard '{shard.path}'"


def _name(given: str) -> str:
    path = Path(given).expanduser()
    return path.resolve().name if path.is_dir() else path.parent.resolve().name
