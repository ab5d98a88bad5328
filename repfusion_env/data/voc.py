"""Pascal VOC and data sets in its layout: boxes in one XML file per image.

``Annotations/*.xml``, ``JPEGImages/`` and ``ImageSets/Main/{train,val,trainval,test}.txt``, in
``data.path`` itself, or in one or several folders below it (``VOCdevkit/VOC2007``, ``VOC2012``).
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree.ElementTree import Element

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.decode import SUFFIXES
from repfusion_env.data.folder import class_folders, existing_folder, visible_files
from repfusion_env.data.objects import Scene, banks
from repfusion_env.data.safe_xml import read_xml
from repfusion_env.data.splits import permutation, split
from repfusion_env.data.squares import asked_size, is_there
from repfusion_env.registry import did_you_mean

ANNOTATIONS, IMAGES, SETS = "Annotations", "JPEGImages", "ImageSets/Main"
EDGES = ("xmin", "ymin", "xmax", "ymax")
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Training and held-out images with ``boxes``; what is marked as difficult is left out.

    Held out is what ``test.txt`` lists where the annotations of that are there, and all of
    ``trainval.txt`` is for training then, of the other years too; otherwise ``train.txt`` and
    ``val.txt``; without lists a fixed random 20 % are held out.

    Raises:
        ValueError: The folder lacks a part of the layout, no side is configured, or more images
            than may be left out are damaged or annotated wrongly.
    """
    if config.path is None:
        raise ValueError("data.path: data.name 'voc' needs the folder that holds Annotations")
    asked_size(config)
    train, heldout = _listed(_years(existing_folder(config.path)))
    return banks("voc", (train, heldout), _scene, _classes, config, left_out="marked as difficult")


def _years(root: Path) -> list[Path]:
    """The folders that hold annotations and images."""
    for base in (root, root / "VOCdevkit"):
        if (base / ANNOTATIONS).is_dir():
            found = [base]
        else:
            below = class_folders(base) if base.is_dir() else []
            found = [base / name for name in below if (base / name / ANNOTATIONS).is_dir()]
        for year in found:
            if not (year / IMAGES).is_dir():
                raise ValueError(
                    f"data.path: '{year}' holds {ANNOTATIONS}, but no folder {IMAGES}."
                    f"{did_you_mean(IMAGES, class_folders(year))}"
                )
        if found:
            return found
    raise ValueError(
        f"data.path: there are no {ANNOTATIONS} in '{root}' or in a folder in it."
        f"{did_you_mean(ANNOTATIONS, class_folders(root))} Expected are {ANNOTATIONS}/*.xml, "
        f"{IMAGES}/ and {SETS}/*.txt"
    )


def _listed(years: list[Path]) -> tuple[list[Path], list[Path]]:
    """Annotation files for training and held out, in a fixed random order."""
    tests = {year: _names(year, "test") for year in years}
    # The test lists of 2008 to 2012 came without annotations.
    tests = {year: names for year, names in tests.items() if names and is_there(names[0])}
    train: list[Path] = []
    heldout: list[Path] = []
    for year in years:
        if tests:
            first, second = _names(year, "trainval"), tests.get(year, [])
            first = first or [*_names(year, "train"), *_names(year, "val")]
        else:
            first, second = _names(year, "train"), _names(year, "val")
        if not first and not second and not tests:
            files = [path for path in visible_files(year / ANNOTATIONS) if path.suffix == ".xml"]
            if len(files) < 2:
                raise ValueError(
                    f"data.path: '{year / ANNOTATIONS}' holds {len(files)} .xml files; at least 2 "
                    "are needed"
                )
            first, second = ([files[index] for index in ids] for ids in split(len(files)))
        train += first
        heldout += second
    for part, names in ((train, "train.txt or trainval.txt"), (heldout, "val.txt or test.txt")):
        if not part:
            raise ValueError(
                f"data.path: '{years[0] / SETS}' lists no images in {names}; expected is a name in "
                "each line, such as 000005"
            )
    both = set(train) & set(heldout)
    if both:
        raise ValueError(
            f"data.path: {len(both):,} images are listed both for training and as held out, such "
            f"as '{min(both).stem}'"
        )
    return (
        [train[index] for index in permutation(len(train)).tolist()],
        [heldout[index] for index in permutation(len(heldout)).tolist()],
    )


def _names(year: Path, part: str) -> list[Path]:
    """The annotation files that a list names; none where there is no list."""
    path = year / SETS / f"{part}.txt"
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.path: '{path}' cannot be read as text ({error})") from error
    names = [line.split()[0] for line in lines if line.strip()]
    for name in names:
        if Path(name).name != name:
            raise ValueError(
                f"data.path: '{path}' lists '{name}'; expected is a name without folders"
            )
    return [year / ANNOTATIONS / f"{name}.xml" for name in dict.fromkeys(names)]


def _classes(found: set[str]) -> tuple[str, ...]:
    """Pascal's twenty, or what else there is, sorted."""
    return CLASSES if found <= set(CLASSES) else tuple(sorted(found))


def _scene(path: Path) -> Scene:
    root, where = read_xml(path), f"'{path}'"
    if root.tag != "annotation":
        raise ValueError(
            f"data.path: {where} holds <{root.tag}>; expected is <annotation> with an <object> for "
            "each box"
        )
    boxes, names, left_out = [], [], 0
    for number, found in enumerate(root.findall("object")):
        name = (found.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"data.path: {where}: object {number} has no <name>")
        box = found.find("bndbox")
        if box is None:
            raise ValueError(f"data.path: {where}: object {number} ('{name}') has no <bndbox>")
        left, top, right, bottom = (_number(box, edge, number, where) for edge in EDGES)
        if (found.findtext("difficult") or "0").strip() == "1":
            left_out += 1
            continue
        # The first pixel is 1 there, and the last one belongs to the box.
        boxes.append((left - 1.0, top - 1.0, right, bottom))
        names.append(name)
    return Scene(_image(path), where, boxes, names, _size(root), left_out)


def _number(box: Element, edge: str, number: int, where: str) -> float:
    text = (box.findtext(edge) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"data.path: {where}: object {number} has <{edge}> '{text}'; expected is a number of "
            "pixels"
        )
    return value


def _size(root: Element) -> tuple[int, int] | None:
    """Width and height; programs that do not know them write 0, or nothing."""
    given = [(root.findtext(f"size/{name}") or "").strip() for name in ("width", "height")]
    if not all(text.isdecimal() and int(text) > 0 for text in given):
        return None
    return int(given[0]), int(given[1])


def _image(path: Path) -> Path:
    """The image of an annotation file: of the same name, for what <filename> says may be old."""
    folder = path.parent.parent / IMAGES
    for suffix in SUFFIXES:
        for spelled in (suffix, suffix.upper()):
            if (folder / f"{path.stem}{spelled}").is_file():
                return folder / f"{path.stem}{spelled}"
    raise ValueError(f"data.path: '{folder}' lacks the image '{path.stem}' of '{path}'")
