"""CIFAR-10 from the standard python batches, or from an ``.npz`` bank of it.

``data.path`` is the folder that holds (or is) ``cifar-10-batches-py``. torchvision compares the MD5
of each batch before it is unpickled, so a foreign pickle is never run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10

from repfusion_env.config import DataConfig
from repfusion_env.data import npz
from repfusion_env.data.bank import ImageBank

FOLDER = CIFAR10.base_folder


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """50,000 training and 10,000 held-out images, 3x32x32.

    Raises:
        ValueError: The batches are missing or damaged, or cannot be downloaded.
    """
    if config.path is None:
        raise ValueError(f"data.path: data.name 'cifar10' needs the folder that holds {FOLDER}")
    path = Path(config.path).expanduser()
    if path.suffix == ".npz":
        train, heldout = npz.load(config)
        return replace(train, name="cifar10"), replace(heldout, name="cifar10")
    root = path.parent if path.name == FOLDER else path
    return _read(root, train=True, config=config), _read(root, train=False, config=config)


def _read(root: Path, *, train: bool, config: DataConfig) -> ImageBank:
    try:
        data = CIFAR10(str(root), train=train, download=config.download)
    except Exception as error:
        raise ValueError(_sentence(root, config, error)) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(data.targets, dtype=torch.int64)
    return ImageBank("cifar10", images, labels, tuple(data.classes))


def _sentence(root: Path, config: DataConfig, error: Exception) -> str:
    """What is wrong with the batches; torchvision says the same for a missing and a damaged one."""
    wanted = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
    wanted.append(CIFAR10.meta["filename"])
    missing = [name for name in wanted if not (root / FOLDER / name).is_file()]
    if config.download:
        return (
            f"data.download: CIFAR-10 could not be fetched into '{root}' "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'})"
        )
    if len(missing) == len(wanted):
        return (
            f"data.path: '{root}' does not hold CIFAR-10; expected is '{root / FOLDER}' with "
            f"{wanted[0]} and the others (the unpacked python version), and "
            "data.download true fetches it"
        )
    if missing:
        return f"data.path: '{root / FOLDER}' is incomplete: there is no {', '.join(missing)}"
    return (
        f"data.path: a file in '{root / FOLDER}' is truncated or damaged (its MD5 is not that of "
        "CIFAR-10); remove the folder and unpack it again, or set data.download true"
    )
