"""Folders of images and of index masks: ``images/`` and ``masks/``, matched by name.

The split is on disk, ``train/images/`` and ``val/images/`` (or ``images/train/`` and
``images/val/``; held-out are also called ``test`` or ``validation``, training ``training``), or a
fixed random 20 % are held out. Masks may lie in ``labels/`` or ``annotations/`` instead: PNG with
an id in each pixel, 255 where it does not count, named as its image is. ``classes.txt`` names the
ids, one in each line from 0 on; without it they are numbered.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.folder import class_folders, existing_folder, images_under
from repfusion_env.data.mask_files import Masked, index_mask, masked_banks
from repfusion_env.data.splits import permutation, split
from repfusion_env.data.text_files import class_names
from repfusion_env.registry import did_you_mean

IMAGES = "images"
MASKS = ("masks", "labels", "annotations")
TRAIN = ("train", "training")
HELDOUT = ("test", "val", "validation")
CLASS_NAMES = "classes.txt"
# Images and masks of one split.
Folders = tuple[Path, Path]


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Decode images and masks under ``data.path``, in a fixed random order.

    Raises:
        ValueError: The folder has another layout, there are no images, an image has no mask or one
            of another size, an id is outside the classes, or files are damaged.
    """
    if config.path is None:
        raise ValueError(
            "data.path: data.name 'mask_folder' needs a folder that holds images/ and masks/"
        )
    root = existing_folder(config.path)
    named = root / CLASS_NAMES
    classes = class_names(named) if named.is_file() else None
    train, heldout = _folders(root)
    jobs = _jobs(train)
    if heldout is not None:
        parts = [_taken(jobs, permutation(len(jobs)).tolist())]
        jobs = _jobs(heldout)
        parts.append(_taken(jobs, permutation(len(jobs)).tolist()))
    elif len(jobs) < 2:
        raise ValueError(f"data.path: '{root}' holds 1 image; at least 2 are needed")
    else:
        parts = [_taken(jobs, ids.tolist()) for ids in split(len(jobs))]
    return masked_banks(root.resolve().name, (parts[0], parts[1]), config, classes)


def _folders(root: Path) -> tuple[Folders, Folders | None]:
    """Where training images lie, and where held-out ones do; None: among the others."""
    split_above = _named(root, TRAIN), _named(root, HELDOUT)
    if split_above[0] and split_above[1]:
        return _pair(split_above[0]), _pair(split_above[1])
    images, masks = _pair(root)
    train, heldout = _named(images, TRAIN), _named(images, HELDOUT)
    if train and heldout:
        return (train, masks / train.name), (heldout, masks / heldout.name)
    return (images, masks), None


def _pair(root: Path) -> Folders:
    masks = _named(root, MASKS)
    if masks is None or not (root / IMAGES).is_dir():
        missing = IMAGES if masks else MASKS[0]
        raise ValueError(
            f"data.path: '{root}' has no folder '{missing}'."
            f"{did_you_mean(missing, class_folders(root))} Expected are {IMAGES}/ and "
            f"{'/, '.join(MASKS)}/, or both in train/ and val/"
        )
    return root / IMAGES, masks


def _named(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _jobs(folders: Folders) -> list[Masked]:
    images, masks = folders
    if not masks.is_dir():
        raise ValueError(f"data.path: there is no folder '{masks}' beside '{images}'")
    found: dict[Path, Path] = {}
    for path in sorted(images_under(masks)):
        key = path.relative_to(masks).with_suffix("")
        if key in found:
            raise ValueError(
                f"data.path: '{found[key]}' and '{path}' are masks of one image; one is expected"
            )
        found[key] = path
    jobs = []
    for image in sorted(images_under(images)):
        key = image.relative_to(images).with_suffix("")
        mask = found.get(key)
        read = partial(index_mask, mask) if mask else partial(_missing, image, masks / key, found)
        jobs.append(Masked(image, read, f"the mask '{mask}'"))
    if not jobs:
        raise ValueError(f"data.path: '{images}' holds no images")
    return jobs


def _missing(image: Path, mask: Path, found: dict[Path, Path]) -> np.ndarray:
    raise ValueError(
        f"data.path: the image '{image}' has no mask; expected is '{mask}.png'."
        f"{did_you_mean(mask.name, [path.stem for path in found.values()])}"
    )


def _taken(jobs: list[Masked], order: list[int]) -> list[Masked]:
    return [jobs[index] for index in order]
