"""Pictures of images with masks, points or boxes on them, as every dense task draws them.

Shape letters: H,W image, K classes, P points, G boxes.
"""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from repfusion_env.data.annotations import IGNORE, NO_BOX

RGB = tuple[int, int, int]
# What surrounds an image that is no square.
EMPTY = 243
BACKGROUND = "background"
MASK_STRENGTH = 0.65
# Of a box's score: what is less sure is not drawn.
LEAST_SCORE = 0.3
MOST_BOXES = 50
# Points are drawn so many times larger and reduced, for round edges.
FINER = 3
# The least opacity of a point, of the surest one's.
FAINTEST = 0.2


def class_colors(classes: Sequence[str]) -> tuple[RGB | None, ...]:
    """A colour for each class, the same in every picture; None for the background.

    Names do not matter beyond that, so that the same classes without a background have the same
    colours. The first 18 are easily told apart, further ones are only all different.
    """
    palette = iter(_palette())
    return tuple(None if name.lower() == BACKGROUND else next(palette) for name in classes)


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """An image as large as a square holds, in its middle, without blur where it is enlarged.

    Args:
        image: uint8 (H, W, 3).
        side: Of the square, in pixels.

    Returns:
        uint8 (side, side, 3); light grey beside an image that is no square.
    """
    place = _Place.of(image, side)
    picture = np.full((side, side, 3), EMPTY, np.uint8)
    enlarged = Image.Resampling.NEAREST if place.scale >= 1 else Image.Resampling.BOX
    size = place.width, place.height
    picture[place.rows, place.columns] = np.asarray(Image.fromarray(image).resize(size, enlarged))
    return picture


def draw_name(image: np.ndarray, name: str, side: int) -> np.ndarray:
    """An image with the name of its class in a strip along the lower edge.

    Args:
        image: uint8 (H, W, 3).
        name: Cut where it is too long for the picture.
        side: Of the picture, in pixels.

    Returns:
        uint8 (side, side, 3).
    """
    picture = Image.fromarray(fit(image, side))
    font = ImageFont.truetype(_font(), max(9, round(side / 14)))
    margin, line = round(side / 30), round(side / 9)
    while len(name) > 1 and font.getlength(name) > side - 2 * margin:
        name = name.removesuffix("…")[:-1] + "…"
    pen = ImageDraw.Draw(picture, "RGBA")
    pen.rectangle((0, side - line, side, side), fill=(0, 0, 0, 190))
    pen.text((margin, side - line / 2), name, font=font, anchor="lm", fill=(255, 255, 255, 255))
    return np.array(picture)


def draw_masks(image: np.ndarray, mask: Tensor, side: int, classes: Sequence[str]) -> np.ndarray:
    """An image under the colours of its pixels' classes.

    The background stays as it is; pixels that do not count (:data:`IGNORE`) are striped.

    Args:
        image: uint8 (H, W, 3).
        mask: int64 (h, w) of the same proportions, ids below K or :data:`IGNORE`.
        side: Of the picture, in pixels.
        classes: Names of the K classes.

    Returns:
        uint8 (side, side, 3).
    """
    from torchvision.utils import draw_segmentation_masks

    place, picture = _Place.of(image, side), fit(image, side)
    given = Image.fromarray(mask.cpu().numpy().astype(np.uint8))
    ids = np.asarray(given.resize((place.width, place.height), Image.Resampling.NEAREST))
    inside = torch.from_numpy(picture[place.rows, place.columns].copy()).permute(2, 0, 1)
    shown = [(at, rgb) for at, rgb in enumerate(class_colors(classes)) if rgb and (ids == at).any()]
    if shown:
        layers = torch.stack([torch.from_numpy(ids == at) for at, _ in shown])
        colors = [rgb for _, rgb in shown]
        inside = draw_segmentation_masks(inside, layers, MASK_STRENGTH, colors)
    drawn = inside.permute(1, 2, 0).numpy().copy()
    # Stripes and no colour: every colour is a class.
    stripes = np.add.outer(np.arange(place.height), np.arange(place.width)) % 8 < 4
    drawn[(ids == IGNORE) & stripes] = 160
    drawn[(ids == IGNORE) & ~stripes] = 96
    picture[place.rows, place.columns] = drawn
    return picture


def draw_points(image: np.ndarray, points: Tensor, side: int) -> np.ndarray:
    """An image with its points, each number in a colour of its own.

    Args:
        image: uint8 (H, W, 3).
        points: float (P, 3): x and y in pixels, (0, 0) the centre of the pixel in the corner;
            whether the point is visible (0 or 1) or how sure it is, of any scale. What is not above
            0 is not drawn; the less sure points are fainter than the surest.
        side: Of the picture, in pixels.

    Returns:
        uint8 (side, side, 3).
    """
    place, picture = _Place.of(image, side), fit(image, side)
    rows = points.detach().cpu().double().numpy()
    sure = np.nan_to_num(rows[:, 2], nan=0.0, posinf=1.0)
    known = np.isfinite(rows[:, :2]).all(1) & (sure > 0)
    if not known.any():
        return picture
    strength = np.maximum(sure / sure[known].max(), FAINTEST)
    # The more points the smaller, or the 98 of a face would cover it.
    radius = FINER * max(1.5, side * (0.018 if len(rows) <= 20 else 0.009))
    canvas = Image.new("RGBA", (FINER * side, FINER * side))
    pen = ImageDraw.Draw(canvas)
    hues = colormaps["turbo"](np.linspace(0.08, 0.95, len(rows)))
    for index in np.flatnonzero(known):
        x, y = (FINER * value for value in place.of_centre(*rows[index, :2]))
        color = tuple(round(255 * float(part)) for part in hues[index, :3])
        alpha = round(255 * float(strength[index]))
        for size, fill in ((radius + FINER, (0, 0, 0)), (radius, color)):
            # Pixels are drawn from one end to the other, both included.
            box = x - size, y - size, x + size - 1, y + size - 1
            pen.ellipse(box, fill=(*fill, alpha))
    dots = canvas.resize((side, side), Image.Resampling.BOX)
    inside = np.zeros((side, side, 1), bool)
    inside[place.rows, place.columns] = True
    over = Image.alpha_composite(Image.fromarray(picture).convert("RGBA"), dots).convert("RGB")
    return np.where(inside, np.asarray(over), picture)


