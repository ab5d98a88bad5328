"""A folder with one folder of images per class.

Either ``path/train/<class>/*`` with ``path/test/<class>/*`` (or ``val``), or ``path/<class>/*``, of
which a fixed random 20 % are held out. Images are decoded once into a bank; all are grey where all
files are grey, RGB otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.splits import permutation, resize, split

HELDOUT_FOLDERS = ("test", "val")
GREY_MODES = ("1", "L", "LA")
Listing = list[tuple[Path, int]]


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Decode the images under ``data.path``, in a fixed random order.

    Raises:
        ValueError: There is no such folder, a class or the whole is empty, a file is no image or
            truncated, the splits have other classes, or sizes are mixed without data.image_size.
    """
    if config.path is None:
        raise ValueError("data.path: data.name 'folder' needs a folder with one folder per class")
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.path: there is no folder '{root}'")
    heldout_root = next((root / name for name in HELDOUT_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and heldout_root is not None:
        classes = _classes(root / "train")
        other = _classes(heldout_root)
        if classes != other:
            differing = sorted(set(classes) ^ set(other))
            raise ValueError(
                f"data.path: '{root / 'train'}' and '{heldout_root}' must hold the same classes; "
                f"only one of them has {', '.join(differing)}"
            )
        listings = [_shuffled(_files(part, classes)) for part in (root / "train", heldout_root)]
    else:
        classes = _classes(root)
        files = _files(root, classes)
        if len(files) < 2:
            raise ValueError(f"data.path: '{root}' holds 1 image; at least 2 are needed")
        listings = [[files[index] for index in ids.tolist()] for ids in split(len(files))]
    limits = (config.train_limit, config.heldout_limit)
    listings = [listing[:limit] for listing, limit in zip(listings, limits, strict=True)]
    train, heldout = _decode(listings, config.image_size)
    labels = [torch.tensor([label for _, label in listing]) for listing in listings]
    name = root.resolve().name
    return (
        ImageBank(name, train, labels[0], classes),
        ImageBank(name, heldout, labels[1], classes),
    )


def _classes(root: Path) -> tuple[str, ...]:
    names = sorted(
        path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not names:
        raise ValueError(
            f"data.path: '{root}' is empty or holds no folders; expected is one folder of images "
            "per class"
        )
    return tuple(names)


def _files(root: Path, classes: Sequence[str]) -> Listing:
    """Every visible file of each class; none is skipped, so that a stray file is noticed."""
    listing: Listing = []
    for label, name in enumerate(classes):
        files = sorted(
            path
            for path in (root / name).iterdir()
            if path.is_file() and not path.name.startswith(".")
        )
        if not files:
            raise ValueError(f"data.path: the class folder '{root / name}' is empty")
        listing += [(path, label) for path in files]
    return listing


def _shuffled(listing: Listing) -> Listing:
    # Sorted by class, the first images (data.train_limit) would all be of one class.
    return [listing[index] for index in permutation(len(listing)).tolist()]


def _decode(listings: Sequence[Listing], side: int | None) -> list[Tensor]:
    """Pixels of each listing, uint8 (M, C, H, W), all of one shape."""
    paths = [[path for path, _ in listing] for listing in listings]
    decoded = [[_pixels(path, side) for path in part] for part in paths]
    everything = [image for part in decoded for image in part]
    grey = all(len(image) == 1 for image in everything)
    first_path, first = paths[0][0], everything[0]
    for part, images in zip(paths, decoded, strict=True):
        for path, image in zip(part, images, strict=True):
            if image.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"data.path: images of mixed size: '{first_path}' is {_size(first)} and "
                    f"'{path}' is {_size(image)} (width x height); data.image_size resizes them"
                )
    return [
        torch.stack([image if grey else image.expand(3, -1, -1) for image in part])
        for part in decoded
    ]


def _pixels(path: Path, side: int | None) -> Tensor:
    try:
        with Image.open(path) as image:
            mode = "L" if image.mode in GREY_MODES else "RGB"
            array = np.array(image.convert(mode))
    except UnidentifiedImageError as error:
        raise ValueError(f"data.path: '{path}' is not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"data.path: '{path}' is truncated or damaged ({error})") from error
    pixels = torch.from_numpy(array)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return pixels if side is None else resize(pixels, side)


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"
