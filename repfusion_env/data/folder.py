"""A folder of images: with one folder per class, or of any shape without classes.

Either ``path/train/...`` with ``path/test/...`` (or ``val``), or ``path/...``, of which a fixed
random 20 % are held out. Where each folder at the top holds images these are the classes.
Otherwise, flat or nested, the images are unlabelled: all of one class
(:data:`repfusion_env.data.bank.UNLABELLED`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.data.decode import SUFFIXES, decode_files
from repfusion_env.data.splits import permutation, split
from repfusion_env.data.streamed_files import streamed_banks
from repfusion_env.data.unreadable import Unreadable
from repfusion_env.registry import did_you_mean

HELDOUT_FOLDERS = ("test", "val")
MOST_NAMES = 5
Listing = list[tuple[Path, int]]


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Decode the images under ``data.path``, in a fixed random order.

    Raises:
        ValueError: There is no such folder, a class or the whole is empty, a file is no image or
            truncated, the splits have other classes, sizes are mixed without data.image_size, or
            the images do not fit into memory.
    """
    if config.path is None:
        raise ValueError("data.path: data.name 'folder' needs a folder of images")
    root = existing_folder(config.path)
    heldout_root = next((root / name for name in HELDOUT_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and heldout_root is not None:
        roots = (root / "train", heldout_root)
        classes = _telling(_same_classes(*roots))
        parts = [shuffled(_files(part, classes)) for part in roots]
    else:
        classes = _telling(_classes(root))
        files = _files(root, classes)
        if len(files) < 2:
            raise ValueError(f"data.path: '{root}' holds 1 image; at least 2 are needed")
        parts = [[files[index] for index in ids.tolist()] for ids in split(len(files))]
    return banks(root.resolve().name, (parts[0], parts[1]), classes, config)


def existing_folder(given: str) -> Path:
    """The folder; refused with the closest of its neighbours where there is none."""
    root = Path(given).expanduser()
    if not root.is_dir():
        beside = root.parent.iterdir() if root.parent.is_dir() else []
        names = [path.name for path in beside if path.is_dir()]
        raise ValueError(f"data.path: there is no folder '{root}'.{did_you_mean(root.name, names)}")
    return root


def banks(
    name: str, listings: tuple[Listing, Listing], classes: tuple[str, ...], config: DataConfig
) -> tuple[ImageBank, ImageBank]:
    """(path, label) listings, no more of them than the configuration's limits, as banks.

    All are decoded; under ``data.storage: stream`` the held-out ones alone.
    """
    train, heldout = listings[0][: config.train_limit], listings[1][: config.heldout_limit]
    if config.storage == "stream":
        return streamed_banks(name, (train, heldout), classes, config)
    unreadable = Unreadable(len(train) + len(heldout), config.skip_unreadable, name)
    paths = ([path for path, _ in train], [path for path, _ in heldout])
    parts = decode_files(name, paths, config, unreadable)
    labels = [torch.tensor([label for _, label in listing]) for listing in (train, heldout)]
    first, second = (
        ImageBank(
            name,
            part.tensors[0],
            labels[index][part.kept],
            classes,
            skipped=unreadable.listed(index),
        )
        for index, part in enumerate(parts)
    )
    unreadable.report()
    return first, second


def shuffled(listing: Listing) -> Listing:
    """The listing in a fixed random order."""
    # Sorted by class, the first images (data.train_limit) would all be of one class.
    return [listing[index] for index in permutation(len(listing)).tolist()]


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def class_folders(root: Path) -> list[str]:
    """Names of the visible folders in ``root``, sorted."""
    return sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and not _hidden(entry.name)
    )


def visible_files(folder: Path) -> list[Path]:
    """Every visible file directly in ``folder``, sorted; none is skipped for its name."""
    entries = [entry for entry in os.scandir(folder) if entry.is_file()]
    return sorted(Path(entry.path) for entry in entries if not _hidden(entry.name))


def _same_classes(train: Path, heldout: Path) -> tuple[str, ...]:
    classes, other = _classes(train), _classes(heldout)
    if classes == other:
        return classes
    if UNLABELLED in (classes, other):
        flat, labelled = (train, heldout) if classes == UNLABELLED else (heldout, train)
        raise ValueError(
            f"data.path: '{flat}' has no class folders, but '{labelled}' has; both must have them, "
            "or neither"
        )
    differing = sorted(set(classes) ^ set(other))
    against = other if differing[0] in classes else classes
    raise ValueError(
        f"data.path: '{train}' and '{heldout}' must hold the same classes; "
        f"only one of them has {some(differing)}.{did_you_mean(differing[0], against)}"
    )


def _classes(root: Path) -> tuple[str, ...]:
    """The classes, or :data:`UNLABELLED` where the folders are none."""
    if any(_is_image(path) for path in visible_files(root)):
        return UNLABELLED
    names = class_folders(root)
    if not names:
        raise ValueError(
            f"data.path: '{root}' is empty or holds no folders; expected are images, or one folder "
            "of images per class"
        )
    empty = [name for name in names if not visible_files(root / name)]
    if any(next(images_under(root / name), None) for name in empty):
        return UNLABELLED
    return tuple(names)


def _telling(classes: tuple[str, ...]) -> tuple[str, ...]:
    """One folder around all images tells nothing about them."""
    return classes if len(classes) > 1 else UNLABELLED


def _files(root: Path, classes: Sequence[str]) -> Listing:
    """Every visible file of each class, so that a stray one is noticed; or all images."""
    if tuple(classes) == UNLABELLED:
        listing = [(path, 0) for path in sorted(images_under(root))]
        if not listing:
            raise ValueError(
                f"data.path: '{root}' holds no images; known by their names are "
                f"{', '.join(SUFFIXES)}"
            )
        return listing
    listing = []
    for label, name in enumerate(classes):
        files = visible_files(root / name)
        if not files:
            raise ValueError(f"data.path: the class folder '{root / name}' is empty")
        listing += [(path, label) for path in files]
    return listing


def images_under(root: Path) -> Iterator[Path]:
    """Images at any depth, by their suffixes; what else lies there is left alone."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _hidden(name)]
        for name in names:
            if not _hidden(name) and _is_image(Path(name)):
                yield Path(folder) / name


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _hidden(name: str) -> bool:
    return name.startswith(".")
