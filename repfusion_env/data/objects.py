"""Images with boxes around objects as image banks: each whole, boxes in the bank's pixels.

Shape letters: M images, S side asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from repfusion_env.config import DataConfig
from repfusion_env.data.annotations import padded_boxes
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.data.decode import Decoded, decode_each, sentences, size_of
from repfusion_env.data.folder import some
from repfusion_env.data.memory import reserve
from repfusion_env.data.squares import around, asked_size, cut, opened
from repfusion_env.data.unreadable import Unreadable

# Of a box: the part of its area that must lie within the image.
INSIDE = 0.5
# What a box reaches out of its image by through rounding, or through counting from 0 or from 1.
ROUNDING = 1.0 + 1e-3

J = TypeVar("J")


@dataclass(frozen=True)
class Scene:
    """An image as its objects are annotated.

    Args:
        image: The file.
        where: What holds the annotation, for messages.
        boxes: Left, top, right, bottom in pixels from the image's outer edge.
        names: The class of each.
        size: Width and height that the annotation was made for; None: not said.
        left_out: Objects that do not count: crowds, difficult ones.
    """

    image: Path
    where: str
    boxes: list[tuple[float, float, float, float]]
    names: list[str]
    size: tuple[int, int] | None = None
    left_out: int = 0


@dataclass(frozen=True)
class _Found:
    image: str
    boxes: Tensor  # float32 (n, 4)
    names: list[str]
    left_out: int
    small: int
    reaching_out: int


def banks(
    name: str,
    jobs: tuple[Sequence[J], Sequence[J]],
    describe: Callable[[J], Scene],
    classes: Callable[[set[str]], tuple[str, ...]],
    config: DataConfig,
    *,
    left_out: str,
) -> tuple[ImageBank, ImageBank]:
    """Read images and boxes.

    An image is kept whole: brought to ``data.image_size`` by its longer side and filled up with
    grey on both sides of the shorter one. A box is cut at the image's edges; one of which less than
    a pixel's width or height is left at this size is left out. What is left out, cut, or without
    any object is counted, and said on stderr.

    Args:
        name: Of the data set.
        jobs: What ``describe`` takes, one for each training and each held-out image.
        describe: Called by threads; its ValueError refuses the image.
        classes: All classes, in the order of the labels, by those that were met.
        config: Side, channels and limits.
        left_out: What objects that do not count are called.

    Raises:
        ValueError: An annotation or image is wrong, and ``data.skip_unreadable`` does not allow it;
            or there is no object at all.
    """
    side, channels = asked_size(config)
    train, heldout = jobs[0][: config.train_limit], jobs[1][: config.heldout_limit]
    unreadable = Unreadable(len(train) + len(heldout), config.skip_unreadable, name)
    reserve(name, (len(train), len(heldout)), (channels, side, side))
    # Threads write to it; each to its own place.
    found: dict[tuple[int, int], _Found] = {}

    def read(job: tuple[int, int, J]) -> tuple[Tensor]:
        part, index, given = job
        scene = describe(given)
        image = opened(scene.image)
        if scene.size is not None and scene.size != image.size:
            raise ValueError(
                f"data.path: {scene.where} was made for an image of {size_of(scene.size)}, but "
                f"'{scene.image}' has {size_of(image.size)} (width x height)"
            )
        square = around((0, 0, *image.size))
        cut_boxes, reaching_out = _within(scene, image.size)
        boxes = square.boxes(cut_boxes, side)
        with sentences(f"'{scene.image}'"):
            pixels = cut(image, square, side, channels)
        large = ((boxes[:, 2:] - boxes[:, :2]) >= 1.0).all(1)
        names = [one for one, kept in zip(scene.names, large.tolist(), strict=True) if kept]
        small = len(scene.names) - len(names)
        found[part, index] = _Found(
            scene.image.name, boxes[large], names, scene.left_out, small, reaching_out
        )
        return (pixels,)

    slots = [
        [(part, index, job) for index, job in enumerate(listing)]
        for part, listing in enumerate((train, heldout))
    ]
    rows = [((channels, side, side), torch.uint8)]
    parts = decode_each(name, (slots[0], slots[1]), read, rows, unreadable)
    known = [[found[part, i] for i in parts[part].kept.tolist()] for part in (0, 1)]
    everything = [*known[0], *known[1]]
    all_names = classes({one for image in everything for one in image.names})
    for own, which in zip(known, ("training", "held-out"), strict=True):
        if not any(image.names for image in own):
            small = sum(image.small for image in own)
            raise ValueError(
                f"data set '{name}': none of the {len(own):,} {which} images holds an object"
                f"{f' of a pixel or more at data.image_size {side}' if small else ''}; expected "
                "are boxes in at least one"
            )
    first, second = (
        _bank(name, part, own, all_names, unreadable.listed(index))
        for index, (part, own) in enumerate(zip(parts, known, strict=True))
    )
    unreadable.report()
    _tell(name, everything, side, left_out)
    return first, second


def _bank(
    name: str,
    part: Decoded,
    found: list[_Found],
    classes: tuple[str, ...],
    skipped: tuple[str, ...],
) -> ImageBank:
    numbers = {one: label for label, one in enumerate(classes)}
    labels = [torch.tensor([numbers[one] for one in image.names]) for image in found]
    boxes = padded_boxes([image.boxes for image in found], labels, classes)
    images = part.tensors[0]
    zeros = torch.zeros(len(images), dtype=torch.int64)
    return ImageBank(name, images, zeros, UNLABELLED, annotations={"boxes": boxes}, skipped=skipped)


def _within(scene: Scene, size: tuple[int, int]) -> tuple[Tensor, int]:
    """The boxes (n, 4), cut at the image's edges, and how many reached out of it visibly."""
    boxes = torch.tensor(scene.boxes, dtype=torch.float32).reshape(-1, 4)
    if not len(boxes):
        return boxes, 0
    limits = torch.tensor(size * 2, dtype=torch.float32)
    clipped = boxes.clamp(min=0).minimum(limits)
    areas, left = ((given[:, 2:] - given[:, :2]).clamp(min=0).prod(1) for given in (boxes, clipped))
    # Also False for what is no number.
    flat = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1))
    for wrong, what in (
        (flat, "has no area"),
        (left < INSIDE * areas, f"lies outside the image of {size_of(size)}"),
    ):
        if wrong.any():
            index = int(wrong.nonzero()[0])
            numbers = ", ".join(f"{value:g}" for value in scene.boxes[index])
            raise ValueError(
                f"data.path: {scene.where}: box {index} ('{scene.names[index]}') {what}: left, "
                f"top, right, bottom are {numbers}; expected are pixels within the image, left "
                "before right and top before bottom"
            )
    reaching_out = ((boxes - clipped).abs() > ROUNDING).any(1)
    return clipped, int(reaching_out.sum())


def _tell(name: str, found: list[_Found], side: int, left_out: str) -> None:
    counts = [
        (sum(image.left_out for image in found), left_out),
        (sum(image.small for image in found), f"smaller than a pixel at data.image_size {side}"),
    ]
    told = [f"{count:,} {what}" for count, what in counts if count]
    parts = [f"objects left out: {', '.join(told)}"] if told else []
    reaching_out = sum(image.reaching_out for image in found)
    if reaching_out:
        parts.append(f"objects cut at the edge of their image: {reaching_out:,}")
    empty = [image.image for image in found if not image.names]
    if empty:
        parts.append(f"images without an object: {len(empty):,} of {len(found):,} ({some(empty)})")
    if parts:
        print(f"data set '{name}': {'; '.join(parts)}", file=sys.stderr)
