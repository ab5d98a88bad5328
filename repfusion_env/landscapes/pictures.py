"""Pictures of a landscape: images by their best timestep, and one-step reconstructions.

Shape letters: S images, k timesteps, T timesteps, C,H,W image, c,h,w what the network sees.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repfusion_env import plot_style as style
from repfusion_env.landscapes.denoising import Denoising
from repfusion_env.landscapes.landscape import Example, Landscape
from repfusion_env.landscapes.naming import teacher_name
from repfusion_env.lane_view import as_pictures

DPI = 140


def examples_figure(found: Landscape) -> Figure:
    """Held-out images whose best timestep is lowest, and highest."""
    count = max(len(found.lowest), len(found.highest))
    wide, height = 0.35 + 1.12 * count, 4.25
    figure = Figure(figsize=(max(wide, 6.0), height), dpi=DPI, facecolor=style.PAPER)
    wide = max(wide, 6.0)
    rows = (
        ("Best at low noise", found.lowest, 2.35),
        ("Best at high noise", found.highest, 0.38),
    )
    for title, examples, bottom in rows:
        figure.text(
            0.2 / wide,
            (bottom + 1.22) / height,
            title,
            fontsize=10,
            color=style.INK,
            fontweight="bold",
        )
        for place, example in enumerate(examples):
            axes = figure.add_axes(
                ((0.2 + 1.12 * place) / wide, bottom / height, 1.0 / wide, 1.0 / height)
            )
            _show(axes, example.image)
            _caption(axes, example)
    figure.text(
        0.2 / wide,
        1 - 0.3 / height,
        f"{found.data}: best t in hindsight (noise included), class, and reward above that of "
        f"t = {found.selection.best_fixed}",
        fontsize=10,
        color=style.MUTED,
    )
    return figure


def reconstructions_figure(found: Landscape) -> Figure:
    """The teacher as a denoising autoencoder: its one-step estimates, and their error by t."""
    denoising = found.denoising
    assert isinstance(denoising, Denoising)
    images = min(len(denoising.images), 3)
    columns, side, gap = len(denoising.shown) + 1, 0.92, 0.06
    left, curve = 0.95, 3.9
    pictures = columns * (side + gap) + 0.12
    wide = left + pictures + curve
    height = 0.85 + images * 2 * (side + gap) + 0.12 * images
    figure = Figure(figsize=(wide, height), dpi=DPI, facecolor=style.PAPER)
    for image in range(images):
        top = height - 0.8 - image * (2 * (side + gap) + 0.12)
        rows = _as_shown(denoising, image)
        for row, (name, tiles) in enumerate(rows):
            bottom = top - (row + 1) * (side + gap)
            figure.text(
                (left - 0.1) / wide,
                (bottom + side / 2) / height,
                name,
                ha="right",
                va="center",
                fontsize=8.5,
                color=style.MUTED,
            )
            for column, tile in enumerate(tiles):
                if tile is None:
                    continue
                x = left + column * (side + gap) + (0.12 if column else 0.0)
                axes = figure.add_axes((x / wide, bottom / height, side / wide, side / height))
                _show(axes, tile)
                if image == 0 and row == 0:
                    title = "image" if column == 0 else f"t = {denoising.shown[column - 1]}"
                    axes.set_title(title, fontsize=9, color=style.INK, pad=4)
    x = left + pictures + 0.75
    axes = figure.add_axes((x / wide, 0.55 / height, (curve - 0.95) / wide, 1 - 1.4 / height))
    style.style_axes(axes)
    style.label_axes(axes, "Error of one step", "timestep", "of the images' variance")
    axes.plot(np.arange(len(denoising.error)), denoising.error, color=style.BLUE, linewidth=2)
    axes.axhline(1.0, color=style.MUTED, linewidth=1.0, linestyle=(0, (4, 2)))
    axes.set_ylim(0, 1.08 * max(1.0, float(denoising.error.max())))
    places, labels = style.grid_ticks(found.timesteps, 6)
    axes.set_xticks(places, labels)
    axes.annotate(
        "no better than the mean image",
        (0.02, 1.0),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color=style.MUTED,
    )
    figure.text(
        0.2 / wide,
        1 - 0.32 / height,
        f"Teacher {teacher_name(found)} as a denoising autoencoder",
        fontsize=12,
        color=style.INK,
        fontweight="bold",
    ).set_parse_math(False)
    return figure


def _as_shown(denoising: Denoising, image: int) -> list[tuple[str, list[np.ndarray | None]]]:
    """The two rows of one image, clean one first; below a picture come the latents, if any."""
    picture, clean = denoising.images[image], denoising.clean[image]
    rows: list[tuple[str, list[np.ndarray | None]]] = []
    latent = clean.shape != picture.shape
    for name, tiles in (("noised", denoising.noised), ("restored", denoising.restored)):
        shown = as_pictures(tiles[:, image], clean, picture)
        below = as_pictures(clean[None], clean, picture)[0] if latent else None
        first = picture if name == "noised" else below
        rows.append((name, [first, *shown]))
    return rows


def _show(axes: Axes, image: np.ndarray) -> None:
    """An image (C, H, W) in [-1, 1]."""
    pixels = np.clip((image + 1) / 2, 0, 1).transpose(1, 2, 0)
    gray = pixels.shape[2] != 3
    axes.imshow(
        pixels[..., 0] if gray else pixels,
        cmap="gray" if gray else None,
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _caption(axes: Axes, example: Example) -> None:
    label = example.label if len(example.label) <= 14 else example.label[:13] + "…"
    axes.set_xlabel(f"t = {example.timestep}", fontsize=9, color=style.INK, labelpad=3)
    axes.text(
        0.5,
        -0.27,
        f"{label}, {example.gain:+.2f}".replace("-", "\N{MINUS SIGN}"),
        transform=axes.transAxes,
        ha="center",
        va="top",
        fontsize=8,
        color=style.MUTED,
    ).set_parse_math(False)
