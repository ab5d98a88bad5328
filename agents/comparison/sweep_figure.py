"""The sweep over fixed timesteps, with what learned policies reach as levels beside it."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agents.comparison.arms import RANDOM
from agents.comparison.panel_style import COLORS, number, panel_title
from agents.comparison.statistics import Estimate
from agents.comparison.summary import REWARD, Summary
from repfusion_env import plot_style as style

COLUMNS = 4


def sweep_figure(summary: Summary) -> Figure:
    """A panel for each task: interquartile mean over t with its interval, and levels at the right.

    The levels are those of the best policy of each learned group by held-out reward, and of random
    timesteps, as bands of their intervals; more could not be told apart.
    """
    tasks = [task for task in (REWARD, *summary.stage_two) if task in summary.tasks]
    columns = min(COLUMNS, len(tasks))
    lines = -(-len(tasks) // columns)
    # Of dense tasks the title has a second line, which says what is drawn.
    above = 0.0 if summary.headline.name == "accuracy" else 0.18
    wide, tall, gap_x, gap_y, left, top, bottom = 2.9, 2.2, 1.55, 0.95, 0.7, 1.15, 0.6
    gap_y, top = gap_y + above, top + above
    width = left + columns * (wide + gap_x)
    height = top + lines * tall + (lines - 1) * gap_y + bottom
    figure = Figure(figsize=(width, height), dpi=150, facecolor=style.PAPER)
    for index, task in enumerate(tasks):
        row, column = divmod(index, columns)
        x = left + column * (wide + gap_x)
        y = height - top - tall - row * (tall + gap_y)
        axes = figure.add_axes((x / width, y / height, wide / width, tall / height))
        _draw_panel(axes, summary, task)
    title = figure.text(
        0.2 / width, 1 - 0.35 / height, f"{summary.plan.name}: the sweep over fixed timesteps",
        fontsize=12.5, color=style.INK, fontweight="bold",
    )  # fmt: skip
    title.set_parse_math(False)
    figure.text(
        0.2 / width,
        1 - 0.62 / height,
        "interquartile mean and 95 % bootstrap interval over seeds; levels: random t, and of "
        "bandits and reinforcement learning the best by reward, each at the cost of one point",
        fontsize=8.5,
        color=style.MUTED,
    )
    return figure


def levels(summary: Summary) -> list[str]:
    """The learned policies that are shown: of each group the best by reward."""
    shown = []
    for group in ("bandit", "rl"):
        names = [name for name in summary.learned if summary.runs[name].arm.group == group]
        scored = [(name, summary.estimate(name, REWARD)) for name in names]
        known = [(found.value, name) for name, found in scored if found is not None]
        shown += [name for _, name in sorted(known, reverse=True)[:1]]
    return shown


def _draw_panel(axes: Axes, summary: Summary, task: str) -> None:
    scale = summary.scale(task)
    timesteps = np.array([summary.runs[name].arm.timestep for name in summary.sweep], dtype=float)
    found = [summary.estimate(name, task) for name in summary.sweep]
    known = np.array([estimate is not None for estimate in found])
    kept = [estimate for estimate in found if estimate is not None]
    timesteps = timesteps[known]
    middle, low, high = (
        scale * np.array([getattr(estimate, part) for estimate in kept])
        for part in ("value", "low", "high")
    )
    style.style_axes(axes)
    style.label_axes(axes, panel_title(summary, task), "fixed timestep t", size=8.5)
    axes.fill_between(timesteps, low, high, color=style.MUTED, alpha=0.22, linewidth=0)
    axes.plot(
        timesteps, middle, color=style.INK, linewidth=1.6, marker="o", markersize=3.2, zorder=4
    )
    shown: list[tuple[float, str, str]] = []
    for name in [*levels(summary), *([RANDOM] if RANDOM in summary.runs else [])]:
        estimate = summary.estimate(name, task)
        if estimate is not None:
            group = summary.runs[name].arm.group
            ink = COLORS[group]
            dashes = (0, (4, 3)) if name == RANDOM else "-"
            _level(axes, estimate, scale, ink, dashes)
            shown.append((scale * estimate.value, summary.runs[name].arm.label, ink))
    values = np.concatenate([middle, low[np.isfinite(low)], high[np.isfinite(high)]])
    values = np.concatenate([values, [value for value, _, _ in shown]])
    if task == REWARD and values.max() < 0:
        _loss_scale(axes, values)
    else:
        margin = 0.06 * float(np.ptp(values)) or 0.1
        axes.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
    axes.yaxis.set_major_formatter(lambda value, _: number(round(value, 6)))
    _names(axes, shown)


def _loss_scale(axes: Axes, values: np.ndarray) -> None:
    """Rewards are minus a loss: on a log scale of it the good ones can be told apart."""

    def forth(reward: np.ndarray) -> np.ndarray:
        return -np.log10(np.maximum(-np.asarray(reward, dtype=float), 1e-9))

    axes.set_yscale("function", functions=(forth, lambda place: -(10.0 ** -np.asarray(place))))
    axes.set_ylim(1.15 * float(values.min()), float(values.max()) / 1.15)
    ticks = [-step * 10.0**power for power in range(-4, 4) for step in (1, 2, 5)]
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])


def _level(axes: Axes, found: Estimate, scale: float, ink: str, dashes: object) -> None:
    if np.isfinite(found.low):
        axes.axhspan(scale * found.low, scale * found.high, color=ink, alpha=0.10, linewidth=0)
    axes.axhline(scale * found.value, color=ink, linewidth=1.2, linestyle=dashes, zorder=3)  # type: ignore[arg-type]


def _names(axes: Axes, shown: list[tuple[float, str, str]]) -> None:
    """The levels' names at the right, pushed apart where they would meet."""
    step = 0.088  # of the axes' height
    transform = axes.transData + axes.transAxes.inverted()
    ordered = sorted(shown)
    places = [float(transform.transform((0.0, value))[1]) for value, _, _ in ordered]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + step)
    ceiling = 1.0
    for index in reversed(range(len(places))):  # and down again where the top is too near
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - step
    for place, (value, label, ink) in zip(places, ordered, strict=True):
        axes.annotate(
            label,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(1.06, place),
            textcoords="axes fraction",
            fontsize=7,
            color=ink,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": ink,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )
