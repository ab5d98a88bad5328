"""Images with a mask each, from files: decoded together at their final size, by threads.

A mask goes the way of its image: the middle square, brought to ``data.image_size``, but by the
nearest pixel, so that ids are never mixed.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from repfusion_env.config import DataConfig
from repfusion_env.data.annotations import IGNORE, Masks
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.data.decode import Decoded, decode_each, outline, pixels, sentences, size_of
from repfusion_env.data.memory import reserve
from repfusion_env.data.unreadable import Unreadable

# Of one channel: an index into a palette, or the id as a grey value.
INDEX_MODES = ("P", "L", "1", "I;16", "I;16B", "I;16L", "I;16N", "I")
LOSSY = ("JPEG", "MPO", "JPEG2000")
# Left and right in the names of classes: one becomes the other in a mirrored image.
SIDES = (("l_", "r_"), ("left_", "right_"), ("left ", "right "))


@dataclass(frozen=True)
class Masked:
    """One image and how its mask is read.

    Args:
        image: Its file.
        mask: Gives the ids, uint8 (H, W), at the mask's own size, :data:`IGNORE` where a pixel does
            not count; a ValueError says in one sentence why it cannot be read.
        where: What the mask is called in messages.
        label: The class of the whole image, if there is one.
    """

    image: Path
    mask: Callable[[], np.ndarray]
    where: str
    label: int = 0


def masked_banks(
    name: str,
    listings: tuple[Sequence[Masked], Sequence[Masked]],
    config: DataConfig,
    classes: tuple[str, ...] | None,
    *,
    labels: tuple[str, ...] = UNLABELLED,
    any_size: bool = False,
) -> tuple[ImageBank, ImageBank]:
    """Decode two listings, no more of them than the configuration's limits.

    Args:
        name: Of the data set.
        listings: Training and held-out images.
        config: Size, colour and limits.
        classes: Names of the masks' ids; None: numbered up to the highest id found.
        labels: Names of the images' classes, where they have any.
        any_size: A mask may be smaller or larger than its image, of the same proportions.

    Raises:
        ValueError: More images than may be left out cannot be read, have no mask, one of another
            size, or one with an id outside the classes; sizes are mixed without
            ``data.image_size``; or the banks exceed the machine's memory.
    """
    train, heldout = listings[0][: config.train_limit], listings[1][: config.heldout_limit]
    unreadable = Unreadable(len(train) + len(heldout), config.skip_unreadable, name)
    files = ([job.image for job in train], [job.image for job in heldout])
    found = outline(files, config, unreadable)
    channels, height, width = found.shape
    reserve(name, (len(train), len(heldout)), found.shape, masks=True)

    def read(job: Masked) -> tuple[Tensor, ...]:
        with sentences(f"'{job.image}'"), Image.open(job.image) as image:
            size = image.size
            picture = pixels(image, side=config.image_size, channels=channels)
        ids = job.mask()
        _check_size(job, size, (ids.shape[1], ids.shape[0]), any_size)
        highest = _highest(job, ids, classes)
        if ids.shape != (height, width):
            square = ImageOps.fit(Image.fromarray(ids), (width, height), Image.Resampling.NEAREST)
            ids = np.array(square)
        return picture, torch.from_numpy(ids), torch.tensor(highest)

    jobs = tuple(
        [listing[index] for index in places]
        for listing, places in zip((train, heldout), found.looked_at, strict=True)
    )
    rows = [(found.shape, torch.uint8), ((height, width), torch.uint8), ((), torch.int64)]
    parts = decode_each(name, (jobs[0], jobs[1]), read, rows, unreadable)
    if classes is None:
        highest = max(int(part.tensors[2].max()) for part in parts if len(part.kept))
        classes = tuple(str(number) for number in range(highest + 1))

    def bank(part: Decoded, jobs: Sequence[Masked], index: int) -> ImageBank:
        return ImageBank(
            name,
            part.tensors[0],
            torch.tensor([job.label for job in jobs])[part.kept],
            labels,
            annotations={"masks": Masks(part.tensors[1], classes, mirrored(classes))},
            skipped=unreadable.listed(index),
        )

    banks = bank(parts[0], jobs[0], 0), bank(parts[1], jobs[1], 1)
    unreadable.report()
    return banks


def index_mask(path: Path) -> np.ndarray:
    """Ids of an index mask, uint8 (H, W): a palette's indices, or grey values as they are.

    Raises:
        ValueError: There is no such file, it is damaged, a lossy format, has colours instead of
            ids, or ids above 255.
    """
    if not path.is_file():
        raise ValueError(f"data.path: there is no mask '{path}'")
    with sentences(f"the mask '{path}'"), Image.open(path) as image:
        kind, mode = image.format, image.mode
        ids = np.array(image)
    if kind in LOSSY:
        raise ValueError(
            f"data.path: the mask '{path}' is a {kind}, which blurs ids; save masks as PNG"
        )
    if mode not in INDEX_MODES:
        raise ValueError(
            f"data.path: the mask '{path}' has pixels of mode '{mode}'; a mask has one id per "
            "pixel: an indexed or grey PNG"
        )
    if ids.dtype != np.uint8 and ids.dtype != np.bool_:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > IGNORE:
            raise ValueError(
                f"data.path: the mask '{path}' holds ids from {low} to {high}; allowed: 0..{IGNORE}"
            )
    return ids.astype(np.uint8)


def mirrored(classes: Sequence[str]) -> tuple[int, ...] | None:
    """The class that each becomes in a mirrored image, by names such as ``l_eye`` and ``r_eye``.

    Returns:
        As many numbers as there are classes; None where no two are a left and a right one.
    """
    place = {name: number for number, name in enumerate(classes)}
    swapped = list(range(len(classes)))
    for left, right in SIDES:
        for name, number in place.items():
            other = place.get(right + name.removeprefix(left)) if name.startswith(left) else None
            if other is not None:
                swapped[number], swapped[other] = other, number
    return tuple(swapped) if swapped != list(range(len(classes))) else None


def _check_size(job: Masked, size: tuple[int, int], mask: tuple[int, int], any_size: bool) -> None:
    proportional = size[0] * mask[1] == size[1] * mask[0]
    if size == mask or (any_size and proportional):
        return
    raise ValueError(
        f"data.path: the image '{job.image}' is {size_of(size)}, but {job.where} is "
        f"{size_of(mask)} (width x height); both must have one "
        f"{'shape' if any_size else 'size'}"
    )


def _highest(job: Masked, ids: np.ndarray, classes: tuple[str, ...] | None) -> int:
    """The highest id, checked against the classes; 0 where no pixel counts."""
    counts = np.bincount(ids.reshape(-1), minlength=IGNORE + 1)[:IGNORE]
    present = np.flatnonzero(counts)
    highest = int(present[-1]) if len(present) else 0
    if classes is not None and highest >= len(classes):
        raise ValueError(
            f"data.path: {job.where} holds the id {highest} in {counts[highest]:,} pixels; allowed:"
            f" 0..{len(classes) - 1} ({len(classes)} classes), or {IGNORE} for pixels that do not "
            "count"
        )
    return highest
