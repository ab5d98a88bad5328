"""The look that rendered frames and figures share: palette, axes and timestep labels.

Everything is set on the artists themselves; matplotlib's global settings stay as the user has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

INK = "#1f2937"
MUTED = "#6b7280"
FAINT = "#e5e7eb"
PAPER = "#ffffff"
TILE = "#f3f4f6"
BLUE = "#2f6db5"
PALE_BLUE = "#a9c8ea"
PALE_ORANGE = "#f8d7bd"
ORANGE = "#e06c1f"
GREEN = "#2c8a4b"
RED = "#c0392b"


def style_axes(axes: Axes, *, size: float = 8.0) -> None:
    """Thin light axes without a frame, horizontal grid lines behind the data."""
    axes.set_facecolor(PAPER)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(labelsize=size, labelcolor=MUTED, color=FAINT, length=3, width=0.8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def label_axes(axes: Axes, title: str, x: str = "", y: str = "", *, size: float = 9.0) -> None:
    """A left-aligned title and muted axis labels."""
    axes.set_title(title, loc="left", fontsize=size + 1, color=INK, fontweight="bold", pad=8)
    axes.set_xlabel(x, fontsize=size, color=MUTED)
    axes.set_ylabel(y, fontsize=size, color=MUTED)


def grid_ticks(grid: Sequence[int | str], most: int) -> tuple[list[int], list[str]]:
    """At most ``most`` evenly spaced grid indices, ends included, and their entries as labels.

    Charts over the grid place its K entries at 0 ... K - 1, so that bars stay readable where the
    grid's spacing grows.
    """
    count = len(grid)
    # A stride that divides K - 1 puts the last tick on the grid's end without a crowded gap.
    strides = range(1, count + 1)
    stride = next(s for s in strides if (count - 1) % s == 0 and (count - 1) // s < most)
    if (count - 1) // stride < most // 2:
        stride = max(1, -(-count // most))
    places = list(range(0, count, stride))
    return places, [str(grid[place]) for place in places]


def right_title(axes: Axes, text: str, color: str, *, size: float = 8.5) -> None:
    """Says at the right end of the title's line what the second scale shows."""
    axes.set_title(text, loc="right", fontsize=size, color=color, pad=8)


def moving_average(values: np.ndarray, window: int, *, centred: bool = False) -> np.ndarray:
    """Mean over ``window`` values around or up to each one of (T,), fewer at the ends.

    NaN are left out; where there is nothing else the mean is NaN.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ahead = window // 2 if centred else 0
    last = np.arange(len(values)) + ahead
    start = np.maximum(last + 1 - window, 0)
    end = np.minimum(last + 1, len(values))
    total = counts[end] - counts[start]
    return np.where(total > 0, (sums[end] - sums[start]) / np.maximum(total, 1), np.nan)
