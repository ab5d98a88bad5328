"""What the panels of all figures of a comparison share: order, colour, range and words.

Colours say what kind of arm it is; what single arms are called stands beside them.
"""

from __future__ import annotations

import numpy as np

from agents.comparison.arms import GROUPS
from agents.comparison.statistics import Estimate
from agents.comparison.summary import REWARD, Summary
from agents.comparison.tables import task_name
from repfusion_env import plot_style as style

COLORS = {
    "reference": style.INK,
    "fixed": style.MUTED,
    "simple": style.MUTED,
    "bandit": style.GREEN,
    "rl": style.BLUE,
    "labels": style.RED,
    "self": style.ORANGE,
    "own": "#8e5bb5",
}
# How many times the spread of the better half an arm may lie below the best and still be shown.
OUTLIER = 5.0


def ordered(summary: Summary) -> list[str]:
    """The arms but for the sweep, group by group."""
    shown = summary.shown
    return [name for group in GROUPS for name in shown if summary.runs[name].arm.group == group]


def color(summary: Summary, name: str) -> str:
    """An arm's colour, by its group."""
    return COLORS[summary.runs[name].arm.group]


def window(
    found: dict[str, Estimate | None], scale: float, sign: float = 1.0
) -> tuple[float, float]:
    """Where the values are that can be told apart: without bad outliers, with some room.

    An arm far worse than all others, as an untrained student, would push these into one point.

    Args:
        found: By arm.
        scale: From a value to what is shown.
        sign: -1 of an error, whose outliers are high.
    """
    if sign < 0:
        turned = {
            name: found and Estimate(-found.value, -found.high, -found.low, found.runs)
            for name, found in found.items()
        }
        low, high = window(turned, scale)
        return -high, -low
    known = [estimate for estimate in found.values() if estimate is not None]
    known.sort(key=lambda estimate: -estimate.value)
    ends = [
        (
            estimate.low if np.isfinite(estimate.low) else estimate.value,
            estimate.high if np.isfinite(estimate.high) else estimate.value,
        )
        for estimate in known
    ]
    high = max(end for _, end in ends)
    low = ends[0][0]
    half = ends[len(ends) // 2][0]
    spread = max(high - half, 1e-3 * abs(high), 1e-9)
    for begin, _ in ends:
        if begin > high - OUTLIER * spread:
            low = min(low, begin)
    room = 0.07 * max(high - low, 1e-9)
    return scale * (low - room), scale * (high + room)


def panel_title(summary: Summary, task: str) -> str:
    """What a panel of one task is called; of dense tasks the metric stands below."""
    title = capital(task_name(task))
    if task == REWARD or summary.headline.name == "accuracy":
        return title
    return f"{title}\n{summary.headline.legend}"


def capital(text: str) -> str:
    """With a capital letter, but for names such as ``mIoU``."""
    return text[0].upper() + text[1:] if text[:2].islower() else text


def number(value: float) -> str:
    """With a true minus sign, without needless zeros."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")
