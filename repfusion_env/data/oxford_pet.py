"""Oxford-IIIT Pet, in the layout that torchvision's OxfordIIITPet has: 37 breeds, and trimaps.

``oxford-iiit-pet/`` with ``images/<id>.jpg``, ``annotations/trimaps/<id>.png`` (1 the pet, 2 the
background, 3 the border between them, which was not judged) and
``annotations/{trainval,test}.txt`` (id, breed, species and the breed's number in its species in
each line).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from repfusion_env.config import DataConfig
from repfusion_env.data.annotations import IGNORE
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.downloads import fetched
from repfusion_env.data.folder import existing_folder
from repfusion_env.data.mask_files import Masked, index_mask, masked_banks
from repfusion_env.data.splits import permutation
from repfusion_env.data.text_files import text_of

FOLDER, IMAGES, ANNOTATIONS = "oxford-iiit-pet", "images", "annotations"
CLASSES = ("background", "pet")
# Ids of the trimaps as ours; 0 is none of them.
PET, BACKGROUND, BORDER = 1, 2, 3
Named = list[tuple[str, int]]


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """3,680 training and 3,669 held-out images with masks and breeds, RGB.

    The border does not count (:data:`repfusion_env.data.annotations.IGNORE`).

    Raises:
        ValueError: The folder lacks a part of the layout, a list is empty or broken, a trimap has
            an id other than 1, 2 and 3, or files are missing or damaged.
    """
    if config.path is None:
        raise ValueError(f"data.path: data.name 'oxford_pet' needs the folder {FOLDER}")
    given = Path(config.path).expanduser()
    if config.download and not (_root(given) / ANNOTATIONS / "test.txt").is_file():
        fetched("Oxford-IIIT Pet", given, partial(_download, given))
    root = _root(existing_folder(config.path))
    if not (root / IMAGES).is_dir() or not (root / ANNOTATIONS / "trimaps").is_dir():
        raise ValueError(
            f"data.path: '{given}' does not hold Oxford-IIIT Pet; expected is '{root / IMAGES}' "
            f"beside {ANNOTATIONS} with trimaps, trainval.txt and test.txt, and data.download true "
            "fetches it"
        )
    train, test = (_lines(root / ANNOTATIONS / f"{part}.txt") for part in ("trainval", "test"))
    breeds = _breeds(train + test)
    return masked_banks(
        "oxford_pet", (_listing(root, train), _listing(root, test)), config, CLASSES, labels=breeds
    )


def trimap(path: Path) -> np.ndarray:
    """Ids as ours, uint8 (H, W).

    Raises:
        ValueError: It cannot be read, or holds another id.
    """
    given = index_mask(path)
    ids = np.full(given.shape, IGNORE, np.uint8)
    ids[given == BACKGROUND] = CLASSES.index("background")
    ids[given == PET] = CLASSES.index("pet")
    strange = given[(given < PET) | (given > BORDER)]
    if strange.size:
        raise ValueError(
            f"data.path: the mask '{path}' holds the id {strange[0]} in {strange.size:,} pixels; "
            "allowed: 1 (pet), 2 (background) and 3 (border)"
        )
    return ids


def _root(given: Path) -> Path:
    """The folder given where it holds the images, else that of torchvision in it."""
    return given if (given / IMAGES).is_dir() else given / FOLDER


def _download(root: Path) -> None:
    from torchvision.datasets import OxfordIIITPet

    OxfordIIITPet(str(root), download=True)


def _lines(path: Path) -> Named:
    """(id, breed's number from 0) of each line; lines that begin with # are remarks."""
    found: Named = []
    for number, line in enumerate(text_of(path).splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        if len(fields) < 2 or not fields[1].isdigit() or int(fields[1]) < 1:
            raise ValueError(
                f"data.path: line {number} of '{path}' is '{line.strip()}'; expected are an "
                "image's name, the number of its breed from 1, its species and the number there"
            )
        found.append((fields[0], int(fields[1]) - 1))
    if not found:
        raise ValueError(f"data.path: '{path}' is empty; expected is a line per image")
    return found


def _breeds(lines: Named) -> tuple[str, ...]:
    """Names of the breeds, of which the images' names are made: ``great_pyrenees_12``."""
    names = {breed: name.rpartition("_")[0].replace("_", " ").title() for name, breed in lines}
    return tuple(names.get(breed, str(breed)) for breed in range(max(names) + 1))


def _listing(root: Path, lines: Named) -> list[Masked]:
    """In a fixed random order, so that the first images are of several breeds."""
    listing = []
    for name, breed in (lines[index] for index in permutation(len(lines)).tolist()):
        mask = root / ANNOTATIONS / "trimaps" / f"{name}.png"
        image = root / IMAGES / f"{name}.jpg"
        listing.append(Masked(image, partial(trimap, mask), f"the mask '{mask}'", breed))
    return listing
