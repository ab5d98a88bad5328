"""Image banks in one ``.npz`` file: uint8 images (M, H, W, C) or (M, H, W), and their labels.

Either the split is in the file (``train_images``, ``train_labels``, ``test_images``,
``test_labels``), or it holds ``images`` and ``labels``, of which a fixed random 20 % are held out.
``classes`` names the classes; without it they are numbered.
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
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.splits import split

Array = np.ndarray
SPLIT_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
WHOLE_KEYS = ("images", "labels")
CHANNELS = (1, 2, 3, 4)


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Read the bank at ``data.path``.

    Raises:
        ValueError: The file is missing, truncated, no ``.npz``, holds pickled objects, lacks a
            key, or its images and labels have a wrong type, shape, number or range.
    """
    if config.path is None:
        raise ValueError("data.path: data.name 'npz' needs the path of an .npz bank")
    path = Path(config.path).expanduser()
    with _opened(path) as file:
        keys = next(
            (wanted for wanted in (SPLIT_KEYS, WHOLE_KEYS) if set(wanted) <= set(file)), None
        )
        if keys is None:
            raise ValueError(
                f"'{path}' lacks the arrays of an image bank: it needs {', '.join(SPLIT_KEYS)}, or "
                f"{', '.join(WHOLE_KEYS)}, but holds {', '.join(file) or 'nothing'}"
            )
        arrays = {key: file[key] for key in keys}
        named = file.get("classes")
    labels = {key: _labels(path, key, arrays[key]) for key in keys if key.endswith("labels")}
    classes = _classes(path, named, labels)
    banks = []
    for images_key, labels_key in zip(keys[::2], keys[1::2], strict=True):
        images = _images(path, images_key, arrays[images_key])
        banks.append(_bank(path, images_key, images, labels[labels_key], classes))
    if len(banks) == 2:
        return banks[0], banks[1]
    whole = banks[0]
    if len(whole) < 2:
        raise ValueError(f"'{path}' holds 1 image; at least 2 are needed to hold one out")
    train, heldout = (
        ImageBank(whole.name, whole.images[ids], whole.labels[ids], classes)
        for ids in split(len(whole))
    )
    return train, heldout


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


def _classes(path: Path, named: Array | None, labels: Mapping[str, Tensor]) -> tuple[str, ...]:
    if named is not None:
        if named.ndim != 1 or named.dtype.kind not in "US":
            raise ValueError(
                f"'{path}': classes must be a list of names, not {named.dtype} {named.shape}"
            )
        return tuple(str(name) for name in named.astype(str))
    highest = max((int(part.max()) for part in labels.values() if len(part)), default=0)
    return tuple(str(number) for number in range(highest + 1))


def _bank(
    path: Path, key: str, images: Tensor, labels: Tensor, classes: tuple[str, ...]
) -> ImageBank:
    try:
        return ImageBank(path.stem, images, labels, classes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{path}': {key}: {error}") from error
