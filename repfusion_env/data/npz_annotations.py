"""Masks, keypoints and boxes of an ``.npz`` bank.

Of each part (``train_``, ``test_``, or neither where the split is not in the file):

* ``masks``, whole numbers (M, H, W): ids, 255 where a pixel does not count;
* ``keypoints``, numbers (M, P, 2): x and y in pixels, the corner pixel's centre is (0, 0); NaN, or
  False in ``visible`` (M, P), where it is not known where the point is;
* ``boxes``, numbers (K, 4): left, top, right, bottom as fractions of width and height, with
  ``box_labels`` (K,) and ``box_image`` (K,), the position of the image among those of the part.

Of the whole file, each optional: ``mask_classes`` and ``box_classes`` (names), ``mask_mirror``
(the id that each becomes in a mirrored image), ``normalizer`` (two points) and ``mirror`` (P).

Shape letters: M images, H,W pixels, P points, K boxes of all images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repfusion_env.data.annotations import IGNORE, Annotation, Boxes, Keypoints, Masks, padded_boxes
from repfusion_env.data.faces import LAYOUTS
from repfusion_env.data.mask_files import mirrored

Array = np.ndarray
KINDS = ("masks", "keypoints", "boxes")
# Beyond the edge by rounding alone, in pixels and in fractions.
ROUNDING = 1e-3


def read(
    path: Path,
    file: Mapping[str, Array],
    images: Mapping[str, Tensor],
    kinds: Sequence[str],
    names: tuple[str, ...] | None,
) -> dict[str, dict[str, Annotation]]:
    """The annotations of each part, by their kinds.

    Args:
        path: Of the file, for messages.
        file: Its arrays.
        images: Of each part by its prefix, (M, C, H, W).
        kinds: Those of :data:`KINDS` that the file has.
        names: ``classes`` of the file, where they do not belong to labels: of ids and boxes that
            have no names of their own.

    Raises:
        ValueError: An array has a wrong type, shape, number or range.
    """
    found: dict[str, dict[str, Annotation]] = {prefix: {} for prefix in images}
    for kind in kinds:
        made = _KINDS[kind](path, file, images, names)
        for prefix, annotation in made.items():
            found[prefix][kind] = annotation
    return found


def class_names(path: Path, key: str, named: Array) -> tuple[str, ...]:
    """Names of classes.

    Raises:
        ValueError: They are no list of names.
    """
    if named.ndim != 1 or named.dtype.kind not in "US":
        raise ValueError(
            f"'{path}': {key} must be a list of names, not {named.dtype} {named.shape}"
        )
    return tuple(str(name) for name in named.astype(str))


def _masks(
    path: Path,
    file: Mapping[str, Array],
    images: Mapping[str, Tensor],
    names: tuple[str, ...] | None,
) -> dict[str, Annotation]:
    values: dict[str, Tensor] = {}
    for prefix, pixels in images.items():
        key = f"{prefix}masks"
        array, wanted = file[key], (len(pixels), *pixels.shape[2:])
        if array.dtype.kind not in "iu" or array.shape != wanted:
            raise ValueError(
                f"'{path}': {key} must be whole numbers of shape {wanted}, (M, H, W) as its images "
                f"have, not {array.dtype} {array.shape}"
            )
        if array.min() < 0 or array.max() > IGNORE:
            raise ValueError(
                f"'{path}': {key} holds ids from {array.min()} to {array.max()}; allowed are "
                f"classes, or {IGNORE} for pixels that do not count"
            )
        values[prefix] = torch.from_numpy(array.astype(np.uint8))
    counting = [part[part != IGNORE] for part in values.values()]
    classes = _named(path, file, "mask_classes", names, counting)
    mirror = _numbers(path, file, "mask_mirror", len(classes)) or mirrored(classes)
    found: dict[str, Annotation] = {}
    for prefix, part in values.items():
        try:
            found[prefix] = Masks(part, classes, mirror)
        except ValueError as error:
            raise ValueError(f"'{path}': {prefix}masks: {error}") from error
    return found


def _keypoints(
    path: Path,
    file: Mapping[str, Array],
    images: Mapping[str, Tensor],
    names: tuple[str, ...] | None,
) -> dict[str, Annotation]:
    found: dict[str, Annotation] = {}
    counts: dict[str, int] = {}
    for prefix, pixels in images.items():
        key = f"{prefix}keypoints"
        array = file[key]
        if array.dtype.kind not in "fiu" or array.ndim != 3 or array.shape[2] != 2:
            raise ValueError(
                f"'{path}': {key} must be x and y of each point, numbers of shape (M, P, 2), not "
                f"{array.dtype} {array.shape}"
            )
        if len(array) != len(pixels):
            raise ValueError(f"'{path}' has {len(pixels)} {prefix}images but {len(array)} {key}")
        if array.shape[1] == 0:
            raise ValueError(
                f"'{path}': {key} has no points, {array.shape}; at least one is needed"
            )
        points = torch.from_numpy(array.astype(np.float32))
        visible = _visible(path, file, prefix, points)
        _check_inside(path, key, points, visible, (pixels.shape[2], pixels.shape[3]))
        count = counts[key] = points.shape[1]
        # 68 and 98 points are placed on faces in one way everywhere.
        layout = LAYOUTS.get(count)
        normalizer = _numbers(path, file, "normalizer", 2)
        mirror = _numbers(path, file, "mirror", count)
        if layout is not None:
            normalizer, mirror = normalizer or layout.normalizer, mirror or layout.mirror(count)
        pair = (normalizer[0], normalizer[1]) if normalizer else None
        # Where a point is not visible its value means nothing, but must not be NaN in arithmetic.
        points = torch.where(visible[..., None], points, 0.0)
        try:
            found[prefix] = Keypoints(points, visible, pair, mirror)
        except ValueError as error:
            raise ValueError(f"'{path}': {key}: {error}") from error
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"'{path}': all images must have the same points, but "
            f"{' and '.join(f'{key} has {count}' for key, count in counts.items())}"
        )
    return found


def _visible(path: Path, file: Mapping[str, Array], prefix: str, points: Tensor) -> Tensor:
    # Infinity is a place outside of the image, which is refused; NaN alone means missing.
    known = ~points.isnan().any(2)
    given = file.get(f"{prefix}visible")
    if given is None:
        return known
    if given.dtype.kind not in "biu" or given.shape != tuple(points.shape[:2]):
        raise ValueError(
            f"'{path}': {prefix}visible must be true or false for each point, of shape "
            f"{tuple(points.shape[:2])}, not {given.dtype} {given.shape}"
        )
    return known & torch.from_numpy(given.astype(bool))


def _check_inside(
    path: Path, key: str, points: Tensor, visible: Tensor, size: tuple[int, int]
) -> None:
    height, width = size
    last = torch.tensor([width - 0.5, height - 0.5]) + ROUNDING
    outside = (((points < -0.5 - ROUNDING) | (points > last)).any(2) & visible).nonzero()
    if len(outside):
        image, point = outside[0].tolist()
        x, y = points[image, point].tolist()
        raise ValueError(
            f"'{path}': {key}: point {point} of image {image} is at ({x:g}, {y:g}), outside of the "
            f"image of {width}x{height} pixels; allowed: x in -0.5..{width - 0.5:g}, y in "
            f"-0.5..{height - 0.5:g}, or NaN for a missing point"
        )


def _boxes(
    path: Path,
    file: Mapping[str, Array],
    images: Mapping[str, Tensor],
    names: tuple[str, ...] | None,
) -> dict[str, Annotation]:
    labels = {prefix: _whole(path, file, f"{prefix}box_labels") for prefix in images}
    classes = _named(path, file, "box_classes", names, list(labels.values()))
    made: dict[str, Boxes] = {}
    for prefix, pixels in images.items():
        key = f"{prefix}boxes"
        height, width = pixels.shape[2:]
        places = torch.from_numpy(_fractions(path, key, file[key]))
        places *= torch.tensor([width, height, width, height])
        rows = _whole(path, file, f"{prefix}box_image")
        for what, numbers, last in (
            ("box_labels", labels[prefix], len(classes) - 1),
            ("box_image", rows, len(pixels) - 1),
        ):
            _check_rows(path, f"{prefix}{what}", numbers, last, len(places))
        # In the file boxes may be in any order; sorted by image, each image's are a slice.
        order = torch.argsort(rows, stable=True)
        counts = torch.bincount(rows, minlength=len(pixels)).tolist()
        made[prefix] = padded_boxes(
            list(places[order].split(counts)), list(labels[prefix][order].split(counts)), classes
        )
    return dict(made)


def _fractions(path: Path, key: str, array: Array) -> Array:
    """Boxes (K, 4) as float32 within 0..1, each with an area."""
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(
            f"'{path}': {key} must be left, top, right, bottom of each box, numbers of shape "
            f"(K, 4), not {array.dtype} {array.shape}"
        )
    boxes: Array = array.astype(np.float32)
    inside = ((boxes >= -ROUNDING) & (boxes <= 1 + ROUNDING)).all(1)
    area = (boxes[:, 2:] > boxes[:, :2]).all(1)
    for fine, what in (
        (inside, "reaches outside of its image, or is in pixels; allowed are fractions in 0..1"),
        (area, "has no area; right must be above left, and bottom above top"),
    ):
        if not fine.all():
            row = int(np.flatnonzero(~fine)[0])
            place = ", ".join(f"{value:g}" for value in boxes[row].tolist())
            raise ValueError(
                f"'{path}': {key}: box {row} (left, top, right, bottom: {place}) {what}"
            )
    return boxes.clip(0, 1)


def _check_rows(path: Path, key: str, numbers: Tensor, last: int, boxes: int) -> None:
    if len(numbers) != boxes:
        raise ValueError(f"'{path}': there are {boxes} boxes but {len(numbers)} {key}")
    wrong = ((numbers < 0) | (numbers > last)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"'{path}': {key} of box {row} is {int(numbers[row])}; allowed: 0..{last}")


def _whole(path: Path, file: Mapping[str, Array], key: str) -> Tensor:
    array = file.get(key)
    if array is None:
        raise ValueError(f"'{path}' has boxes, but no {key}")
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(
            f"'{path}': {key} must be whole numbers of shape (K,), one for each box, not "
            f"{array.dtype} {array.shape}"
        )
    return torch.from_numpy(array.astype(np.int64))


def _named(
    path: Path,
    file: Mapping[str, Array],
    key: str,
    names: tuple[str, ...] | None,
    ids: Sequence[Tensor],
) -> tuple[str, ...]:
    """Their own names, else those of the file, else numbers."""
    own = file.get(key)
    if own is not None:
        return class_names(path, key, own)
    if names is not None:
        return names
    highest = max((int(part.max()) for part in ids if len(part)), default=0)
    return tuple(str(number) for number in range(highest + 1))


def _numbers(path: Path, file: Mapping[str, Array], key: str, count: int) -> tuple[int, ...] | None:
    array = file.get(key)
    if array is None:
        return None
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise ValueError(
            f"'{path}': {key} must be {count} whole numbers, not {array.dtype} {array.shape}"
        )
    return tuple(int(number) for number in array)


_KINDS = {"masks": _masks, "keypoints": _keypoints, "boxes": _boxes}
