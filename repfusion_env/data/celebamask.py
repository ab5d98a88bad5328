"""CelebAMask-HQ in the layout that it is handed out in: 30,000 faces, 19 classes.

``CelebA-HQ-img/<n>.jpg`` (1024x1024); ``CelebAMask-HQ-mask-anno/<n // 2000>/<n>_<part>.png``, a
white shape for each part that a face has (512x512, the number in five digits);
``CelebA-HQ-to-CelebA-mapping.txt``, from which the split of CelebA follows.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.decode import sentences, size_of
from repfusion_env.data.folder import class_folders, existing_folder
from repfusion_env.data.mask_files import Masked, masked_banks
from repfusion_env.data.text_files import text_of
from repfusion_env.registry import did_you_mean

FOLDER = "CelebAMask-HQ"
IMAGES, MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
# In the order in which the data set's own tools draw them: a later part covers an earlier one.
PARTS = (
    *("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth"),
    *("u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
CLASSES = ("background", *PARTS)
MASKS_PER_FOLDER = 2000
MASK_SIDE = 512
# Numbers in CelebA from which validation and test begin, as the data set's own tools split it.
VALIDATION, TEST = 162_771, 182_638
Parts = tuple[tuple[int, Path], ...]


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """24,183 training and 2,824 held-out (test) faces with masks, where all are there.

    The 2,993 faces for validation are not used. Without ``data.image_size`` images have the
    masks' size, 512x512. A mirrored left eye becomes a right one, and likewise brows and ears.

    Raises:
        ValueError: The folder lacks a part of the layout, the mapping is broken, or a face has no
            mask or damaged files.
    """
    if config.path is None:
        raise ValueError(f"data.path: data.name 'celebamask' needs the folder {FOLDER}")
    root = existing_folder(config.path)
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    for part in (IMAGES, MASKS):
        if not (root / part).is_dir():
            raise ValueError(
                f"data.path: '{root}' is not CelebAMask-HQ: there is no folder '{part}'."
                f"{did_you_mean(part, class_folders(root))} Expected are {IMAGES}, {MASKS} and "
                f"{MAPPING}"
            )
    train, test = _split(root / MAPPING)
    # Limited, the folders of later masks need not be looked through.
    train, test = train[: config.train_limit], test[: config.heldout_limit]
    parts = _parts(root / MASKS, sorted({number // MASKS_PER_FOLDER for number in train + test}))
    jobs = tuple([_job(root, number, parts) for number in numbers] for numbers in (train, test))
    if config.image_size is None:
        config = replace(config, image_size=MASK_SIDE)
    if config.channels is None:
        config = replace(config, channels=3)
    return masked_banks("celebamask", (jobs[0], jobs[1]), config, CLASSES, any_size=True)


def merged(parts: Parts, where: str) -> np.ndarray:
    """One mask from a face's parts, uint8 (H, W); of parts that overlap the last one stays.

    Args:
        parts: Class and file of each, in the order of the classes.
        where: Whose they are, for messages.

    Raises:
        ValueError: There is none, one is damaged, or they differ in size.
    """
    if not parts:
        raise ValueError(
            f"data.path: there is no {where}; expected is a file for each part, such as _skin.png"
        )
    mask: np.ndarray | None = None
    for label, path in parts:
        with sentences(f"the mask '{path}'"), Image.open(path) as image:
            # Saved as RGB, of which all channels are the same.
            drawn = np.asarray(image.getchannel(0)) != 0
        if mask is None:
            mask = np.zeros(drawn.shape, np.uint8)
        if mask.shape != drawn.shape:
            raise ValueError(
                f"data.path: the mask '{path}' is {size_of(drawn.shape[::-1])}, but "
                f"'{parts[0][1].name}' is {size_of(mask.shape[::-1])} (width x height)"
            )
        mask[drawn] = label
    assert mask is not None
    return mask


def _job(root: Path, number: int, parts: dict[int, dict[str, Path]]) -> Masked:
    found = parts.get(number, {})
    ordered = tuple((label, found[part]) for label, part in enumerate(PARTS, 1) if part in found)
    files = root / MASKS / str(number // MASKS_PER_FOLDER) / f"{number:05d}_*.png"
    where = f"mask '{files}'"
    return Masked(root / IMAGES / f"{number}.jpg", partial(merged, ordered, where), f"its {where}")


def _parts(root: Path, folders: list[int]) -> dict[int, dict[str, Path]]:
    """Files of the parts by the face's number and the part's name."""
    found: dict[int, dict[str, Path]] = {}
    unknown: list[str] = []
    for folder in folders:
        if not (root / str(folder)).is_dir():
            continue
        with os.scandir(root / str(folder)) as entries:
            for entry in entries:
                digits, _, part = entry.name.removesuffix(".png").partition("_")
                if not entry.name.endswith(".png") or not digits.isdigit():
                    continue
                if part not in PARTS:
                    unknown.append(entry.path)
                found.setdefault(int(digits), {})[part] = Path(entry.path)
    if unknown:
        part = Path(min(unknown)).stem.partition("_")[2]
        raise ValueError(
            f"data.path: '{min(unknown)}' is a mask of no known part.{did_you_mean(part, PARTS)} "
            f"Allowed: {', '.join(PARTS)}"
        )
    return found


def _split(path: Path) -> tuple[list[int], list[int]]:
    """Numbers of the training and of the test faces."""
    lines = text_of(path, "which says which faces are held out").splitlines()
    train, test = [], []
    for line_number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields or fields[0] == "idx":
            continue
        if len(fields) < 2 or not (fields[0].isdigit() and fields[1].isdigit()):
            raise ValueError(
                f"data.path: line {line_number} of '{path}' is '{line.strip()}'; expected are the "
                "face's number, its number in CelebA and its file there"
            )
        number, original = int(fields[0]), int(fields[1])
        if original < VALIDATION:
            train.append(number)
        elif original >= TEST:
            test.append(number)
    for numbers, which in ((train, "for training"), (test, "for testing")):
        if not numbers:
            raise ValueError(f"data.path: '{path}' names no faces {which}")
    return train, test
