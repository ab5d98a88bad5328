"""WFLW in the layout that it is handed out in: 7,500 + 2,500 faces with 98 points each.

``WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_{train,test}.txt`` and
``WFLW_images/``. A line is a face: x and y of 98 points, left, top, right and bottom that a face
detector found, six attributes (0 or 1), and the image's name. Wu et al., "Look at Boundary", CVPR
2018 (arXiv:1805.10483).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.faces import Face, banks
from repfusion_env.data.folder import class_folders, existing_folder
from repfusion_env.data.splits import permutation
from repfusion_env.data.squares import asked_size, inside
from repfusion_env.registry import did_you_mean

POINTS = 98
ATTRIBUTES = ("pose", "expression", "illumination", "makeup", "occlusion", "blur")
LISTS = ("list_98pt_rect_attr_train.txt", "list_98pt_rect_attr_test.txt")
LIST_FOLDERS = (
    "WFLW_annotations/list_98pt_rect_attr_train_test",
    *("list_98pt_rect_attr_train_test", "WFLW_annotations", "annotations", ""),
)
IMAGE_FOLDERS = ("WFLW_images", "images", "")
ENTRIES = 2 * POINTS + 4 + len(ATTRIBUTES) + 1


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Training and test faces, cut out, with ``keypoints``.

    ``data.subset`` names an attribute: only test faces that have it are held out then.

    Raises:
        ValueError: The folder lacks a part of the layout, the attribute is unknown, no side is
            configured, or more faces than may be left out are annotated wrongly.
    """
    if config.path is None:
        raise ValueError("data.path: data.name 'wflw' needs the folder that holds WFLW_images")
    if config.subset is not None and config.subset not in ATTRIBUTES:
        raise ValueError(
            f"data.subset: WFLW has no attribute '{config.subset}'."
            f"{did_you_mean(config.subset, ATTRIBUTES)} Allowed: {', '.join(ATTRIBUTES)}"
        )
    asked_size(config)
    root = existing_folder(config.path)
    lists = next((root / name for name in LIST_FOLDERS if (root / name / LISTS[0]).is_file()), None)
    if lists is None or not (lists / LISTS[1]).is_file():
        lacking = LISTS[0] if lists is None else LISTS[1]
        folders = class_folders(root)
        raise ValueError(
            f"data.path: '{root}' is not WFLW: there is no {lacking} in it."
            f"{did_you_mean('WFLW_annotations', folders) if lists is None else ''} Expected are "
            f"{LIST_FOLDERS[0]}/{LISTS[0]}, {LISTS[1]} beside it, and WFLW_images/"
        )
    images = next(root / name for name in IMAGE_FOLDERS if (root / name).is_dir())
    train = _faces(lists / LISTS[0], images, None)
    heldout = _faces(lists / LISTS[1], images, config.subset)
    return banks("wflw", (train, heldout), config)


def _faces(path: Path, images: Path, attribute: str | None) -> list[Face | str]:
    """The faces of a list in a fixed random order; a sentence for a line that is no face."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.path: '{path}' cannot be read as text ({error})") from error
    faces: list[Face | str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            face, attributes = _face(line, f"line {number} of '{path}'", images)
        except ValueError as error:
            faces.append(str(error))
            continue
        if attribute is None or attributes[ATTRIBUTES.index(attribute)]:
            faces.append(face)
    if not faces:
        what = f"no face with the attribute '{attribute}'" if attribute else "no line"
        raise ValueError(f"data.path: '{path}' holds {what}; expected is a line per face")
    # Neighbouring lines are of one event, so that the first ones would look alike.
    return [faces[index] for index in permutation(len(faces)).tolist()]


def _face(line: str, where: str, images: Path) -> tuple[Face, list[bool]]:
    entries = line.split(maxsplit=ENTRIES - 1)
    if len(entries) != ENTRIES:
        raise ValueError(
            f"data.path: {where} has {len(entries)} entries; expected are {ENTRIES}: x and y of "
            f"{POINTS} points, 4 of the face's box, {len(ATTRIBUTES)} attributes, and the image"
        )
    try:
        values = np.array(entries[:-1], np.float64)
    except ValueError as error:
        wrong = next(entry for entry in entries[:-1] if not _is_number(entry))
        raise ValueError(
            f"data.path: {where} holds '{wrong}' where a number is expected"
        ) from error
    points, box, flags = values[: 2 * POINTS], values[2 * POINTS : -6], values[-6:]
    if not np.isin(flags, (0, 1)).all():
        raise ValueError(
            f"data.path: {where} has the attributes {' '.join(entries[-7:-1])}; each must be 0 or 1"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"data.path: {where} holds a point that is no finite number")
    left, top, right, bottom = box.tolist()
    face = Face(
        inside(images, entries[-1].strip(), where),
        where,
        torch.from_numpy(points.reshape(POINTS, 2)).float(),
        (left, top, right, bottom),
    )
    return face, flags.astype(bool).tolist()


def _is_number(entry: str) -> bool:
    try:
        float(entry)
    except ValueError:
        return False
    return True
