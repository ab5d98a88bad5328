"""What an arm reaches against what it costs."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from agents.comparison.arms import BEST_FIXED, GROUPS
from agents.comparison.panel_style import color, number, ordered, panel_title, window
from agents.comparison.summary import REWARD, Summary
from repfusion_env import plot_style as style

WIDE, TALL, GAP, LEFT, TOP, BOTTOM, LEGEND = 3.9, 3.4, 0.65, 0.75, 1.1, 0.65, 1.4


def cost_figure(summary: Summary) -> Figure | None:
    """Held-out reward and headline metric against images through the teacher, on a log scale."""
    tasks = _tasks(summary)
    rows = [name for name in ordered(summary) if summary.cost(name) > 0]
    free = [name for name in ordered(summary) if summary.cost(name) == 0]
    if not tasks or not rows:
        return None
    width = LEFT + len(tasks) * (WIDE + GAP) + LEGEND
    # Of dense tasks the title has a second line, which says what is drawn.
    top = TOP if summary.headline.name == "accuracy" else TOP + 0.18
    height = top + TALL + BOTTOM
    figure = Figure(figsize=(width, height), dpi=150, facecolor=style.PAPER)
    for index, task in enumerate(tasks):
        x = LEFT + index * (WIDE + GAP)
        axes = figure.add_axes((x / width, BOTTOM / height, WIDE / width, TALL / height))
        _draw_panel(axes, summary, task, rows, free, legend=index == len(tasks) - 1)
    title = figure.text(
        0.2 / width, 1 - 0.33 / height, f"{summary.plan.name}: what it costs", fontsize=12.5,
        color=style.INK, fontweight="bold",
    )  # fmt: skip
    title.set_parse_math(False)
    figure.text(
        0.2 / width,
        1 - 0.58 / height,
        "interquartile mean and 95 % bootstrap interval against the images that one run puts "
        "through the teacher; arms of one cost stand side by side",
        fontsize=8.5,
        color=style.MUTED,
    )
    return figure


def _tasks(summary: Summary) -> list[str]:
    """Reward, and the scarcest labels' probe and fine-tuning: there arms differ most."""
    found = [REWARD] if REWARD in summary.tasks else []
    for kind in ("linear", "head", "finetune"):
        found += [task for task in summary.stage_two if task.startswith(kind)][:1]
    return found


def _draw_panel(
    axes: Axes, summary: Summary, task: str, rows: list[str], free: list[str], *, legend: bool
) -> None:
    scale = summary.scale(task)
    style.style_axes(axes)
    style.label_axes(axes, panel_title(summary, task), "images through the teacher", size=8.5)
    found = {name: summary.estimate(name, task) for name in [*free, *rows]}
    known = {name: estimate for name, estimate in found.items() if estimate is not None}
    costs = {name: summary.cost(name) for name in known if name in rows}
    if not costs:
        return
    nothing = min(costs.values()) / 4  # where arms stand that need no teacher
    costs |= {name: nothing for name in known if name in free}
    low, high = window(found, scale, summary.sign(task))
    _cost_axis(axes, nothing, max(costs.values()), any(name in free for name in known))
    axes.set_ylim(low, high)
    places = _side_by_side(list(known), costs)
    outside: list[str] = []
    for name, estimate in known.items():
        x, ink = places[name], color(summary, name)
        if not low <= scale * estimate.value <= high:
            value = number(round(scale * estimate.value, 1))
            outside.append(f"{summary.runs[name].arm.label} {value}")
            continue
        if np.isfinite(estimate.low):
            axes.plot(
                [x, x], [scale * estimate.low, scale * estimate.high], color=ink, linewidth=2.2,
                alpha=0.35, solid_capstyle="round", zorder=3,
            )  # fmt: skip
        marker = "D" if name == BEST_FIXED else "o"
        axes.plot(x, scale * estimate.value, marker, color=ink, markersize=5, zorder=4)
        if name == BEST_FIXED:
            axes.annotate(
                "best fixed t:\nthe whole sweep", (x, scale * estimate.value), xytext=(-9, 0),
                textcoords="offset points", fontsize=7.5, color=ink, ha="right", va="center",
            )  # fmt: skip
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(round(value, 6))))
    if outside:
        error = summary.sign(task) < 0
        axes.text(
            0.98, 0.98 if error else 0.02,
            ("above: " if error else "below: ") + ", ".join(outside),
            va="top" if error else "baseline", transform=axes.transAxes, fontsize=7.5,
            color=style.MUTED, ha="right",
        )  # fmt: skip
    groups = dict.fromkeys(summary.runs[name].arm.group for name in known)
    handles = [
        axes.plot([], [], "o", color=color(summary, _first(summary, group)), markersize=4.5,
                  label=GROUPS[group])[0]
        for group in groups
    ]  # fmt: skip
    if legend:
        axes.legend(
            handles=handles, frameon=False, fontsize=7.5, labelcolor=style.INK,
            loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0,
        )  # fmt: skip


def _cost_axis(axes: Axes, nothing: float, most: float, free: bool) -> None:
    axes.set_xscale("log")
    axes.set_xlim(nothing / 1.5 if free else 2.5 * nothing, most * 1.8)
    first = 10.0 ** np.floor(np.log10(2 * nothing))
    ticks = [first * step * 10.0**power for power in range(6) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if 2 * nothing < tick < 1.8 * most]
    if free:
        ticks.insert(0, nothing)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, ["none" if tick == nothing else short(tick) for tick in ticks])


def _side_by_side(names: list[str], costs: dict[str, float]) -> dict[str, float]:
    """Places on the log axis; arms of nearly one cost are spread around it."""
    crowds: dict[int, list[str]] = {}
    for name in names:
        crowds.setdefault(round(8 * float(np.log10(costs[name]))), []).append(name)
    return {
        name: costs[name] * 1.06 ** (place - (len(crowd) - 1) / 2)
        for crowd in crowds.values()
        for place, name in enumerate(crowd)
    }


def _first(summary: Summary, group: str) -> str:
    return next(name for name in ordered(summary) if summary.runs[name].arm.group == group)


def short(value: float) -> str:
    """``50 k``, ``2 M``."""
    for size, letter in ((1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
