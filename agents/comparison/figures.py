"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from agents.comparison.arms import BEST_FIXED, RANDOM
from agents.comparison.cost_figure import cost_figure
from agents.comparison.panel_style import capital, color, number, ordered, window
from agents.comparison.statistics import Estimate
from agents.comparison.summary import REWARD, Summary
from agents.comparison.sweep_figure import sweep_figure
from agents.comparison.tables import task_name
from repfusion_env import plot_style as style

KINDS = {
    "linear": "Linear probe",
    "head": "Head alone",
    "finetune": "Fine-tuned",
    "knn": "Nearest neighbours",
}
# Inches.
ROW, PANEL, NAMES = 0.27, 1.75, 1.9


def draw(summary: Summary) -> dict[str, Figure]:
    """The figures that the results allow, by file name without its suffix."""
    made = {
        "arms": arms_figure(summary),
        "sweep": sweep_figure(summary) if len(summary.sweep) > 1 else None,
        "cost": cost_figure(summary),
        "improvement": improvement_figure(summary),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def arms_figure(summary: Summary) -> Figure:
    """A row for each arm, a panel for each task: interquartile means with their intervals."""
    tasks = [task for task in (REWARD, *summary.stage_two) if task in summary.tasks]
    rows = ordered(summary)
    figure, panels = _dot_panels(summary, rows, len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        scale = summary.scale(task)
        found = {name: summary.estimate(name, task) for name in rows}
        _rows(axes, summary, rows, found, scale)
        _reference_lines(axes, found, scale)
        _clip(axes, summary, rows, found, task)
        head, _, labels = _task_heading(summary, task).partition("\n")
        axes.set_title(head, loc="left", fontsize=9, color=style.INK, fontweight="bold", pad=17)
        axes.text(
            0, 1, labels, transform=axes.transAxes, fontsize=8, color=style.MUTED, va="bottom"
        )
    _heading(
        figure,
        f"{summary.plan.name}: arms over {_seeds(summary)}",
        "interquartile mean, 95 % bootstrap interval; lines: best fixed t (solid), random t "
        "(dashed)",
    )
    return figure


def improvement_figure(summary: Summary) -> Figure | None:
    """How likely each arm's runs are better than random's and the best fixed one's."""
    others = [name for name in (RANDOM, BEST_FIXED) if name in summary.runs]
    kinds = [("reward", [REWARD]), (summary.headline.text, list(summary.stage_two))]
    pairs = [(other, kind, tasks) for other in others for kind, tasks in kinds if tasks]
    rows = [name for name in ordered(summary) if name != RANDOM]
    if not pairs or not rows:
        return None
    figure, panels = _dot_panels(summary, rows, len(pairs))
    for axes, (other, kind, tasks) in zip(panels, pairs, strict=True):
        found = {
            name: None if name == other else summary.improvement(name, other, tasks)
            for name in rows
        }
        axes.axvspan(0, 0.5, color=style.TILE, zorder=0, linewidth=0)
        axes.axvline(0.5, color=style.MUTED, linewidth=0.9, zorder=1)
        _rows(axes, summary, rows, found, 1.0)
        axes.set_xlim(-0.04, 1.04)
        axes.set_xticks([0, 0.5, 1.0], ["0", "0.5", "1"])
        over = summary.runs[other].arm.label
        axes.set_title(
            capital(kind), loc="left", fontsize=9, color=style.INK, fontweight="bold", pad=17
        )
        axes.text(
            0, 1, f"over {over}", transform=axes.transAxes, fontsize=8, color=style.MUTED,
            va="bottom",
        )  # fmt: skip
    _heading(
        figure,
        f"{summary.plan.name}: probability of improvement",
        f"that a run of the arm beats one of the other; {_seeds(summary)}, 95 % bootstrap "
        f"interval; {_measured(summary)}",
    )
    return figure


def _dot_panels(summary: Summary, rows: Sequence[str], count: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side over the same rows, whose names stand at the left."""
    gap, top, bottom = 0.22, 1.12, 0.42
    tall = ROW * (_places(summary, rows)[-1] + 1.2)
    width, height = NAMES + count * (PANEL + gap), top + tall + bottom
    figure = Figure(figsize=(width, height), dpi=150, facecolor=style.PAPER)
    panels = []
    for index in range(count):
        left = NAMES + index * (PANEL + gap)
        axes = figure.add_axes((left / width, bottom / height, PANEL / width, tall / height))
        style.style_axes(axes)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=style.FAINT, linewidth=0.8)
        places = _places(summary, rows)
        axes.set_ylim(places[-1] + 0.7, -0.5)
        axes.set_yticks(places, [summary.runs[name].arm.label for name in rows])
        axes.tick_params(axis="y", labelsize=8.5, labelleft=index == 0)
        if index == 0:
            for text, name in zip(axes.get_yticklabels(), rows, strict=True):
                text.set_color(color(summary, name))
        panels.append(axes)
    return figure, panels


def _places(summary: Summary, rows: Sequence[str]) -> list[float]:
    """Where the rows are: a little more room between groups."""
    places, place, last = [], 0.0, None
    for name in rows:
        group = summary.runs[name].arm.group
        place += 0.0 if last is None else 1.0 if group == last else 1.45
        places.append(place)
        last = group
    return places


def _rows(
    axes: Axes,
    summary: Summary,
    rows: Sequence[str],
    found: dict[str, Estimate | None],
    scale: float,
) -> None:
    for name, place in zip(rows, _places(summary, rows), strict=True):
        estimate = found[name]
        if estimate is None:
            continue
        if np.isfinite(estimate.low):
            axes.plot(
                [scale * estimate.low, scale * estimate.high],
                [place, place],
                color=color(summary, name),
                linewidth=2.6,
                alpha=0.38,
                solid_capstyle="round",
                zorder=3,
            )
        axes.plot(
            scale * estimate.value, place, "o", color=color(summary, name), markersize=5, zorder=4
        )
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(round(value, 6))))
    axes.tick_params(axis="x", labelsize=7.5)


def _clip(
    axes: Axes,
    summary: Summary,
    rows: Sequence[str],
    found: dict[str, Estimate | None],
    task: str,
) -> None:
    """Leave outliers out of the axis; an arrow with their value stands at its end."""
    if all(estimate is None for estimate in found.values()):
        return
    scale = summary.scale(task)
    low, high = window(found, scale, summary.sign(task))
    axes.set_xlim(low, high)
    for name, place in zip(rows, _places(summary, rows), strict=True):
        estimate = found[name]
        if estimate is None or low <= scale * estimate.value <= high:
            continue
        value = number(round(scale * estimate.value, 1))
        below = scale * estimate.value < low
        text = f"\N{BLACK LEFT-POINTING SMALL TRIANGLE} {value}"
        if not below:
            text = f"{value} \N{BLACK RIGHT-POINTING SMALL TRIANGLE}"
        axes.annotate(
            text, (0.02 if below else 0.98, place), xycoords=("axes fraction", "data"),
            fontsize=7.5, va="center", ha="left" if below else "right", color=color(summary, name),
        )  # fmt: skip


def _reference_lines(axes: Axes, found: dict[str, Estimate | None], scale: float) -> None:
    for name, dashes in ((BEST_FIXED, "-"), (RANDOM, (0, (4, 3)))):
        estimate = found.get(name)
        if estimate is not None:
            axes.axvline(
                scale * estimate.value,
                color=style.MUTED,
                linewidth=0.9,
                linestyle=dashes,
                zorder=1,
            )


def _measured(summary: Summary) -> str:
    if summary.headline.name == "accuracy":
        return "accuracy: mean over linear probes and fine-tuning"
    return f"{summary.headline.text}: mean over heads on frozen features and fine-tuning"


def _task_heading(summary: Summary, task: str) -> str:
    classes = summary.headline.name == "accuracy"
    if task == REWARD:
        return f"Held-out reward\n{'nats' if classes else 'minus the task loss'}"
    kind, _, labels = task.partition(" ")
    named = task_name(task).rpartition(", ")[2]
    if not classes:
        return f"{KINDS[kind]}, {named}\n{summary.headline.legend}"
    return (
        f"{KINDS[kind]}\n{named} of labels, %"
        if "%" in labels
        else f"{KINDS[kind]}\n{named} labels, %"
    )


def _heading(figure: Figure, title: str, below: str) -> None:
    height = figure.get_size_inches()[1]
    for text, inches, size, ink, weight in (
        (title, 0.30, 12.5, style.INK, "bold"),
        (below, 0.55, 8.5, style.MUTED, "normal"),
    ):
        shown = figure.text(
            0.15 / figure.get_size_inches()[0], 1 - inches / height, text, fontsize=size, color=ink,
            fontweight=weight,
        )  # fmt: skip
        shown.set_parse_math(False)


def _seeds(summary: Summary) -> str:
    counts = sorted({len(summary.runs[name].values) for name in summary.shown})
    span = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f"{span} {'seed' if span == '1' else 'seeds'}"
