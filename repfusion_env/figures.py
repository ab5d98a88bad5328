"""The figures of a run: what was learned, and how well each fixed action does.

Shape letters: T logging points; K timesteps in the grid; A arms (fixed actions), and where they are
pairs of a timestep and a layer S layers beside A timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from repfusion_env import plot_style as style
from repfusion_env.atomic import atomic_file
from repfusion_env.layer_names import short_names

SHADES = LinearSegmentedColormap.from_list(
    "shades", ["#ffffff", "#d6e6f5", "#7fb2dd", "#2f6db5", "#0f2f5f"]
)
# Left edge and width of each panel, as parts of the figure's width; their bottom and height.
PANELS = ((0.053, 0.242), (0.372, 0.235), (0.715, 0.27))
BOTTOM, TALL = 0.14, 0.66
# Of one line for each layer; more layers than colors take shades.
LINES = (style.BLUE, style.GREEN, "#8e5bb5", "#b0892e", "#2e9aa0", style.RED)


def summary_figure(
    *,
    decisions: np.ndarray,
    reward: np.ndarray,
    counts_over_time: np.ndarray,
    grid: Sequence[int],
    reward_by_arm: np.ndarray,
    learned_counts: np.ndarray | None,
    learned_reward: float,
    random_reward: float,
    title: str,
    arms: Sequence[int | str] | None = None,
    noun: str = "timestep",
    layers: Sequence[str] = (),
    layer_counts_over_time: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    entropy_of: str = "policy",
    reward_band: np.ndarray | None = None,
) -> Figure:
    """A run in three panels: the training reward, what was chosen when, and what that is worth.

    Args:
        decisions: Decisions made at each logging point, (T,), rising.
        reward: Mean training reward there, (T,).
        counts_over_time: Choices of each grid entry since the logging point before, (T, K).
        grid: The K timesteps.
        reward_by_arm: Held-out mean reward of always doing the same, (A,), or (A, S) for pairs.
        learned_counts: The learned policy's choices on the held-out images, (A,); None where they
            are none of the arms.
        learned_reward: Its held-out mean reward.
        random_reward: The held-out mean reward of uniformly random choices.
        title: Stands above the panels.
        arms: What the A arms are called; default: the grid's timesteps.
        noun: What they are.
        layers: The teacher's layers, where actions choose one.
        layer_counts_over_time: Choices of each layer since the logging point before, (T, layers).
        entropy: Entropy in nats at each logging point, (T,).
        entropy_of: Whose it is, "policy", or "choice" where a policy does not tell its own.
        reward_band: Half the height of a band around the smoothed reward, (T,).

    Logging points without a reward or without counts (NaN) are left out.

    Raises:
        ValueError: Shapes do not fit together.
    """
    places, points = len(grid), len(decisions)
    arms = grid if arms is None else arms
    _check_shape("counts_over_time", counts_over_time, (points, places))
    if layer_counts_over_time is not None:
        _check_shape("layer_counts_over_time", layer_counts_over_time, (points, len(layers)))
    for name, values in (("reward", reward), ("entropy", entropy), ("reward_band", reward_band)):
        if values is not None:
            _check_shape(name, values, (points,))
    series = np.shape(reward_by_arm)[1:]
    _check_shape("reward_by_arm", reward_by_arm, (len(arms), *series))
    if learned_counts is not None:
        _check_shape("learned_counts", learned_counts, (len(arms),))

    # Rows that were logged for something else, an evaluation on the way, have neither.
    known = np.isfinite(reward) & np.isfinite(counts_over_time).all(axis=1)
    decisions, reward, counts_over_time = (
        np.asarray(values)[known] for values in (decisions, reward, counts_over_time)
    )
    entropy = None if entropy is None else np.asarray(entropy)[known]
    reward_band = None if reward_band is None else np.asarray(reward_band)[known]
    if layer_counts_over_time is not None:
        layer_counts_over_time = np.asarray(layer_counts_over_time)[known]

    figure = Figure(figsize=(14.4, 4.4), dpi=150, facecolor=style.PAPER)
    heading = figure.text(
        PANELS[0][0], 0.93, title, fontsize=13, color=style.INK, fontweight="bold"
    )
    heading.set_parse_math(False)
    (x_left, left), (x_middle, middle), (x_right, right) = PANELS
    training = figure.add_axes((x_left, BOTTOM, left, TALL))
    _draw_training(training, decisions, reward, reward_band, entropy, entropy_of)
    if layer_counts_over_time is None:
        axes = figure.add_axes((x_middle, BOTTOM, middle, TALL))
        _draw_choices(axes, decisions, counts_over_time, grid, "timestep")
    else:
        bottom = BOTTOM
        tall = TALL if places == 1 else 0.3 * TALL
        axes = figure.add_axes((x_middle, bottom, middle, tall))
        _draw_choices(axes, decisions, layer_counts_over_time, short_names(layers, 11), "layer")
        if places > 1:
            bottom += tall + 0.17 * TALL
            above = figure.add_axes((x_middle, bottom, middle, BOTTOM + TALL - bottom))
            _draw_choices(above, decisions, counts_over_time, grid, "timestep")
            above.set_xlabel("")
    heldout = figure.add_axes((x_right, BOTTOM, right, TALL))
    style.style_axes(heldout)
    noun = noun.partition(",")[0]  # the lines of pairs are named by their layers
    style.label_axes(heldout, f"Held-out reward by {noun}", noun, "mean reward")
    if learned_counts is not None:
        _bars_behind(heldout, np.asarray(learned_counts, dtype=np.float64))
        style.right_title(heldout, "bars: learned choices", style.ORANGE)
    _draw_arms(heldout, arms, reward_by_arm, layers, learned_reward, random_reward)
    return figure


def reward_by_arm_figure(
    arms: Sequence[int | str],
    reward: np.ndarray,
    counts: np.ndarray | None = None,
    *,
    noun: str = "timestep",
    layers: Sequence[str] = (),
) -> Figure:
    """Mean reward of each fixed action, with how often it was chosen behind it.

    Args:
        arms: What the A arms are called.
        reward: Mean reward of each, (A,), or (A, S) for pairs; NaN where it was never tried.
        counts: Choices of each, (A,).
        noun: What the arms are.
        layers: Names of the S layers.
    """
    _check_shape("reward", reward, (len(arms), *np.shape(reward)[1:]))
    figure = Figure(figsize=(6.4, 4.0), dpi=110, facecolor=style.PAPER)
    axes = figure.add_axes((0.13, 0.15, 0.82, 0.70))
    style.style_axes(axes)
    noun = noun.partition(",")[0]
    style.label_axes(axes, f"Reward by {noun}", noun, "mean reward")
    if counts is not None:
        _check_shape("counts", counts, (len(arms),))
        _bars_behind(axes, np.asarray(counts, dtype=np.float64))
        style.right_title(axes, "bars: choices", style.ORANGE)
    _reward_lines(axes, np.asarray(reward, dtype=np.float64), layers)
    _arm_axis(axes, arms)
    _fit_rewards(axes, np.asarray(reward, dtype=np.float64))
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` as PNG, atomically.

    Raises:
        OSError: The file cannot be written; an older one stays as it was.
    """
    with atomic_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def _draw_training(
    axes: Axes,
    decisions: np.ndarray,
    reward: np.ndarray,
    band: np.ndarray | None,
    entropy: np.ndarray | None,
    entropy_of: str,
) -> None:
    style.style_axes(axes)
    style.label_axes(axes, "Reward in training", "decisions", "mean reward per decision")
    smooth = style.moving_average(reward, max(1, len(reward) // 20), centred=True)
    axes.plot(decisions, reward, color=style.PALE_BLUE, linewidth=1.0)
    if band is not None:
        axes.fill_between(
            decisions, smooth - band, smooth + band, color=style.BLUE, alpha=0.15, linewidth=0
        )
    marker = "o" if len(decisions) == 1 else ""
    axes.plot(decisions, smooth, color=style.BLUE, linewidth=2.0, marker=marker)
    _decision_axis(axes, decisions)
    if entropy is not None and np.isfinite(entropy).any():
        twin = axes.twinx()
        style.style_axes(twin)
        twin.grid(visible=False)
        twin.plot(decisions, entropy, color=style.ORANGE, linewidth=1.4, linestyle=(0, (4, 2)))
        twin.set_ylim(0, 1.08 * max(float(np.nanmax(entropy)), 0.1))
        twin.tick_params(labelcolor=style.ORANGE)
        style.right_title(twin, f"{entropy_of} entropy (nats)", style.ORANGE)


def _draw_choices(
    axes: Axes, decisions: np.ndarray, counts: np.ndarray, labels: Sequence[int | str], noun: str
) -> None:
    style.style_axes(axes)
    axes.grid(visible=False)
    # A layer's name has no room beside it for what it is.
    y = noun if noun == "timestep" else ""
    style.label_axes(axes, f"{noun.capitalize()}s chosen over time", "decisions", y)
    # Pooled over neighbouring logging points, or single ones would be noise between pixels.
    groups = np.array_split(np.arange(len(decisions)), max(1, min(len(decisions), 60)))
    groups = [group for group in groups if len(group)]
    if not groups:
        return
    pooled = np.stack([counts[group].sum(axis=0) for group in groups])
    shares = pooled / np.maximum(pooled.sum(axis=1, keepdims=True), 1)
    ends = np.array([float(decisions[group[-1]]) for group in groups])
    edges = np.concatenate([[0.0], ends])
    rows = np.arange(len(labels) + 1) - 0.5
    mesh = axes.pcolormesh(
        edges, rows, shares.T, cmap=SHADES, vmin=0, vmax=float(np.quantile(shares, 0.998)) or 1.0
    )
    _decision_axis(axes, decisions)
    box = axes.get_position()
    axes.set_yticks(*style.grid_ticks(labels, max(2, round(9 * box.height / TALL))))
    figure = axes.get_figure(root=True)
    assert figure is not None
    strip = figure.add_axes((box.x1 + 0.006, box.y0, 0.006, box.height))
    scale = figure.colorbar(mesh, cax=strip)
    scale.outline.set_visible(False)  # type: ignore[operator]
    scale.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
    scale.ax.yaxis.set_major_locator(MaxNLocator(4))
    scale.ax.tick_params(labelsize=7.5, labelcolor=style.MUTED, length=0)


def _draw_arms(
    axes: Axes,
    arms: Sequence[int | str],
    reward: np.ndarray,
    layers: Sequence[str],
    learned_reward: float,
    random_reward: float,
) -> None:
    reward = np.asarray(reward, dtype=np.float64)
    _reward_lines(axes, reward, layers)
    _arm_axis(axes, arms)
    levels = np.array([*reward.flat, learned_reward, random_reward])
    _fit_rewards(axes, levels)
    # The higher line carries its label above, the lower one below: they cannot meet.
    above = learned_reward >= random_reward
    for value, name, color, up in (
        (learned_reward, "learned", style.ORANGE, above),
        (random_reward, "random", style.MUTED, not above),
    ):
        axes.axhline(value, color=color, linewidth=1.4, linestyle=(0, (5, 2)), zorder=3)
        axes.annotate(
            f"{name} {value:.3f}".replace("-", "\N{MINUS SIGN}"),
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3 if up else -3),
            textcoords="offset points",
            ha="right",
            va="bottom" if up else "top",
            fontsize=8.5,
            color=color,
        )


def _reward_lines(axes: Axes, reward: np.ndarray, layers: Sequence[str]) -> None:
    """One line over the arms, or for pairs (A, S) one for each layer."""
    lines = reward[:, None] if reward.ndim == 1 else reward
    count = lines.shape[1]
    shades = [SHADES(0.25 + 0.75 * index / count) for index in range(count)]
    names = short_names(layers, 22) if reward.ndim == 2 else [""]
    for index in range(count):
        axes.plot(
            np.arange(len(lines)),
            lines[:, index],
            color=LINES[index] if count <= len(LINES) else shades[index],
            linewidth=1.6,
            marker="o" if len(lines) <= 60 else "",
            markersize=4,
            mew=0,
            zorder=4,
            label=names[index],
        )
    if reward.ndim == 2:
        shown = axes.legend(frameon=False, fontsize=7.5, labelcolor=style.INK, handlelength=1.2)
        shown.set_zorder(6)


def _bars_behind(axes: Axes, counts: np.ndarray) -> None:
    """Shares of choices as pale bars on a second scale, which fills the lower half."""
    twin = axes.twinx()
    twin.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)
    style.style_axes(twin)
    twin.grid(visible=False)
    twin.set_yticks([])
    shares = counts / max(float(counts.sum()), 1.0)
    twin.bar(np.arange(len(counts)), shares, width=0.8, color=style.PALE_ORANGE, linewidth=0)
    twin.set_ylim(0, 2.0 * max(float(shares.max()), 1e-9))


def _arm_axis(axes: Axes, arms: Sequence[int | str]) -> None:
    numbers = all(str(arm).isdigit() for arm in arms)
    places, labels = style.grid_ticks(arms, 9 if numbers else 5)
    if not numbers:
        names = short_names([str(arm) for arm in arms], 40 // len(places))
        labels = [names[place] for place in places]
    axes.set_xticks(places, labels)
    axes.set_xlim(-0.7, len(arms) - 0.3)


def _decision_axis(axes: Axes, decisions: np.ndarray) -> None:
    axes.set_xlim(0, decisions[-1] if len(decisions) else 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))


def _thousands(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _fit_rewards(axes: Axes, levels: np.ndarray) -> None:
    """A y axis around ``levels`` with room for the lines' labels."""
    levels = levels[np.isfinite(levels)]
    if len(levels):
        margin = 0.08 * float(np.ptp(levels)) or 0.1
        axes.set_ylim(float(levels.min()) - 1.2 * margin, float(levels.max()) + 1.6 * margin)


def _check_shape(name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    if np.shape(values) != shape:
        raise ValueError(f"{name} has shape {np.shape(values)}; it must have {shape}")
