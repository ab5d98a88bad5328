"""COCO and data sets in its format: the boxes of all images in one JSON file.

Three layouts are known: ``annotations/instances_train2017.json`` and ``instances_val2017.json``
with ``train2017/`` and ``val2017/`` (any year or none, in ``images/`` too); a folder ``train`` and
one of ``valid``, ``val``, ``test`` with ``_annotations.coco.json`` among the images; a single JSON
file with the images beside it or in ``images/``, of which a fixed random 20 % are held out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.folder import existing_folder, some
from repfusion_env.data.objects import Scene, banks
from repfusion_env.data.splits import permutation, split
from repfusion_env.data.squares import asked_size, inside, is_there
from repfusion_env.registry import did_you_mean

HELDOUT_PARTS = ("val", "test")
HELDOUT_FOLDERS = ("valid", "val", "test")
EXPORTED = "_annotations.coco.json"
# Of an annotation. Most of a file are outlines, which would only take memory.
KEPT = ("id", "category_id", "bbox", "iscrowd")
EXPECTED = (
    "annotations/instances_train*.json and instances_val*.json with folders of the same endings, "
    f"or {EXPORTED} in train/ and valid/, or one .json file"
)


@dataclass(frozen=True)
class Source:
    """An annotation file and where its images may lie."""

    path: Path
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Listed:
    """An image of an annotation file, with all that the file says of it."""

    source: Source
    image: Mapping[str, Any]
    annotations: list[Mapping[str, Any]]
    categories: Mapping[int, str]


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Training and held-out images with ``boxes``; boxes around crowds are left out.

    Raises:
        ValueError: The folder has none of the layouts, a file is no JSON or not in COCO's format,
            the two have other categories, no side is configured, or more images than may be left
            out are damaged or annotated wrongly.
    """
    if config.path is None:
        raise ValueError("data.path: data.name 'coco' needs the folder that holds annotations")
    asked_size(config)
    sources = _sources(existing_folder(config.path))
    listed = [_listed(source) for source in sources]
    if len(listed) == 2:
        _same_categories(sources, listed)
        parts = [[part[i] for i in permutation(len(part)).tolist()] for part in listed]
    else:
        if len(listed[0]) < 2:
            raise ValueError(f"data.path: '{sources[0].path}' lists 1 image; at least 2 are needed")
        parts = [[listed[0][i] for i in ids.tolist()] for ids in split(len(listed[0]))]
    categories = tuple(listed[0][0].categories.values())
    return banks(
        "coco",
        (parts[0], parts[1]),
        _scene,
        lambda found: categories,
        config,
        left_out="around crowds",
    )


def _sources(root: Path) -> list[Source]:
    """The annotation files for training and held out, or a single one."""
    trains = sorted((root / "annotations").glob("instances_train*.json"))
    pairs = [_pair(root, path) for path in trains]
    found = [pair for pair in pairs if pair is not None]
    if len(found) > 1:
        raise ValueError(
            f"data.path: '{root}' holds several sets: {', '.join(path.name for path in trains)}; "
            "expected is one"
        )
    if found:
        return list(found[0])
    if trains:
        raise ValueError(
            f"data.path: '{trains[0]}' needs a file instances_val{_rest(trains[0])}.json beside it "
            f"and a folder of images train{_rest(trains[0])} in '{root}'"
        )
    heldout = next((n for n in HELDOUT_FOLDERS if (root / n / EXPORTED).is_file()), None)
    if heldout is not None and (root / "train" / EXPORTED).is_file():
        return [Source(root / n / EXPORTED, (root / n,)) for n in ("train", heldout)]
    single = [*sorted(root.glob("*.json")), *sorted((root / "annotations").glob("*.json"))]
    if len(single) == 1:
        return [Source(single[0], (root / "images", root))]
    names = [str(path.relative_to(root)) for path in single]
    close = did_you_mean("annotations", [path.name for path in root.iterdir() if path.is_dir()])
    raise ValueError(
        f"data.path: '{root}' has none of COCO's layouts: it holds {some(names) or 'no .json'}."
        f"{'' if names else close} Expected are {EXPECTED}"
    )


def _rest(path: Path) -> str:
    """What follows ``instances_train``: the year."""
    return path.stem.removeprefix("instances_train")


def _pair(root: Path, train: Path) -> tuple[Source, Source] | None:
    """Both files of a set, where they and the training images are there."""
    rest = _rest(train)
    for part in HELDOUT_PARTS:
        heldout = train.with_name(f"instances_{part}{rest}.json")
        sources = [
            Source(path, (root / name, root / "images" / name, root / "images"))
            for path, name in ((train, f"train{rest}"), (heldout, f"{part}{rest}"))
        ]
        if heldout.is_file() and any(folder.is_dir() for folder in sources[0].folders):
            return sources[0], sources[1]
    return None


