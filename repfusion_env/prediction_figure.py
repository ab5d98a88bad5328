"""A few held-out images with what is known of them, and what a student says of them.

Shape letters: B images shown, N images of a call, C,H,W image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from repfusion_env import plot_style as style
from repfusion_env.data.bank import ImageBank
from repfusion_env.layer_names import shortened
from repfusion_env.rendering import image_colors
from repfusion_env.tasks import Task
from repfusion_env.tasks.pictures import LEAST_SCORE, RGB, class_colors, fit

SHOWN = 6
# Pixels.
SIDE, GAP = 240, 12
PAPER = 245  # grey level
LEFT, RIGHT, TOP, SCORES = 148, 28, 70, 34
LEGEND_ROW, LEGEND_LETTER, DPI = 24, 7.5, 100


@dataclass(frozen=True)
class Predictions:
    """Pictures of B images, each uint8 (side, side, 3), and what belongs to them.

    Attributes:
        images: As they are; none where a data set's terms forbid showing them.
        truths: With what is known of them.
        answers: With what the student says.
        scores: How much of each is solved, in [0, 1], or whether it is.
        score_name: What that is called.
        answer_name: What the student's pictures are called.
        colors: The classes that occur, by name, with their colours; empty where colours are no
            classes.
    """

    images: list[np.ndarray]
    truths: list[np.ndarray]
    answers: list[np.ndarray]
    scores: list[float | bool]
    score_name: str
    answer_name: str
    colors: dict[str, RGB]


@torch.no_grad()
def draw_predictions(
    task: Task,
    outputs: Callable[[Tensor], Any],
    bank: ImageBank,
    count: int = SHOWN,
    side: int = SIDE,
    photographs: bool = True,
) -> Predictions:
    """Draw images of a bank, the same for every student, by the task.

    Args:
        task: What is predicted.
        outputs: From images (N, C, H, W) in [-1, 1] to what a head of the task returns; in
            inference mode.
        bank: Usually the held-out images; those shown are evenly spaced in it.
        count: B, at most.
        side: Of each picture, in pixels.
        photographs: Whether the images are shown; else masks, points and boxes stand on paper.
    """
    count = min(count, len(bank))
    ids = torch.linspace(0, len(bank) - 1, count, device=bank.device).round().long()
    pixels, targets = bank.pixels(ids), task.targets(bank, ids)
    found = outputs(pixels)
    said = task.predict(found)
    images = [image_colors(image) for image in pixels.cpu().numpy()]
    if not photographs:
        images = [np.full_like(image, PAPER) for image in images]
    truths, answers = targets.cpu(), comparable(task, said, targets).cpu()
    sure = f" (score ≥ {LEAST_SCORE:g})" if task.annotation == "boxes" else ""
    return Predictions(
        images=[fit(image, side) for image in images] if photographs else [],
        truths=[task.draw(*pair, side) for pair in zip(images, truths, strict=True)],
        answers=[task.draw(*pair, side) for pair in zip(images, answers, strict=True)],
        scores=task.correct(found, targets).cpu().tolist(),
        score_name=task.score.replace("_", " "),
        answer_name=f"student says{sure}",
        colors=_colors(task, bank, truths, answers),
    )


def comparable(task: Task, said: Tensor, known: Tensor) -> Tensor:
    """Predictions without the points of which nobody knows where they are, and nobody asks.

    Args:
        task: What is predicted.
        said: Predictions (B, ...).
        known: Their targets.
    """
    if task.annotation != "keypoints":
        return said
    return torch.cat([said[..., :2], torch.where(known[..., 2:] > 0, said[..., 2:], 0.0)], dim=-1)


def prediction_figure(predictions: Predictions, title: str) -> Figure:
    """Images, ground truth and answers in three rows, with scores and the classes' colours.

    Args:
        predictions: B pictures of each.
        title: Stands above.

    Raises:
        ValueError: There are no pictures, or not as many of each.
    """
    named = {
        "image": predictions.images,
        "ground truth": predictions.truths,
        predictions.answer_name: predictions.answers,
    }
    if not predictions.images:
        del named["image"]
    columns = list(named.values())
    counts = {len(predictions.scores), *map(len, columns)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"as many pictures of each kind as scores, at least 1; not {counts}")
    (count,) = counts
    side, rows = len(predictions.truths[0]), len(columns)
    width = LEFT + count * side + (count - 1) * GAP + RIGHT
    per_row, legend_rows = _legend_grid(predictions.colors, width - LEFT - RIGHT)
    height = TOP + rows * (side + GAP) + SCORES + legend_rows * LEGEND_ROW + GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=style.PAPER)

    def text(x: float, y: float, content: str, size: float, color: str, **more: Any) -> None:
        # A class may be called "$x$": that is no formula.
        figure.text(
            x / width,
            1 - y / height,
            content,
            fontsize=size,
            color=color,
            parse_math=False,
            **more,
        )

    text(RIGHT, 40, shortened(title, width // 10), 14, style.INK, fontweight="bold")
    for row, (name, pictures) in enumerate(named.items()):
        top = TOP + row * (side + GAP)
        text(RIGHT, top + 14, name.replace(" (", "\n("), 11, style.INK, va="top")
        for column, picture in enumerate(pictures):
            x = LEFT + column * (side + GAP)
            # From the lower left, unscaled: what was drawn is what is seen.
            figure.figimage(picture, x, height - top - side, origin="upper")
    y = TOP + rows * (side + GAP) + 10
    text(RIGHT, y, shortened(predictions.score_name, 20), 9, style.MUTED)
    for column, score in enumerate(predictions.scores):
        x = LEFT + column * (side + GAP)
        if isinstance(score, bool):
            text(x, y, *(("right", 11, style.GREEN) if score else ("wrong", 11, style.RED)))
        else:
            text(x, y, f"{score:.0%}", 11, style.INK)
    for index, (name, color) in enumerate(predictions.colors.items()):
        row, column = divmod(index, per_row)
        x = LEFT + column * ((width - LEFT - RIGHT) // per_row)
        y = TOP + rows * (side + GAP) + SCORES + row * LEGEND_ROW
        shade = tuple(part / 255 for part in color)
        figure.add_artist(
            Rectangle(
                (x / width, 1 - (y + 15) / height),
                14 / width,
                14 / height,
                color=shade,
                transform=figure.transFigure,
            )
        )
        text(x + 20, y + 13, shortened(name, 30), 10, style.INK)
    return figure


def _legend_grid(colors: dict[str, RGB], width: float) -> tuple[int, int]:
    """Classes in a row of so many pixels, and rows."""
    if not colors:
        return 1, 0
    longest = min(30, max(map(len, colors)))
    per_row = max(1, int(width / (longest * LEGEND_LETTER + 44)))
    return per_row, -(-len(colors) // per_row)


def _colors(task: Task, bank: ImageBank, truths: Tensor, answers: Tensor) -> dict[str, RGB]:
    """The colours of the classes that are in the pictures."""
    if task.annotation not in ("masks", "boxes"):
        return {}
    names: Sequence[str] = bank.annotations[task.annotation].names
    if task.annotation == "boxes":
        if answers.shape[2] > 5:
            answers = answers[answers[..., 5] >= LEAST_SCORE]
        truths, answers = truths[..., 4], answers[..., 4]
    seen = {int(value) for part in (truths, answers) for value in torch.unique(part).tolist()}
    pairs = enumerate(zip(names, class_colors(names), strict=True))
    return {name: color for index, (name, color) in pairs if color and index in seen}
