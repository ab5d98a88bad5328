"""The figure of ``docs/scaling.md``: predicted rates, where a step's time goes, and the check.

Shape letters: W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from benchmarks.scaling.fit import Fit
from benchmarks.scaling.hardware import COMPILED
from benchmarks.scaling.model import Step
from benchmarks.scaling.plan import REGIMES, Plan, predict, setups
from repfusion_env import plot_style as style

RUNS = {
    "ADM-64, cache warm": style.GREEN,
    "ADM-64, on line": style.BLUE,
    "SD 1.5 at 256, latents kept": style.RED,
    "SD 1.5 at 256, on line": style.ORANGE,
}
SHARED = "ADM-64, on line"  # whose step is taken apart
PARTS = {
    "teacher": style.BLUE,
    "student": style.GREEN,
    "reward": "#8cc7a0",
    "optimizer": "#b0892e",
    "all-reduce of gradients": style.PALE_ORANGE,
    "batch norm over ranks": style.ORANGE,
    "policy's collectives": style.RED,
}
GPUS = tuple(2**power for power in range(11))
MARKS = ("o", "s", "^", "D", "v", "P")


def figure(plan: Plan, fits: Sequence[Fit]) -> Figure:
    """Draw it.

    Args:
        plan: What is predicted.
        fits: What the model says of measurements here; without any the third panel is left out.
    """
    panels = 3 if fits else 2
    drawn = Figure(figsize=(4.6 * panels, 4.5), dpi=130, facecolor=style.PAPER)
    axes = drawn.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        style.style_axes(panel)
    _rates(axes[0], plan)
    _shares(axes[1], plan)
    if fits:
        _check(axes[2], fits)
    drawn.tight_layout(w_pad=2.5)
    return drawn


def _rates(axes: Axes, plan: Plan) -> None:
    runs = setups(plan)
    for name, color in RUNS.items():
        ends = [[predict(runs[name], w, regime, plan).rate for w in GPUS] for regime in REGIMES]
        low, high = np.min(ends, axis=0), np.max(ends, axis=0)
        axes.fill_between(GPUS, low, high, color=color, alpha=0.25, linewidth=0)
        axes.plot(GPUS, high, color=color, linewidth=1.6, label=name)
        ideal = high[0] * np.array(GPUS, dtype=float)
        axes.plot(GPUS, ideal, color=color, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_yscale("log")
    axes.set_ylim(3e2, 1e7)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _gpus(axes)
    style.label_axes(axes, "Predicted decisions/s", "GPUs (H100)")
    axes.legend(fontsize=7, frameon=False, loc="lower right", labelcolor=style.INK)
    axes.text(
        0.02,
        0.98,
        "band: eager to compiled; dotted: in proportion\n"
        f"at most {plan.largest_batch:,} lanes on all GPUs",
        transform=axes.transAxes,
        fontsize=7,
        color=style.MUTED,
        va="top",
    )


def _shares(axes: Axes, plan: Plan) -> None:
    steps = [predict(setups(plan)[SHARED], w, COMPILED, plan) for w in GPUS]
    bottom = np.zeros(len(GPUS))
    places = np.arange(len(GPUS))
    for part, color in PARTS.items():
        heights = np.array([_share(found, part) for found in steps])
        axes.bar(places, heights, 0.78, bottom=bottom, color=color, label=part)
        bottom += heights
    axes.set_xticks(places[::2], [f"{w:,}" for w in GPUS[::2]])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1)
    style.label_axes(axes, f"Where the step goes: {SHARED}", "GPUs (H100), compiled")
    axes.legend(
        fontsize=7,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=3,
        columnspacing=1.0,
        handlelength=1.2,
        labelcolor=style.INK,
    )


def _share(found: Step, part: str) -> float:
    parts = found.kernels | found.collectives
    return parts.get(part, 0.0) / sum(parts.values())


def _check(axes: Axes, fits: Sequence[Fit]) -> None:
    colors = (style.BLUE, style.GREEN, style.ORANGE, style.RED, "#8e5bb5", "#2e9aa0")
    for number, found in enumerate(fits):
        measured = [sample.seconds for sample in found.samples]
        axes.plot(
            measured,
            found.others or found.fitted,
            MARKS[number % len(MARKS)],
            color=colors[number % len(colors)],
            markersize=5,
            label=found.name + ("" if found.others else " (fitted)"),
        )
    everything = [sample.seconds for found in fits for sample in found.samples]
    ends = np.array([min(everything) / 1.5, max(everything) * 1.5])
    axes.plot(ends, ends, color=style.MUTED, linewidth=0.8)
    axes.fill_between(ends, ends / 1.2, ends * 1.2, color=style.FAINT, alpha=0.7, linewidth=0)
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    style.label_axes(
        axes, "Measured here, predicted without it", "measured, seconds", "predicted, seconds"
    )
    axes.legend(fontsize=7, frameon=False, loc="upper left", labelcolor=style.INK)
    axes.text(
        0.98,
        0.02,
        "grey: within 20 %",
        transform=axes.transAxes,
        fontsize=7,
        color=style.MUTED,
        ha="right",
    )


def _gpus(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS[::2], [f"{w:,}" for w in GPUS[::2]])
