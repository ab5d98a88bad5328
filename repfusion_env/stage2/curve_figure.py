"""The course of a fine-tuning as a figure: loss, and the held-out metric."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repfusion_env import plot_style as style
from repfusion_env.metric_names import metric_name
from repfusion_env.tasks import Task


def curve_figure(curve: Sequence[dict[str, float]], *, task: Task, title: str) -> Figure:
    """Training and held-out loss on the left, the task's held-out headline on the right.

    Args:
        curve: Rows with step, loss, heldout_loss and the headline, as in a ``FinetuneResult``.
        task: Whose headline it is.
        title: Stands above the panels.
    """
    figure = Figure(figsize=(9.0, 3.6), dpi=120, facecolor=style.PAPER)
    figure.text(0.075, 0.93, title, fontsize=11, color=style.INK)
    left = figure.add_axes((0.075, 0.15, 0.39, 0.62))
    right = figure.add_axes((0.575, 0.15, 0.39, 0.62))
    steps = [row["step"] for row in curve]
    style.style_axes(left)
    classes = task.annotation == "labels"
    style.label_axes(
        left, "Cross-entropy" if classes else "Loss", "optimizer steps", "nats" if classes else ""
    )
    for key, color, name in (
        ("loss", style.BLUE, "training"),
        ("heldout_loss", style.ORANGE, "held-out"),
    ):
        values = [row[key] for row in curve]
        left.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3, label=name)
    left.legend(frameon=False, fontsize=8, labelcolor=style.INK)
    left.set_ylim(bottom=0)
    style.style_axes(right)
    unit = "%" if task.percent else ""
    note = "" if task.higher_is_better else "lower is better"
    style.label_axes(
        right,
        f"Held-out {metric_name(task.headline)}",
        "optimizer steps",
        ", ".join(part for part in (unit, note) if part),
    )
    values = [(100 if task.percent else 1) * row[task.headline] for row in curve]
    right.plot(steps, values, color=style.GREEN, linewidth=1.8, marker="o", markersize=3)
    last = f"{values[-1]:.1f} %" if task.percent else f"{values[-1]:.3f}"
    style.right_title(right, f"{last} at the end", style.GREEN)
    for axes in (left, right):
        axes.set_xlim(0, steps[-1] * 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure
