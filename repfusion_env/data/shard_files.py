"""What shards hold: which tar files there are, their samples, labels and places.

Shape letters: M images in all shards.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from repfusion_env.data.bank import UNLABELLED
from repfusion_env.data.decode import SUFFIXES, in_threads
from repfusion_env.data.splits import split
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
class Shard:
    """One tar file, how many samples it holds, and the position of its first among all."""

    path: Path
    count: int
    first: int = 0

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True, slots=True)
class Place:
    """One file of a sample: its suffix, first byte in the shard, and bytes."""

    suffix: str
    offset: int
    size: int


def webdataset_library() -> Any:
    """The module ``webdataset``; refused in one sentence where it is not installed."""
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise ValueError(
            "data.name: 'webdataset' needs the library webdataset; "
            'pip install "repfusion-env[webdataset]"'
        ) from error
    return webdataset


def found_shards(given: str, wds: Any) -> tuple[list[Path], list[Path]]:
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


def contents(path: Path, split_name: Splitter) -> Iterator[tuple[str, list[Place]]]:
    """Key and files of each sample, as the library groups neighbouring files; from headers alone.

    Raises:
        ValueError: The shard is damaged, or a sample has no image; also, at the end, where there
            are none.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            members = [
                (*split_name(member.name), member.offset_data, member.size)
                for member in archive
                if member.isreg()
            ]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise damaged(path, error) from error
    files = [
        (key, Place(suffix.lower(), offset, size))
        for key, suffix, offset, size in members
        if key is not None and suffix and not key.startswith("__")
    ]
    if not files:
        raise ValueError(f"data.path: shard '{path}' holds no samples")
    for key, group in groupby(files, key=lambda file: file[0]):
        places = [place for _, place in group]
        if not any(place.suffix in IMAGES for place in places):
            raise ValueError(
                f"data.path: sample '{key}' of shard '{path}' has no image: it has "
                f"{', '.join(place.suffix for place in places)}; known are {', '.join(IMAGES)}"
            )
        yield key, places


def counted(paths: Sequence[Path], split_name: Splitter) -> list[Shard]:
    """How many samples each shard holds."""

    def count(path: Path) -> Shard:
        return Shard(path, sum(1 for _ in contents(path, split_name)))

    return list(in_threads(count, paths))


def damaged(path: Path, error: Exception) -> ValueError:
    """The sentence about a shard that cannot be read."""
    reason = str(error.args[0]) if error.args else type(error).__name__
    return ValueError(f"data.path: shard '{path}' is truncated or damaged ({reason})")


def until(shards: list[Shard], limit: int | None) -> list[Shard]:
    """The first shards, as many as hold ``limit`` samples."""
    kept: list[Shard] = []
    for shard in shards:
        if limit is not None and sum(map(len, kept)) >= limit:
            break
        kept.append(shard)
    return kept


def numbered(shards: Sequence[Shard]) -> list[Shard]:
    """The same shards, each with the position of its first sample."""
    first, found = 0, []
    for shard in shards:
        found.append(Shard(shard.path, shard.count, first))
        first += len(shard)
    return found


def order_of(
    counted: tuple[list[Shard], ...], limits: tuple[int | None, int | None]
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


def label_of(sample: dict[str, Any], shard: Shard) -> Label | None:
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
            f"data.path: the .{kind} of {where_of(sample, shard)} cannot be read ({error})"
        ) from error
    found = content if isinstance(content, dict) else {}
    label = next((found[key] for key in KEYS if key in found), None)
    if label is None and "json" in sample:
        return None
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(
            f"data.path: the label of {where_of(sample, shard)} is {label!r}; it must be a whole "
            "number or a name"
        )
    return label


def class_numbers(
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


def name_of(given: str) -> str:
    """What the data set is called: the folder of its shards."""
    path = Path(given).expanduser()
    return path.resolve().name if path.is_dir() else path.parent.resolve().name


def where_of(sample: dict[str, Any], shard: Shard) -> str:
    """What messages call a sample."""
    return f"sample '{sample['__key__']}' of shard '{shard.path}'"