def _listed(source: Source) -> list[Listed]:
    """Every image of a file, with its annotations."""
    content = _read(source.path)
    categories = _categories(source.path, content["categories"])
    images: dict[Any, Mapping[str, Any]] = {}
    for number, image in enumerate(content["images"]):
        if not isinstance(image, dict) or not _known(image.get("id")):
            raise ValueError(
                f"data.path: '{source.path}': image {number} of its list has no id; expected is a "
                "number or text"
            )
        if image["id"] in images:
            raise ValueError(f"data.path: '{source.path}' lists the image {image['id']} twice")
        images[image["id"]] = image
    if not images:
        raise ValueError(f"data.path: '{source.path}' lists no images")
    own: dict[Any, list[Mapping[str, Any]]] = {key: [] for key in images}
    for number, annotation in enumerate(content["annotations"]):
        key = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not _known(key) or key not in own:
            raise ValueError(
                f"data.path: '{source.path}': annotation {number} of its list belongs to the image "
                f"{key!r}, which the file does not list"
            )
        own[key].append({name: annotation.get(name) for name in KEPT})
    return [Listed(source, image, own[key], categories) for key, image in images.items()]


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"data.path: '{path}' cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"data.path: '{path}' is no JSON, or truncated ({error}); expected is COCO's format"
        ) from error
    keys = ("images", "annotations", "categories")
    given = content if isinstance(content, dict) else {}
    lacking = [key for key in keys if not isinstance(given.get(key), list)]
    if lacking:
        raise ValueError(
            f"data.path: '{path}' lacks the lists {', '.join(lacking)}; COCO's format has "
            f"{', '.join(keys)}"
        )
    return given


def _known(key: object) -> bool:
    return isinstance(key, int | str)


def _categories(path: Path, listed: list[Any]) -> dict[int, str]:
    """Names by id, ordered by id; COCO's 80 have ids from 1 to 90."""
    found: dict[int, str] = {}
    for number, category in enumerate(listed):
        given = category if isinstance(category, dict) else {}
        key, name = given.get("id"), given.get("name")
        if not isinstance(key, int) or not isinstance(name, str):
            raise ValueError(
                f"data.path: '{path}': category {number} of its list needs a whole number as id "
                "and a name"
            )
        found[key] = name
    twice = [name for name, count in Counter(found.values()).items() if count > 1]
    if twice or not found or len(found) != len(listed):
        raise ValueError(
            f"data.path: '{path}' names {f'the category {twice[0]!r} twice' if twice else 'none'}"
            if len(found) == len(listed)
            else f"data.path: '{path}' gives one id to several categories"
        )
    return dict(sorted(found.items()))


def _same_categories(sources: list[Source], listed: list[list[Listed]]) -> None:
    names = [list(part[0].categories.values()) for part in listed]
    for mine, other in ((0, 1), (1, 0)):
        lacking = [name for name in names[mine] if name not in names[other]]
        if lacking:
            raise ValueError(
                f"data.path: '{sources[other].path}' lacks the categories {some(lacking)} of "
                f"'{sources[mine].path}'.{did_you_mean(lacking[0], names[other])} Both must have "
                "the same"
            )


def _scene(job: Listed) -> Scene:
    name = job.image.get("file_name")
    where = f"'{job.source.path}': image {job.image['id']}"
    if not isinstance(name, str):
        raise ValueError(f"data.path: {where} has no file_name")
    where = f"'{job.source.path}': image '{name}'"
    boxes, names, left_out = [], [], 0
    for annotation in job.annotations:
        told = f"{where}: annotation {annotation.get('id')}"
        category = annotation.get("category_id")
        if not isinstance(category, int) or category not in job.categories:
            raise ValueError(
                f"data.path: {told} is of the category {category!r}; the file names "
                f"{', '.join(f'{key} {value}' for key, value in list(job.categories.items())[:5])}"
                f"{', ...' if len(job.categories) > 5 else ''}"
            )
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise ValueError(
                f"data.path: {told} has the bbox {box!r}; expected are x, y, width, height"
            )
        if annotation.get("iscrowd"):
            left_out += 1
            continue
        left, top, width, height = map(float, box)
        boxes.append((left, top, left + width, top + height))
        names.append(job.categories[category])
    return Scene(_image(job.source, name, where), where, boxes, names, _size(job.image), left_out)


def _is_number(value: object) -> bool:
    # Python reads whole numbers of any length, of which floats hold not all; NaN is none.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    return None


def _image(source: Source, name: str, where: str) -> Path:
    folders = [folder for folder in source.folders if folder.is_dir()]
    for folder in folders:
        path = inside(folder, name, where)
        if is_there(path):
            return path
    looked = f"'{(folders or list(source.folders))[0]}'"
    raise ValueError(f"data.path: {looked} lacks the image '{name}' that '{source.path}' lists")
