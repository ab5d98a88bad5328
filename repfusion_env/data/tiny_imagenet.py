"""Tiny ImageNet in the layout that it is handed out in: 200 classes, 64x64.

``train/<wnid>/images/*.JPEG``; ``val/images/*.JPEG`` with ``val/val_annotations.txt`` (file name,
wnid and a box in each line); ``words.txt`` (wnid and its names in each line). The images of
``test/`` have no labels and are not used.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.folder import (
    Listing,
    banks,
    class_folders,
    existing_folder,
    shuffled,
    some,
    visible_files,
)
from repfusion_env.data.text_files import text_of
from repfusion_env.registry import did_you_mean

FOLDER = "tiny-imagenet-200"
ANNOTATIONS = "val_annotations.txt"
WORDS = "words.txt"


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """100,000 training and 10,000 held-out images, 3x64x64, where all are there.

    Raises:
        ValueError: The folder lacks a part of the layout, an annotation names an unknown class or
            a file that is not there, or an image is damaged.
    """
    if config.path is None:
        raise ValueError(f"data.path: data.name 'tiny_imagenet' needs the folder {FOLDER}")
    root = existing_folder(config.path)
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise ValueError(
                f"data.path: '{root}' is not Tiny ImageNet: there is no folder '{part}'."
                f"{did_you_mean(part, class_folders(root))} Expected are train/<wnid>/images/ and "
                f"val/images/ with val/{ANNOTATIONS}"
            )
    wnids = class_folders(root / "train")
    if not wnids:
        raise ValueError(f"data.path: '{root / 'train'}' is empty; expected is a folder per class")
    listings = (shuffled(_train(root, wnids)), shuffled(_val(root, wnids)))
    return banks("tiny_imagenet", listings, _names(root, wnids), config)


def _train(root: Path, wnids: list[str]) -> Listing:
    listing: Listing = []
    for label, wnid in enumerate(wnids):
        folder = root / "train" / wnid / "images"
        files = visible_files(folder) if folder.is_dir() else []
        if not files:
            raise ValueError(f"data.path: there are no images in '{folder}'")
        listing += [(path, label) for path in files]
    return listing


def _val(root: Path, wnids: list[str]) -> Listing:
    table, folder = root / "val" / ANNOTATIONS, root / "val" / "images"
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    listing: Listing = []
    missing = []
    for number, fields in _lines(table):
        if len(fields) < 2 or fields[1] not in labels:
            wnid = fields[1] if len(fields) > 1 else ""
            raise ValueError(
                f"data.path: line {number} of '{table}' names the class '{wnid}', which has no "
                f"folder in train/.{did_you_mean(wnid, wnids)}"
            )
        path = folder / fields[0]
        if not path.is_file():
            missing.append(fields[0])
        listing.append((path, labels[fields[1]]))
    if missing:
        raise ValueError(f"data.path: '{folder}' lacks {some(missing)}")
    if not listing:
        raise ValueError(f"data.path: '{table}' is empty; expected is a line per image")
    return listing


def _names(root: Path, wnids: list[str]) -> tuple[str, ...]:
    """The first word of each class; its wnid where there is none, and beside a word of two."""
    if not (root / WORDS).is_file():
        return tuple(wnids)
    words = {fields[0]: fields[1] for _, fields in _lines(root / WORDS) if len(fields) > 1}
    first = [words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    often = Counter(first)
    return tuple(
        name if often[name] == 1 else f"{name} ({wnid})"
        for name, wnid in zip(first, wnids, strict=True)
    )


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """(number, tab-separated fields) of each line that holds something."""
    lines = enumerate(text_of(path).splitlines(), 1)
    return [(number, line.split("\t")) for number, line in lines if line.strip()]