def draw_boxes(
    image: np.ndarray, boxes: Tensor, side: int, classes: Sequence[str], least: float = LEAST_SCORE
) -> np.ndarray:
    """An image with boxes in the colours of their classes, named where there is room.

    Args:
        image: uint8 (H, W, 3).
        boxes: float (G, 5): left, top, right, bottom in pixels from the image's outer edge, label,
            :data:`NO_BOX` where there is no object; or (G, 6) with a score in [0, 1] behind.
        side: Of the picture, in pixels.
        classes: Names of the classes.
        least: The least score of a box that is drawn; of more than 50 the surest are.

    Returns:
        uint8 (side, side, 3).
    """
    from torchvision.utils import draw_bounding_boxes

    place, picture = _Place.of(image, side), fit(image, side)
    width = max(1, round(side / 120))
    font_size = max(9, round(side / 20))
    rows = boxes.detach().cpu().double()
    rows = rows[rows.isfinite().all(1) & (rows[:, 4] > NO_BOX + 0.5)]
    if boxes.shape[1] > 5:
        rows = rows[rows[:, 5] >= least]
        # The surest is drawn last, over the others.
        rows = rows[rows[:, 5].argsort()][-MOST_BOXES:]
    height, wide = image.shape[:2]
    rows[:, :4] = rows[:, :4].clamp_min(0).minimum(torch.tensor([wide, height, wide, height]))
    rows = rows[(rows[:, 2:4] > rows[:, :2]).all(1)]
    if not len(rows):
        return picture
    corners = torch.tensor([place.of_box(*row[:4]) for row in rows.tolist()])
    palette, names, colors, texts = class_colors(classes), [], [], []
    for row, corner in zip(rows.tolist(), corners.tolist(), strict=True):
        color = palette[int(row[4])] or (128, 128, 128)
        text = classes[int(row[4])]
        text += f" {row[5]:.2f}" if len(row) > 5 else ""
        room = corner[2] - corner[0] - 2 * width
        names.append(text if _text_width(text, font_size) <= room else None)
        colors.append(color)
        texts.append((0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 130 else (255, 255, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = draw_bounding_boxes(
            torch.from_numpy(picture).permute(2, 0, 1),
            corners,
            labels=names,
            colors=colors,
            width=width,
            font=_font(),
            font_size=font_size,
            fill_labels=True,
            label_colors=texts,
        )
    return drawn.permute(1, 2, 0).numpy().copy()


@dataclass(frozen=True)
class _Place:
    """Where an image lies in a square picture: as large as it fits, in the middle."""

    scale: float
    left: int
    top: int
    width: int
    height: int

    @classmethod
    def of(cls, image: np.ndarray, side: int) -> _Place:
        scale = side / max(image.shape[:2])
        height, width = (max(1, round(length * scale)) for length in image.shape[:2])
        return cls(scale, (side - width) // 2, (side - height) // 2, width, height)

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)

    def of_centre(self, x: float, y: float) -> tuple[float, float]:
        """From between pixel centres to the picture's outer edge."""
        return self.left + (x + 0.5) * self.scale, self.top + (y + 0.5) * self.scale

    def of_box(self, left: float, top: float, right: float, bottom: float) -> list[int]:
        """A box's first and last column and row in the picture, at least one of each."""
        first = self.left + round(left * self.scale), self.top + round(top * self.scale)
        last = self.left + round(right * self.scale) - 1, self.top + round(bottom * self.scale) - 1
        return [*first, max(first[0], last[0]), max(first[1], last[1])]


@lru_cache(maxsize=1)
def _palette() -> tuple[RGB, ...]:
    """255 different colours: the two tens of tab20 without its greys, then hues all around."""
    tab = colormaps["tab20"]
    chosen = [tab(place)[:3] for place in (*range(0, 20, 2), *range(1, 20, 2)) if place // 2 != 7]
    turn = 0.5 * (5**0.5 - 1)  # the golden section keeps hues apart, however many there are
    for index in range(IGNORE):
        lightness = (0.35, 0.55, 0.75)[index % 3]
        chosen.append(colorsys.hls_to_rgb((0.13 + index * turn) % 1, lightness, 0.75))
    bytes_ = [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in chosen]
    return tuple(dict.fromkeys(bytes_))


def _font() -> str:
    """The one font that is there on every machine: matplotlib brings it."""
    return str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@lru_cache(maxsize=1024)
def _text_width(text: str, size: int) -> float:
    return float(ImageFont.truetype(_font(), size).getlength(text))
