"""Data sets as image banks that stay on the device, or are streamed to it.

A data set is a function ``load(config: DataConfig) -> (train, held-out)``, one file each, with one
line in :data:`repfusion_env.registry.DATASETS`.
"""

from __future__ import annotations

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.registry import DATASETS, WrongPartError, look_up

__all__ = ["ImageBank", "load_data"]


def load_data(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """Load the training and the held-out images of the configured data set, on the CPU.

    Args:
        config: Name, path, image size and limits of the data set.

    Returns:
        The training bank and the held-out bank; both have one image shape and the same classes.

    Raises:
        ValueError: The name is unknown, or the files are missing, damaged or do not fit together.
        TypeError: A loader of the user's own does not return two image banks.
    """
    loaded = look_up("data set", config.name, DATASETS)(config)
    if (
        not isinstance(loaded, tuple)
        or len(loaded) != 2
        or not all(isinstance(bank, ImageBank) for bank in loaded)
    ):
        raise WrongPartError(
            f"data set '{config.name}': its loader must return two ImageBanks (train, held-out), "
            f"not {type(loaded).__name__}"
        )
    train, heldout = (
        bank.head(limit) if limit is not None else bank
        for bank, limit in zip(loaded, (config.train_limit, config.heldout_limit), strict=True)
    )
    if config.image_size is not None:
        train, heldout = (bank.resized(config.image_size) for bank in (train, heldout))
    if config.channels is not None:
        train, heldout = (bank.recolored(config.channels) for bank in (train, heldout))
    if train.shape != heldout.shape:
        raise ValueError(
            f"data set '{train.name}': training images are {train.shape} (C, H, W) but held-out "
            f"images are {heldout.shape}; data.image_size resizes both"
        )
    if train.classes != heldout.classes:
        raise ValueError(
            f"data set '{train.name}': training has the classes {', '.join(train.classes)} but "
            f"held-out has {', '.join(heldout.classes)}"
        )
    _same_annotations(train, heldout)
    return train, heldout


def _same_annotations(train: ImageBank, heldout: ImageBank) -> None:
    kinds = [", ".join(sorted(bank.annotations)) or "none" for bank in (train, heldout)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"data set '{train.name}': training has the annotations {kinds[0]} but held-out has "
            f"{kinds[1]}"
        )
    for kind, mine in train.annotations.items():
        other = heldout.annotations[kind]
        if mine.names != other.names:
            raise ValueError(
                f"data set '{train.name}': the {kind} of training have the classes "
                f"{', '.join(mine.names)} but those of held-out {', '.join(other.names)}"
            )
