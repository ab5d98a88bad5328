"""The course of a fine-tuning as a figure: loss, and held-out accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repfusion_env import plot_style as style


def curve_figure(curve: Sequence[dict[str, float]], *, title: str) -> Figure:
    """Training and held-out loss on the left, held-out accuracy on the right.

    Args:
        curve: Rows with step, loss, heldout_loss and accuracy, as in a ``FinetuneResult``.
        title: Stands above the panels.
    """
    figure = Figure(figsize=(9.0, 3.6), dpi=120, facecolor=style.PAPER)
    figure.text(0.075, 0.93, title, fontsize=11, color=style.INK)
    left = figure.add_axes((0.075, 0.15, 0.39, 0.62))
    right = figure.add_axes((0.575, 0.15, 0.39, 0.62))
    steps = [row["step"] for row in curve]
    style.style_axes(left)
    style.label_axes(left, "Cross-entropy", "optimizer steps", "nats")
    for key, color, name in (
        ("loss", style.BLUE, "training"),
        ("heldout_loss", style.ORANGE, "held-out"),
    ):
        values = [row[key] for row in curve]
        left.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3, label=name)
    left.legend(frameon=False, fontsize=8, labelcolor=style.INK)
    left.set_ylim(bottom=0)
    style.style_axes(right)
    style.label_axes(right, "Held-out accuracy", "optimizer steps", "%")
    accuracy = [100 * row["accuracy"] for row in curve]
    right.plot(steps, accuracy, color=style.GREEN, linewidth=1.8, marker="o", markersize=3)
    style.right_title(right, f"{accuracy[-1]:.1f} % at the end", style.GREEN)
    for axes in (left, right):
        axes.set_xlim(0, steps[-1] * 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure
