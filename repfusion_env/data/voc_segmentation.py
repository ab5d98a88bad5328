"""Pascal VOC's segmentation, in the layout that torchvision's VOCSegmentation has: 21 classes.

``VOCdevkit/VOC2012/`` with ``JPEGImages/<id>.jpg``, ``SegmentationClass/<id>.png`` (ids as indices
of a palette, 255 around the objects) and ``ImageSets/Segmentation/{train,val}.txt`` (an id in each
line).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.downloads import fetched
from repfusion_env.data.folder import existing_folder
from repfusion_env.data.mask_files import Masked, index_mask, masked_banks
from repfusion_env.data.splits import permutation
from repfusion_env.data.text_files import text_of

DEVKIT, NEWEST = "VOCdevkit", "VOC2012"
IMAGES, MASKS, LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """1,464 training and 1,449 held-out (val) images of VOC 2012 with masks, RGB.

    Raises:
        ValueError: The folder lacks a part of the layout, a list is empty or broken, a mask has an
            id that is none of the 21, or files are missing or damaged.
    """
    if config.path is None:
        raise ValueError(f"data.path: data.name 'voc_segmentation' needs the folder {DEVKIT}")
    given = Path(config.path).expanduser()
    if config.download and _year(given) is None:
        fetched("Pascal VOC 2012", given, partial(_download, given))
    root = _year(existing_folder(config.path))
    if root is None:
        raise ValueError(
            f"data.path: '{given}' does not hold Pascal VOC's segmentation; expected is "
            f"'{given / DEVKIT / NEWEST}' with {IMAGES}, {MASKS} and {LISTS}/train.txt, and "
            "data.download true fetches it"
        )
    train, val = (_listing(root, root / LISTS / f"{part}.txt") for part in ("train", "val"))
    return masked_banks("voc_segmentation", (train, val), config, CLASSES)


def _year(given: Path) -> Path | None:
    """The folder of one year: the one given, else the newest in or under it."""
    under = [given, *(sorted(given.glob("VOC20[0-9][0-9]"), reverse=True))]
    under += sorted((given / DEVKIT).glob("VOC20[0-9][0-9]"), reverse=True)
    return next((folder for folder in under if (folder / LISTS).is_dir()), None)


def _download(root: Path) -> None:
    from torchvision.datasets import VOCSegmentation

    VOCSegmentation(str(root), year=NEWEST.removeprefix("VOC"), download=True)


def _listing(root: Path, path: Path) -> list[Masked]:
    """The images of a list, in a fixed random order, so that the first are of many classes."""
    names = text_of(path).split()
    if not names:
        raise ValueError(f"data.path: '{path}' is empty; expected is an image's name in each line")
    listing = []
    for name in (names[index] for index in permutation(len(names)).tolist()):
        mask = root / MASKS / f"{name}.png"
        listing.append(
            Masked(root / IMAGES / f"{name}.jpg", partial(index_mask, mask), f"the mask '{mask}'")
        )
    return listing
