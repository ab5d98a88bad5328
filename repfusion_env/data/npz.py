"""Image banks in one ``.npz`` file: uint8 images (M, H, W, C) or (M, H, W), and what is known.

Either the split is in the file (``train_images``, ``train_labels``, ``test_images``,
``test_labels``), or it holds ``images`` and ``labels``, of which a fixed random 20 % are held out.
Beside labels, or instead of them, there may be masks, keypoints and boxes
(:mod:`repfusion_env.data.npz_annotations`). ``classes`` names the classes; without it they are
numbered.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repfusion_env.config import DataConfig
from repfusion_env.data import npz_annotations
from repfusion_env.data.annotations import Annotation
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.data.splits import split

Array = np.ndarray
KINDS = ("labels", *npz_annotations.KINDS)
# What stands before the names of the arrays of each part.
SPLIT, WHOLE = ("train_", "test_"), ("",)
CHANNELS = (1, 2, 3, 4)


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Read the bank at ``data.path``.

    Raises:
        ValueError: The file is missing, truncated, no ``.npz``, holds pickled objects, lacks a
            key, or its images and what is known of them have a wrong type, shape, number or range.
    """
    if config.path is None:
        raise ValueError("data.path: data.name 'npz' needs the path of an .npz bank")
    path = Path(config.path).expanduser()
    with _opened(path) as file:
        prefixes, kinds = _contents(path, file)
        named = file.get("classes")
        names = None if named is None else npz_annotations.class_names(path, "classes", named)
        labels: dict[str, Tensor] = {}
        classes: tuple[str, ...] = UNLABELLED
        if "labels" in kinds:
            keys = {prefix: f"{prefix}labels" for prefix in prefixes}
            labels = {prefix: _labels(path, key, file[key]) for prefix, key in keys.items()}
            # Names are those of the labels, where there are labels.
            classes, names = names or _numbered(labels), None
        images = {
            prefix: _images(path, f"{prefix}images", file[f"{prefix}images"]) for prefix in prefixes
        }
        dense = [kind for kind in npz_annotations.KINDS if kind in kinds]
        annotations = npz_annotations.read(path, file, images, dense, names)
    banks = [
        _bank(path, prefix, images[prefix], labels.get(prefix), classes, annotations[prefix])
        for prefix in prefixes
    ]
    if len(banks) == 2:
        return banks[0], banks[1]
    whole = banks[0]
    if len(whole) < 2:
        raise ValueError(f"'{path}' holds 1 image; at least 2 are needed to hold one out")
    train, heldout = (whole.take(ids) for ids in split(len(whole)))
    return train, heldout


def _contents(path: Path, file: Mapping[str, Array]) -> tuple[tuple[str, ...], list[str]]:
    """What stands before the arrays' names, and what is known of the images."""
    for prefixes in (SPLIT, WHOLE):
        if not all(f"{prefix}images" in file for prefix in prefixes):
            continue
        kinds = [kind for kind in KINDS if any(f"{prefix}{kind}" in file for prefix in prefixes)]
        missing = [f"{prefix}{kind}" for prefix in prefixes for kind in kinds]
        missing = [key for key in missing if key not in file]
        if missing:
            raise ValueError(
                f"'{path}' lacks the arrays of an image bank: it needs train_images, test_images "
                f"and the same of both, but holds {', '.join(file)} and no {', '.join(missing)}"
            )
        if kinds:
            return prefixes, kinds
    raise ValueError(
        f"'{path}' lacks the arrays of an image bank: it needs train_images, test_images and of "
        f"both {', '.join(KINDS[:-1])} or {KINDS[-1]} (such as train_labels, test_labels), or "
        f"images and one of these, but holds {', '.join(file) or 'nothing'}"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, Array]]:
    """The arrays of a file by name; whatever cannot be read is refused in one sentence."""
    if not path.is_file():
        raise ValueError(f"data.path: there is no file '{path}'")
    try:
        # Unpickling runs whatever code the file's author put there, so it stays off.
        file = np.load(path, allow_pickle=False)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"'{path}' is truncated or damaged: {error}") from error
    except ValueError as error:
        # numpy takes a file that is no zip and no .npy for a pickle.
        raise ValueError(
            f"'{path}' is no .npz bank: it is no zip file (an empty, foreign or pickled file)"
        ) from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"'{path}' is a single array (.npy), not an .npz bank")
    with file:
        yield _Arrays(path, file)


class _Arrays(Mapping[str, Array]):
    """Reads members on demand, and names the one that holds pickled objects."""

    def __init__(self, path: Path, file: np.lib.npyio.NpzFile) -> None:
        self.path, self.file = path, file

    def __getitem__(self, key: str) -> Array:
        try:
            array: Array = self.file[key]
        except (ValueError, zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
            reason = "pickled Python objects" if "pickle" in str(error) else "a damaged array"
            raise ValueError(f"'{self.path}' holds {reason} in '{key}'; refused") from error
        return array

    def __contains__(self, key: object) -> bool:
        # A mapping's own would unpack the array to see whether it is there.
        return key in self.file.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.files)

    def __len__(self) -> int:
        return len(self.file.files)


def _images(path: Path, key: str, array: Array) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(
            f"'{path}': {key} must be uint8 pixels (0..255), not {array.dtype}; "
            "convert the values first"
        )
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4:
        raise ValueError(
            f"'{path}': {key} must have the shape (M, H, W, C) or (M, H, W), not {array.shape}"
        )
    if array.shape[3] not in CHANNELS and array.shape[1] in CHANNELS:
        raise ValueError(
            f"'{path}': {key} has the shape {array.shape}; channels come last, (M, H, W, C)"
        )
    if 0 in array.shape:
        raise ValueError(f"'{path}' is empty: {key} has the shape {array.shape}")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _labels(path: Path, key: str, array: Array) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(
            f"'{path}': {key} must be whole numbers of shape (M,), not {array.dtype} {array.shape}"
        )
    return torch.from_numpy(array.astype(np.int64))


def _numbered(labels: Mapping[str, Tensor]) -> tuple[str, ...]:
    highest = max((int(part.max()) for part in labels.values() if len(part)), default=0)
    return tuple(str(number) for number in range(highest + 1))


def _bank(
    path: Path,
    prefix: str,
    images: Tensor,
    labels: Tensor | None,
    classes: tuple[str, ...],
    annotations: dict[str, Annotation],
) -> ImageBank:
    if labels is None:
        labels = torch.zeros(len(images), dtype=torch.int64)
    try:
        return ImageBank(path.stem, images, labels, classes, annotations=annotations)
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{path}': {prefix}images: {error}") from error
