"""What a person sees of the environment: one RGB frame per call of ``render``.

Shape letters: C, H, W image; F, h, w feature map; K timesteps in the grid; T steps so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from repfusion_env import plot_style as style

# Pixels from the frame's left or top.
WIDTH, HEIGHT, DPI = 1120, 480, 100
TILE_SIDE, TILE_TOP, TILE_LEFTS = 244, 90, (28, 284, 540)
CHART_LEFT, CHART_WIDTH, CHART_HEIGHT = 850, 242, 130
BARS_TOP, CURVE_TOP = TILE_TOP, 298
VALUES_TOP, VALUES_APART = 378, 154

EMPTY_TILE = 243
GREY = 0.5
AVERAGED_STEPS = 64
_DRAWING = Lock()
MOST_POINTS = 1500


@dataclass(frozen=True)
class Frame:
    """What one frame shows. What is None is not known yet and is drawn as an empty place.

    Attributes:
        grid: The K timesteps of the grid.
        image: (C, H, W), in [-1, 1].
        noised: The image at the chosen timestep as the teacher sees it, (C, H, W), about [-1, 1].
        feature: The teacher's feature map, (F, h, w).
        counts: Choices so far per grid entry, (K,) whole numbers.
        chosen: Grid index of the last decision.
        rewards: Mean reward of each step so far, oldest first, (T,).
        timestep: Timestep of the last decision.
        reward: Its reward.
        label: The image's label, as text or number.
        prediction: What the student says it is.
        decisions: Decisions made so far.
    """

    grid: tuple[int, ...]
    image: np.ndarray | None = None
    noised: np.ndarray | None = None
    feature: np.ndarray | None = None
    counts: np.ndarray | None = None
    chosen: int | None = None
    rewards: np.ndarray | None = None
    timestep: int | None = None
    reward: float | None = None
    label: str | int | None = None
    prediction: str | int | None = None
    decisions: int | None = None


def draw_frame(frame: Frame) -> np.ndarray:
    """One frame as a new array, uint8 (480, 1120, 3); see :meth:`Renderer.draw`."""
    # The figure behind a grid is set up once and drawn by one thread at a time.
    with _DRAWING:
        return _renderer(frame.grid).draw(frame)


class Renderer:
    """Draws frames over one timestep grid; all have the same size and share no memory.

    Args:
        grid: The K timesteps of the grid, in the order of the actions.
    """

    def __init__(self, grid: tuple[int, ...]) -> None:
        self.grid = tuple(grid)
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor=style.PAPER)
        self._canvas = FigureCanvasAgg(figure)

        def text(x: float, y: float, content: str, size: float, color: str) -> Text:
            # A class may be called "$x$": that is no formula.
            return figure.text(
                x / WIDTH, 1 - y / HEIGHT, content, fontsize=size, color=color, parse_math=False
            )

        left = TILE_LEFTS[0]
        text(left, 42, "RepFusion-v0", 14, style.INK).set_fontweight("bold")
        text(left + 158, 42, "which diffusion timestep teaches best?", 10, style.MUTED)
        titles = ("image", "noised", "teacher feature (PCA)")
        self._titles = [
            text(x, TILE_TOP - 10, title, 10, style.INK)
            for x, title in zip(TILE_LEFTS, titles, strict=True)
        ]
        self._values: dict[str, Text] = {}
        for index, name in enumerate(("decision", "timestep", "reward", "label", "student says")):
            text(left + index * VALUES_APART, VALUES_TOP, name, 9, style.MUTED)
            self._values[name] = text(
                left + index * VALUES_APART, VALUES_TOP + 36, "", 20, style.INK
            )

        def chart(top: int, title: str, x: str) -> Axes:
            bottom = 1 - (top + CHART_HEIGHT) / HEIGHT
            size = (CHART_WIDTH / WIDTH, CHART_HEIGHT / HEIGHT)
            axes = figure.add_axes((CHART_LEFT / WIDTH, bottom, *size))
            style.style_axes(axes)
            style.label_axes(axes, title, x, size=8.5)
            return axes

        self._bars_axes = chart(BARS_TOP, "choices so far", "timestep")
        self._curve_axes = chart(CURVE_TOP, "reward", "step")
        self._set_up_bars()
        self._set_up_curve()

    def draw(self, frame: Frame) -> np.ndarray:
        """Draw ``frame``.

        Returns:
            A new array, uint8 (480, 1120, 3).

        Raises:
            ValueError: ``frame`` is over another grid.
        """
        if frame.grid != self.grid:
            raise ValueError(
                f"the frame's grid of {len(frame.grid)} timesteps is not the renderer's of "
                f"{len(self.grid)}"
            )
        self._update_text(frame)
        self._update_bars(frame)
        self._update_curve(frame)
        self._canvas.draw()
        pixels = np.array(self._canvas.buffer_rgba())[..., :3].copy()
        feature = None if frame.feature is None else feature_colors(frame.feature)
        tiles = (image_colors(frame.image), image_colors(frame.noised), feature)
        for left, tile in zip(TILE_LEFTS, tiles, strict=True):
            _fill(pixels[TILE_TOP : TILE_TOP + TILE_SIDE, left : left + TILE_SIDE], tile)
        return pixels

    def _update_text(self, frame: Frame) -> None:
        reward = None if frame.reward is None else f"{frame.reward:.3f}"
        values = {
            "decision": None if frame.decisions is None else f"{frame.decisions:,}",
            "timestep": frame.timestep,
            "reward": reward and reward.replace("-", "\N{MINUS SIGN}"),
            "label": frame.label,
            "student says": frame.prediction,
        }
        for name, value in values.items():
            self._values[name].set_text("–" if value is None else _shortened(str(value)))
        known = frame.label is not None and frame.prediction is not None
        right = str(frame.label) == str(frame.prediction)
        color = (style.GREEN if right else style.RED) if known else style.INK
        self._values["student says"].set_color(color)
        at = "" if frame.timestep is None else f" at t = {frame.timestep}"
        self._titles[1].set_text(f"noised{at}")

    def _set_up_bars(self) -> None:
        axes, count = self._bars_axes, len(self.grid)
        places, labels = style.grid_ticks(self.grid, 7)
        axes.set_xticks(places, labels)
        axes.set_xlim(-0.5 - 0.02 * count, count - 0.5 + 0.02 * count)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        points_apart = CHART_WIDTH / (1.04 * count) * 72 / DPI
        self._bars = LineCollection([], linewidths=max(0.75 * points_apart, 0.8), capstyle="butt")
        axes.add_collection(self._bars)
        [self._marker] = axes.plot([], [], "v", color=style.ORANGE, markersize=6, mew=0)

    def _update_bars(self, frame: Frame) -> None:
        count = len(self.grid)
        heights = np.zeros(count) if frame.counts is None else np.asarray(frame.counts)
        self._bars.set_segments([[(x, 0), (x, heights[x])] for x in range(count)])
        colors = [style.BLUE] * count
        top = max(float(heights.max()), 1.0)
        marked: list[tuple[float, float]] = []
        if frame.chosen is not None:
            colors[frame.chosen] = style.ORANGE
            marked = [(frame.chosen, heights[frame.chosen] + 0.09 * top)]
        self._bars.set_color(colors)
        self._bars_axes.set_ylim(0, 1.18 * top)
        self._marker.set_data([x for x, _ in marked], [y for _, y in marked])

    def _set_up_curve(self) -> None:
        axes = self._curve_axes
        [self._raw] = axes.plot([], [], ".", color=style.PALE_BLUE, mew=0)
        [self._smooth] = axes.plot([], [], color=style.BLUE, linewidth=1.6)
        [self._last] = axes.plot([], [], "o", color=style.ORANGE, markersize=5, mew=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))

    def _update_curve(self, frame: Frame) -> None:
        rewards = np.asarray(() if frame.rewards is None else frame.rewards, dtype=np.float64)
        count = len(rewards)
        x = np.arange(1, count + 1)
        shown = np.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(int)
        self._raw.set_data(x[shown], rewards[shown])
        self._raw.set_markersize(3.5 if count > 200 else 6)
        smooth = style.moving_average(rewards, AVERAGED_STEPS)
        self._smooth.set_data(x[shown], smooth[shown])
        self._last.set_data(x[-1:], rewards[-1:])
        low, high = _range(rewards[np.isfinite(rewards)])
        self._curve_axes.set_ylim(low, high)
        self._curve_axes.set_xlim(-0.02 * max(count, 10), 1.02 * max(count, 10))


def image_colors(image: np.ndarray | None) -> np.ndarray | None:
    """An image (C, H, W) in [-1, 1] as uint8 (H, W, 3); values outside are clipped."""
    if image is None:
        return None
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
    pixels = pixels[:3] if pixels.shape[0] >= 3 else np.repeat(pixels[:1], 3, axis=0)
    return ((pixels.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)


def feature_colors(feature: np.ndarray) -> np.ndarray:
    """The three directions in which a feature map varies most, as red, green and blue.

    Principal components of the h * w positions over the F channels. A component's sign is the one
    that makes its largest value positive, so equal maps give equal colors; what does not vary is
    grey.

    Args:
        feature: (F, h, w).

    Returns:
        uint8 (h, w, 3).
    """
    width, *size = feature.shape
    positions = np.nan_to_num(np.asarray(feature, np.float64), posinf=0.0, neginf=0.0)
    positions = positions.reshape(width, -1).T  # (hw, F)
    centred = positions - positions.mean(axis=0)
    components, scale, _ = np.linalg.svd(centred, full_matrices=False)
    # What rounding leaves of a constant map is no variation.
    noise = 1e-6 * max(float(scale[0]), float(np.linalg.norm(positions)))
    colors = np.full((len(positions), 3), GREY)
    for index in range(min(3, len(scale))):
        if scale[index] > noise:
            component = components[:, index]
            # 0.45 and not 0.5 keeps colors off black and white.
            colors[:, index] += 0.45 * component / component[np.abs(component).argmax()]
    return (colors * 255).round().astype(np.uint8).reshape(*size, 3)


@lru_cache(maxsize=4)
def _renderer(grid: tuple[int, ...]) -> Renderer:
    return Renderer(grid)


def _fill(place: np.ndarray, tile: np.ndarray | None) -> None:
    """Scale ``tile`` (H, W, 3) into ``place`` (side, side, 3), centred, proportions kept."""
    place[:] = EMPTY_TILE
    if tile is None:
        return
    side = place.shape[0]
    factor = side / max(tile.shape[:2])
    height, width = (max(1, round(length * factor)) for length in tile.shape[:2])
    enlarged = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    top, left = (side - height) // 2, (side - width) // 2
    place[top : top + height, left : left + width] = Image.fromarray(tile).resize(
        (width, height), enlarged
    )


def _range(rewards: np.ndarray) -> tuple[float, float]:
    """The y axis: single rewards can be far out, so of many the inner 98 % and the newest count."""
    if not len(rewards):
        return -1.0, 0.0
    low, high = np.percentile(rewards, [1, 99] if len(rewards) > 50 else [0, 100])
    low, high = min(low, rewards[-1]), max(high, rewards[-1])
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    return float(low - margin), float(high + margin)


def _shortened(text: str, most: int = 10) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
