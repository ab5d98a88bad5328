"""The figures of a landscape.

Shape letters: L layers, R rows of rewards, T timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from repfusion_env import plot_style as style
from repfusion_env.figures import LINES, SHADES
from repfusion_env.landscapes.landscape import Landscape
from repfusion_env.landscapes.naming import (
    last_part,
    layer_names,
    number,
    reward_name,
    signed,
    teacher_name,
)
from repfusion_env.landscapes.selection import Gap, Spread

# Unlike SHADES it does not begin at the color of the paper, on which a cell would be a hole.
CELLS = LinearSegmentedColormap.from_list(
    "cells", ["#eef3f8", "#c9def0", "#7fb2dd", "#2f6db5", "#0f2f5f"]
)
# On so few timesteps a cell has room for its value; a name may take so many characters.
MOST_VALUES, LONGEST_NAME = 12, 30
DPI = 140


def all_figures(found: Landscape) -> Mapping[str, Figure]:
    """Every figure by the name of its file, without the suffix."""
    from repfusion_env.landscapes.pictures import examples_figure, reconstructions_figure

    figures = {
        "maps": maps_figure(found),
        "selection": selection_figure(found),
        "representation": representation_figure(found),
        "cka": cka_figure(found),
        "images": examples_figure(found),
    }
    if not isinstance(found.denoising, str):
        figures["reconstructions"] = reconstructions_figure(found)
    return figures


def maps_figure(found: Landscape) -> Figure:
    """Probe accuracy and reward over (layer, timestep)."""
    panels = [
        ("Linear-probe accuracy (%)", 100 * found.accuracy, found.layers),
        (f"Held-out reward, {reward_name(found)}", found.reward, found.reward_rows),
    ]
    if len(found.layers) == 1:
        figure = Figure(figsize=(11.0, 3.9), dpi=DPI, facecolor=style.PAPER)
        for place, (title, values, _) in enumerate(panels):
            axes = figure.add_axes((0.07 + 0.5 * place, 0.15, 0.41, 0.65))
            _lines(axes, found, values, title, names=False)
            best = int(values[0].argmax())
            axes.plot(best, values[0, best], "o", color=style.ORANGE, markersize=7, zorder=5)
            note = f"best {number(values[0, best])} at t = {found.timesteps[best]}"
            style.right_title(axes, note, style.ORANGE)
        _heading(figure, found, 0.07, 0.92)
        return figure
    tall = 0.34 * len(found.layers)
    height = 2 * tall + 2.15
    figure = Figure(figsize=(10.4, height), dpi=DPI, facecolor=style.PAPER)
    for place, (title, values, rows) in enumerate(panels):
        bottom = (0.52 + (1 - place) * (tall + 0.75)) / height
        axes = figure.add_axes((0.205, bottom, 0.70, tall * len(rows) / len(found.layers) / height))
        _heat_map(figure, axes, found, values, rows, title, last=place == 1)
    _heading(figure, found, 0.03, 1 - 0.32 / height)
    return figure


def selection_figure(found: Landscape) -> Figure:
    """What a choice for each image is worth: gains, best timesteps, spread of the rewards."""
    figure = Figure(figsize=(14.0, 4.3), dpi=DPI, facecolor=style.PAPER)
    _gains(figure.add_axes((0.115, 0.15, 0.205, 0.64)), found)
    _best_timesteps(figure.add_axes((0.375, 0.15, 0.25, 0.64)), found)
    _spread(figure.add_axes((0.715, 0.15, 0.135, 0.64)), found)
    _heading(figure, found, 0.015, 0.925, row=True)
    return figure


def representation_figure(found: Landscape) -> Figure:
    """Effective rank, what differs between images, and norm, by timestep and layer."""
    figure = Figure(figsize=(14.0, 4.1), dpi=DPI, facecolor=style.PAPER)
    panels = (
        ("Effective rank", found.effective_rank, "of the pooled features"),
        ("Share of the energy between images", 100 * found.spread_share, "%"),
        ("Feature norm", found.norm, "mean over images"),
    )
    # Without a legend at the right the panels are wider.
    step, wide = (0.272, 0.215) if len(found.layers) > 1 else (0.325, 0.275)
    for place, (title, values, label) in enumerate(panels):
        axes = figure.add_axes((0.05 + step * place, 0.15, wide, 0.63))
        _lines(axes, found, values, title, label)
    if len(found.layers) > 1:
        handles, names = figure.axes[-1].get_legend_handles_labels()
        figure.legend(
            handles[::-1],
            names[::-1],
            loc="upper left",
            bbox_to_anchor=(0.82, 0.80),
            frameon=False,
            fontsize=8.5,
            labelcolor=style.INK,
            title="layer, deep to shallow",
            title_fontsize=8.5,
            alignment="left",
        )
    _heading(figure, found, 0.05, 0.92)
    return figure


def cka_figure(found: Landscape) -> Figure:
    """Similarity between the timesteps of each layer."""
    count = len(found.layers)
    columns = min(count, 4)
    rows = -(-count // columns)
    wide, tall, left, top = 2.75, 2.95, 0.62, 0.55
    heading = (
        "Linear CKA between timesteps (debiased)",
        "1: two timesteps tell the same of images",
    )
    text = ": ".join(heading) if columns > 2 else "\n".join(heading)
    top += 0.0 if columns > 2 else 0.2
    width = max(left + columns * wide + 0.55, 4.4)
    height = top + rows * tall + 0.02
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=style.PAPER)
    names = layer_names(found.layers, LONGEST_NAME)
    places, labels = style.grid_ticks(found.timesteps, 6)
    mesh = None
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = left + column * wide, height - top - (row + 1) * tall + 0.45
        axes = figure.add_axes((x / width, y / height, 2.2 / width, 2.2 / height))
        style.style_axes(axes)
        axes.grid(visible=False)
        mesh = axes.imshow(found.cka_debiased[index], origin="lower", cmap=CELLS, vmin=0, vmax=1)
        style.label_axes(axes, names[index], size=8.5)
        axes.set_xticks(places, labels)
        axes.set_yticks(places, labels if column == 0 else [""] * len(places))
        if index + columns >= count:
            axes.set_xlabel("timestep", fontsize=8.5, color=style.MUTED)
    assert mesh is not None
    strip = figure.add_axes(
        ((left + columns * wide - 0.35) / width, 0.47 / height, 0.1 / width, 2.2 / height)
    )
    _scale(figure, mesh, strip)
    figure.text(
        0.2 / width,
        1 - 0.2 / height,
        text,
        fontsize=12 if columns > 2 else 10,
        color=style.INK,
        fontweight="bold",
        va="top",
    )
    return figure


def layer_colors(count: int) -> list[object]:
    """One color for each layer; more layers than colors take shades from light to dark."""
    if count <= 2:
        return list(LINES[:count])
    return [SHADES(0.36 + 0.64 * index / (count - 1)) for index in range(count)]


def _heading(figure: Figure, found: Landscape, x: float, y: float, row: bool = False) -> None:
    judged = f", reward by the student of {last_part(found.run)}" if found.run else ""
    layer = f", {found.reward_rows[found.main]}" if row else ""
    teacher = f"Teacher {teacher_name(found)} on {found.data}"
    text = f"{teacher}, {found.teacher_input} input{layer}{judged}"
    figure.text(x, y, text, fontsize=12, color=style.INK, fontweight="bold").set_parse_math(False)


def _heat_map(
    figure: Figure,
    axes: Axes,
    found: Landscape,
    values: np.ndarray,
    rows: Sequence[str],
    title: str,
    last: bool,
) -> None:
    style.style_axes(axes)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    style.label_axes(axes, title, "timestep" if last else "")
    low, high = float(values.min()), float(values.max())
    low = min(low, high - 1e-9)
    mesh = axes.pcolormesh(values, cmap=CELLS, vmin=low, vmax=high, edgecolors="w", linewidth=0.6)
    told = values.shape[1] <= MOST_VALUES
    for row, best in enumerate(values.argmax(1)):
        whole = values[row, best] == high
        color = style.ORANGE if whole else style.PAPER
        x = best + (0.13 if told else 0.5)
        axes.plot(x, row + 0.5, "o", color=color, markersize=8 if whole else 4.5, mew=0)
    for row, column in np.ndindex(values.shape) if told else ():
        axes.text(
            column + 0.5,
            row + 0.5,
            number(float(values[row, column])),
            ha="center",
            va="center",
            fontsize=8,
            color=style.PAPER if values[row, column] > (low + high) / 2 else style.INK,
        )
    place = int(values.argmax()) % values.shape[1]
    note = f"best {number(high)} at t = {found.timesteps[place]}"
    style.right_title(axes, f"{note} (white: each layer's best)", style.ORANGE)
    places, labels = style.grid_ticks(found.timesteps, 14)
    axes.set_xticks(np.array(places) + 0.5, labels)
    axes.set_yticks(np.arange(len(rows)) + 0.5, layer_names(rows, LONGEST_NAME))
    for label, name in zip(axes.get_yticklabels(), rows, strict=True):
        if name == found.reward_rows[found.main]:
            label.set_fontweight("bold")
            label.set_color(style.INK)
    box = axes.get_position()
    strip = figure.add_axes((box.x1 + 0.012, box.y0, 0.011, box.height))
    _scale(figure, mesh, strip)


def _scale(figure: Figure, mesh: object, strip: Axes) -> None:
    scale = figure.colorbar(mesh, cax=strip)  # type: ignore[arg-type]
    scale.outline.set_visible(False)  # type: ignore[operator]
    scale.ax.yaxis.set_major_locator(MaxNLocator(4))
    scale.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    scale.ax.tick_params(labelsize=7.5, labelcolor=style.MUTED, length=0)


def _lines(
    axes: Axes, found: Landscape, values: np.ndarray, title: str, y: str = "", names: bool = True
) -> None:
    style.style_axes(axes)
    style.label_axes(axes, title, "timestep", y)
    shown = layer_names(found.layers, 26)
    for row, color in zip(range(len(values)), layer_colors(len(values)), strict=True):
        mine = names and len(values) > 1 and found.layers[row] == found.reward_rows[found.main]
        axes.plot(
            np.arange(len(found.timesteps)),
            values[row],
            color=style.ORANGE if mine else color,
            linewidth=2.4 if mine else 1.6,
            zorder=4 if mine else 3,
            label=shown[row] + (" (in use)" if mine else ""),
        )
    _timestep_axis(axes, found.timesteps, 7)
    if values.min() >= 0:
        axes.set_ylim(bottom=0)


def _gains(axes: Axes, found: Landscape) -> None:
    chosen = found.selection
    bars: list[tuple[str, Gap, str]] = [("best draw of each image\n(naive)", chosen.naive, "n")]
    if chosen.split_noise is not None:
        bars.append(("image's own best t\n(split noise)", chosen.split_noise, "s"))
    fixed = chosen.predictor.kind == "fixed"
    bars.append(("chosen from the\nobservation", chosen.observable, "o"))
    colors = {"n": style.FAINT, "s": style.PALE_BLUE, "o": style.BLUE}
    style.style_axes(axes)
    axes.grid(visible=False)
    axes.grid(axis="x", color=style.FAINT, linewidth=0.8)
    style.label_axes(axes, f"Gain over the best fixed t = {chosen.best_fixed}", reward_name(found))
    axes.axvline(0, color=style.INK, linewidth=1.2, zorder=4)
    ends = [0.0, *(value for _, one, _ in bars for value in (one.low, one.high))]
    span = max(ends) - min(ends) or 1.0
    for place, (_, one, kind) in enumerate(bars[::-1]):
        axes.barh(place, one.gain, height=0.55, color=colors[kind], zorder=2)
        axes.plot([one.low, one.high], [place, place], color=style.INK, linewidth=1.4, zorder=5)
        axes.annotate(
            "0: nothing beat the fixed t" if kind == "o" and fixed else signed(one.gain),
            (max(one.high, 0.0), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=style.INK,
            fontweight="bold",
        )
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars[::-1]], fontsize=8.5)
    axes.tick_params(axis="y", labelcolor=style.INK)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlim(min(ends) - 0.06 * span, max(ends) + 0.28 * span)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _best_timesteps(axes: Axes, found: Landscape) -> None:
    style.style_axes(axes)
    style.label_axes(axes, "Each image's best timestep", "timestep", "% of held-out images")
    grid = np.asarray(found.timesteps)
    counts = (found.selection.best_timesteps == grid[:, None]).mean(1) * 100
    predicted = (found.selection.predicted_timesteps == grid[:, None]).mean(1) * 100
    at = np.arange(len(grid))
    axes.bar(at, counts, width=0.8, color=style.PALE_BLUE, linewidth=0, label="best in hindsight")
    axes.step(
        np.append(at - 0.5, at[-1] + 0.5),
        np.append(predicted, predicted[-1]),
        where="post",
        color=style.BLUE,
        linewidth=1.4,
        label="chosen from the observation",
    )
    axes.set_ylim(0, 1.2 * max(float(counts.max()), float(predicted.max())))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
    twin = axes.twinx()
    style.style_axes(twin)
    twin.grid(visible=False)
    rewards = found.reward[found.main]
    twin.plot(at, rewards, color=style.ORANGE, linewidth=1.8)
    twin.tick_params(labelcolor=style.ORANGE)
    margin = 0.1 * float(np.ptp(rewards)) or 0.1
    twin.set_ylim(float(rewards.min()) - margin, float(rewards.max()) + 3 * margin)
    style.right_title(twin, "mean reward", style.ORANGE)
    axes.legend(frameon=False, fontsize=8, labelcolor=style.INK, loc="upper right")
    _timestep_axis(axes, found.timesteps, 9)
    axes.set_xlim(-0.7, len(grid) - 0.3)


def _spread(axes: Axes, found: Landscape) -> None:
    chosen = found.selection
    columns = (("whole grid", chosen.spread), (f"best {len(chosen.top)}", chosen.spread_at_top))
    parts = (
        ("timestep: what a\nfixed choice can use", "timestep", style.ORANGE),
        ("image x timestep: what a\nchoice per image could use", "interaction", style.BLUE),
        ("image: its difficulty", "image", style.PALE_BLUE),
        ("noise draw", "noise", style.FAINT),
    )
    style.style_axes(axes)
    style.label_axes(axes, "What makes rewards differ", "timesteps", "% of the variance")
    for place, (_, spread) in enumerate(columns):
        bottom = 0.0
        for name, part, color in parts:
            share = 100 * _share(spread, part)
            axes.bar(
                place,
                share,
                width=0.62,
                bottom=bottom,
                color=color,
                linewidth=0,
                label=name if place == 0 else None,
            )
            if share >= 5:
                dark = color in (style.ORANGE, style.BLUE)
                axes.text(
                    place,
                    bottom + share / 2,
                    f"{share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=style.PAPER if dark else style.INK,
                )
            bottom += share
    axes.set_xticks(range(len(columns)), [name for name, _ in columns])
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(0, 100)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        names[::-1],
        frameon=False,
        fontsize=8.5,
        labelcolor=style.INK,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        labelspacing=1.0,
        handlelength=1.2,
    )


def _share(spread: Spread, part: str) -> float:
    total = spread.timestep + spread.image + spread.interaction + spread.noise
    return float(getattr(spread, part)) / total if total else 0.0


def _timestep_axis(axes: Axes, timesteps: Sequence[int], most: int) -> None:
    places, labels = style.grid_ticks(timesteps, most)
    axes.set_xticks(places, labels)
    axes.set_xlim(-0.3, len(timesteps) - 0.7)
