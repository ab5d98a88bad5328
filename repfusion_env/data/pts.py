"""Images with their points in a ``.pts`` file beside each, as 300W is handed out.

Such a file holds ``version: 1``, ``n_points: 68`` and, in braces, a line with x and y per point;
``nan nan`` where it is not known where the point is. The centre of the first pixel is (1, 1) there,
as in Matlab.

Which images are held out is said by the folders on the way to them: ``test``, ``testset``, ``val``
and, of 300W, ``ibug``; ``train``, ``trainset`` and ``afw`` are for training. Without any of them a
fixed random 20 % are held out.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.decode import SUFFIXES
from repfusion_env.data.faces import Face, banks
from repfusion_env.data.folder import existing_folder
from repfusion_env.data.splits import permutation, split
from repfusion_env.data.squares import asked_size
from repfusion_env.registry import did_you_mean

SUFFIX = ".pts"
TRAIN = ("train", "trainset", "afw")
HELDOUT = ("test", "testset", "val", "ibug")
# 300W's own names for parts of its test images.
SUBSETS = {"common": ("helen", "lfpw"), "challenging": ("ibug",)}


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Training and held-out faces, cut out, with ``keypoints``.

    ``data.subset`` holds out only images below a folder of this name, or 300W's ``common`` or
    ``challenging`` ones.

    Raises:
        ValueError: There is no such folder, or no points in it; only some images lie in folders of
            a split; no side is configured; or more faces than may be left out lack their points or
            their image, or are annotated wrongly.
    """
    if config.path is None:
        raise ValueError("data.path: data.name 'pts' needs a folder of images and .pts files")
    asked_size(config)
    root = existing_folder(config.path)
    stems = _stems(root)
    if not any(suffix == SUFFIX for files in stems.values() for suffix in files):
        raise ValueError(
            f"data.path: '{root}' holds no {SUFFIX} files; expected is one beside each image, with "
            "the same name"
        )
    train, heldout = _split(root, list(stems))
    if config.subset is not None:
        heldout = _subset(root, heldout, config.subset)
    # What is not read cannot be wrong, so the limits come first.
    parts = [train[: config.train_limit], heldout[: config.heldout_limit]]
    read = [[_face(stem, stems[stem]) for stem in part] for part in parts]
    count = _common_count([*read[0], *read[1]])
    faces = [[_with_count(face, count) for face in part] for part in read]
    return banks(root.resolve().name, (faces[0], faces[1]), config)


def _stems(root: Path) -> dict[Path, dict[str, Path]]:
    """Files by their path without its suffix: the points, and the image, of each face; sorted."""
    stems: dict[Path, dict[str, Path]] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder) / name for name in names if not name.startswith(".")):
            suffix = path.suffix.lower()
            if suffix == SUFFIX or suffix in SUFFIXES:
                stems.setdefault(path.with_suffix(""), {})[suffix] = path
    return dict(sorted(stems.items()))


def _split(root: Path, stems: list[Path]) -> tuple[list[Path], list[Path]]:
    sides = [_side(stem.relative_to(root)) for stem in stems]
    if set(sides) == {None}:
        if len(stems) < 2:
            raise ValueError(f"data.path: '{root}' holds 1 image; at least 2 are needed")
        first, second = split(len(stems))
        return [stems[index] for index in first], [stems[index] for index in second]
    parts = [[stem for stem, own in zip(stems, sides, strict=True) if own == part] for part in "th"]
    lost = [stem for stem, own in zip(stems, sides, strict=True) if own is None]
    folders = f"{', '.join(TRAIN)} for training; {', '.join(HELDOUT)} held out"
    if lost:
        raise ValueError(
            f"data.path: '{lost[0]}' lies in no folder that says whether it is held out, but "
            f"others do; known are {folders}"
        )
    for part, which in zip(parts, ("for training", "held out"), strict=True):
        if not part:
            raise ValueError(
                f"data.path: by their folders none of the images in '{root}' is {which}; known are "
                f"{folders}"
            )
    train, heldout = ([part[index] for index in permutation(len(part)).tolist()] for part in parts)
    return train, heldout


def _side(path: Path) -> str | None:
    """Of the innermost folder that says so: ``t`` for training, ``h`` for held out."""
    for folder in reversed(path.parts[:-1]):
        if folder.lower() in TRAIN:
            return "t"
        if folder.lower() in HELDOUT:
            return "h"
    return None


def _subset(root: Path, heldout: list[Path], name: str) -> list[Path]:
    folders = {
        stem: {part.lower() for part in stem.relative_to(root).parts[:-1]} for stem in heldout
    }
    wanted = set(SUBSETS.get(name, (name.lower(),)))
    found = [stem for stem in heldout if folders[stem] & wanted]
    if not found:
        there = sorted(set().union(*folders.values()))
        known = [*SUBSETS, *there]
        raise ValueError(
            f"data.subset: no held-out image lies in a folder '{name}'.{did_you_mean(name, known)} "
            f"There are {', '.join(there) or 'no folders'}"
        )
    return found


def _face(stem: Path, files: dict[str, Path]) -> Face | str:
    images = [path for suffix, path in sorted(files.items()) if suffix != SUFFIX]
    if SUFFIX not in files:
        return (
            f"data.path: the image '{images[0]}' has no points; expected is '{stem.name}{SUFFIX}' "
            "beside it"
        )
    if len(images) != 1:
        beside = f"there are {len(images)}" if images else "there is none"
        return (
            f"data.path: '{files[SUFFIX]}' needs one image '{stem.name}' beside it "
            f"({', '.join(SUFFIXES[:4])}, ...), but {beside}"
        )
    try:
        return Face(images[0], f"'{files[SUFFIX]}'", _points(files[SUFFIX]))
    except ValueError as error:
        return str(error)


def _points(path: Path) -> Tensor:
    """(P, 2), between the centres of pixels that are counted from 0."""
    expected = "expected are 'n_points: P' and, in braces, a line with x and y for each of P points"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.path: '{path}' cannot be read as text ({error})") from error
    head, opening, rest = text.partition("{")
    body, closing, _ = rest.partition("}")
    if not opening or not closing:
        raise ValueError(f"data.path: '{path}' holds no points between braces; {expected}")
    counts = [line.split(":", 1)[1] for line in head.splitlines() if line.startswith("n_points")]
    lines = [line.split() for line in body.splitlines() if line.strip()]
    if not lines or (counts and counts[0].strip() != str(len(lines))):
        said = f" but says n_points: {counts[0].strip()}" if counts else ""
        raise ValueError(f"data.path: '{path}' holds {len(lines)} points{said}; {expected}")
    places = []
    for number, line in enumerate(lines):
        try:
            x, y = map(float, line)
            if math.isinf(x) or math.isinf(y):
                raise ValueError("infinite")
        except ValueError as error:
            raise ValueError(
                f"data.path: '{path}' has '{' '.join(line)}' as point {number}; {expected}"
            ) from error
        places.append((x, y))
    # Matlab's first pixel is 1.
    return torch.tensor(places) - 1.0


def _common_count(faces: list[Face | str]) -> int:
    counts = Counter(len(face.points) for face in faces if isinstance(face, Face))
    return counts.most_common(1)[0][0] if counts else 0


def _with_count(face: Face | str, count: int) -> Face | str:
    """The face, or what is wrong with it where it has other points than most."""
    if isinstance(face, str) or len(face.points) == count:
        return face
    return (
        f"data.path: {face.where} has {len(face.points)} points, but most of the files have "
        f"{count}; all must have the same"
    )
