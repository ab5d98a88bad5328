"""Composite scenes made from scikit-learn's handwritten digits: several of them on a canvas.

What dense tasks need comes for free: which digit a pixel belongs to, a box around each digit, and
five points of each digit. Training scenes hold training digits alone, held-out scenes held-out
ones. The scenes are the same on every machine and for every seed of an experiment.

Shape letters: M scenes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

from repfusion_env.config import DataConfig
from repfusion_env.data.annotations import Keypoints, Masks, padded_boxes
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.data.digits import TRAIN_IMAGES
from repfusion_env.data.splits import split

SIDE = 32
SCENES = (2000, 400)
MOST_DIGITS = 3
# Sides of a digit in pixels: three of the largest just fit beside each other.
SMALLEST, LARGEST = 10, 16
# Of the ink's greatest value: what is fainter is the edge of a stroke.
INK = 0.25
SEED = 20250102
# Of each digit: its box's centre, then the ink's highest, rightmost, lowest and leftmost pixel.
POINTS = ("centre", "top", "right", "bottom", "left")


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """2,000 training and 400 held-out scenes, 1x32x32, with masks, keypoints and boxes.

    The classes of the masks are the background and the ten digits; of the boxes the digits. The
    keypoints are five of each digit (:data:`POINTS`), from the left digit to the right one, and
    invisible where there are fewer digits.
    """
    return _both()


@lru_cache(maxsize=1)
def _both() -> tuple[ImageBank, ImageBank]:
    # Drawn once in a process: a second takes as long as a whole test of a small environment.
    digits = load_digits()
    images, labels = digits.images.astype(np.float32) / 16.0, digits.target
    parts = split(len(images), train=TRAIN_IMAGES)
    names = tuple(str(name) for name in digits.target_names)
    train, heldout = (
        _scenes(images[ids.numpy()], labels[ids.numpy()], names, count, SEED + index)
        for index, (ids, count) in enumerate(zip(parts, SCENES, strict=True))
    )
    return train, heldout


def _scenes(
    digits: np.ndarray, labels: np.ndarray, names: tuple[str, ...], count: int, seed: int
) -> ImageBank:
    random = np.random.default_rng(seed)
    images = np.zeros((count, SIDE, SIDE), np.float32)
    masks = np.zeros((count, SIDE, SIDE), np.uint8)
    points = np.zeros((count, MOST_DIGITS * len(POINTS), 2), np.float32)
    visible = np.zeros(points.shape[:2], bool)
    boxes: list[Tensor] = []
    classes: list[Tensor] = []
    for scene in range(count):
        placed: list[tuple[np.ndarray, int]] = []  # ink on the canvas, class
        for left, top, side in _places(random):
            which = int(random.integers(len(digits)))
            ink = np.zeros((SIDE, SIDE), np.float32)
            ink[top : top + side, left : left + side] = _scaled(digits[which], side)
            placed.append((ink, int(labels[which])))
            # Where two touch the stronger stroke is seen.
            mine = (ink > INK) & (ink >= images[scene])
            masks[scene][mine] = labels[which] + 1
            images[scene] = np.maximum(images[scene], ink)
        placed.sort(key=lambda one: _box(one[0])[0] + _box(one[0])[2])
        for number, (ink, _) in enumerate(placed):
            rows = slice(number * len(POINTS), (number + 1) * len(POINTS))
            points[scene, rows], visible[scene, rows] = _points(ink), True
        boxes.append(torch.tensor([_box(ink) for ink, _ in placed], dtype=torch.float32))
        classes.append(torch.tensor([label for _, label in placed]))
    pixels = torch.from_numpy((images * 255).round().astype(np.uint8))[:, None]
    return ImageBank(
        "digit_scenes",
        pixels,
        torch.zeros(count, dtype=torch.int64),
        UNLABELLED,
        annotations={
            "masks": Masks(torch.from_numpy(masks), ("background", *names)),
            "keypoints": Keypoints(torch.from_numpy(points), torch.from_numpy(visible)),
            "boxes": padded_boxes(boxes, classes, names, MOST_DIGITS),
        },
    )


def _places(random: np.random.Generator) -> list[tuple[int, int, int]]:
    """Left, top and side of one to three digits that hardly overlap."""
    count = int(random.integers(1, MOST_DIGITS + 1))
    sides = random.integers(SMALLEST, LARGEST + 1, size=count)
    # The empty columns beside the digits' ink let neighbouring squares overlap a little.
    while sides.sum() > SIDE + 2 * (count - 1):
        sides[int(sides.argmax())] -= 1
    free = SIDE - int(sides.sum()) + 2 * (count - 1)
    gaps = np.diff(np.sort(random.integers(0, free + 1, size=count)), prepend=0)
    lefts, x = [], 0
    for side, gap in zip(sides, gaps, strict=True):
        lefts.append(x + int(gap))
        x = lefts[-1] + int(side) - 2
    tops = [int(random.integers(0, SIDE - side + 1)) for side in sides]
    return [
        (min(left, SIDE - int(side)), top, int(side))
        for left, top, side in zip(lefts, tops, sides, strict=True)
    ]


def _scaled(digit: np.ndarray, side: int) -> np.ndarray:
    given = torch.from_numpy(digit)[None, None]
    scaled = interpolate(given, size=(side, side), mode="bilinear", align_corners=False)
    return scaled[0, 0].numpy()


def _box(ink: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the ink, in pixels from the outer edge."""
    rows, columns = np.flatnonzero((ink > INK).any(1)), np.flatnonzero((ink > INK).any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _points(ink: np.ndarray) -> np.ndarray:
    """The five points, (5, 2); of several extreme pixels their middle."""
    left, top, right, bottom = _box(ink)
    drawn = ink > INK
    middle = [(left + right - 1) / 2, (top + bottom - 1) / 2]
    y_top, y_bottom, x_right, x_left = int(top), int(bottom - 1), int(right - 1), int(left)
    return np.array(
        [
            middle,
            [np.flatnonzero(drawn[y_top]).mean(), y_top],
            [x_right, np.flatnonzero(drawn[:, x_right]).mean()],
            [np.flatnonzero(drawn[y_bottom]).mean(), y_bottom],
            [x_left, np.flatnonzero(drawn[:, x_left]).mean()],
        ],
        np.float32,
    )
