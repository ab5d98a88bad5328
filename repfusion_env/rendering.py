"""What a person sees of the environment: one RGB frame per call of ``render``.

Shape letters: C, H, W image; F, h, w feature map; K timesteps in the grid; k timesteps of a set;
T steps so far.
"""

from __future__ import annotations

import math
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
from repfusion_env.layer_names import short_names, shortened

# Pixels from the frame's left or top. A frame with two rows of tiles is DENSE_HEIGHT high.
WIDTH, HEIGHT, DENSE_HEIGHT, DPI = 1120, 480, 656, 100
TILE_SIDE, TILE_TOP, TILE_LEFTS = 244, 90, (28, 284, 540)
CHART_LEFT, CHART_WIDTH, CHART_HEIGHT = 850, 242, 130
BARS_TOP, CURVE_TOP = TILE_TOP, 298
LAYERS_PART, GAP_PART = 0.3, 0.1  # of the chart's width, where timesteps and layers share it
VALUES_TOP, VALUES_APART = 378, 154
SECOND_TOP, DENSE_CHART_HEIGHT = 378, 204

CLASS_VALUES = ("label", "student says")
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
        layers: The teacher's layers, where the action chooses one.
        image: (C, H, W), in [-1, 1].
        noised: What the teacher sees at the k chosen timesteps, as pictures (k, 1 or 3, h, w) of
            about [-1, 1].
        seen: What that is, in a word or two.
        feature: The teacher's feature maps there, (k, F, h, w).
        counts: Choices so far per grid entry, (K,) whole numbers.
        layer_counts: Choices so far per layer.
        chosen: Grid indices of the last decision, k of them.
        layer: Which layer it chose.
        rewards: Mean reward of each step so far, oldest first, (T,).
        timesteps: Timesteps of the last decision, k of them.
        reward: Its reward.
        label: The image's label, as text or number.
        prediction: What the student says it is.
        decisions: Decisions made so far.
        dense: Whether the answer is a picture: two more tiles take the place of label and
            prediction.
        truth: The image with what is known of it, uint8 (H, W, 3).
        answer: The image with what the student says of it, uint8 (H, W, 3).
        score: How much of it is solved, in [0, 1].
        score_name: What that is called.
    """

    grid: tuple[int, ...]
    layers: tuple[str, ...] = ()
    image: np.ndarray | None = None
    noised: np.ndarray | None = None
    seen: str = "noised"
    feature: np.ndarray | None = None
    counts: np.ndarray | None = None
    layer_counts: np.ndarray | None = None
    chosen: tuple[int, ...] = ()
    layer: int | None = None
    rewards: np.ndarray | None = None
    timesteps: tuple[int, ...] = ()
    reward: float | None = None
    label: str | int | None = None
    prediction: str | int | None = None
    decisions: int | None = None
    dense: bool = False
    truth: np.ndarray | None = None
    answer: np.ndarray | None = None
    score: float | None = None
    score_name: str = "score"


def draw_frame(frame: Frame) -> np.ndarray:
    """One frame as a new array, uint8 (480 or 656, 1120, 3); see :meth:`Renderer.draw`."""
    # The figure behind a grid is set up once and drawn by one thread at a time.
    with _DRAWING:
        return _renderer(frame.grid, frame.layers, frame.dense).draw(frame)


class Renderer:
    """Draws frames over one timestep grid; all have the same size and share no memory.

    Args:
        grid: The K timesteps of the grid, in the order of the actions.
        layers: The teacher's layers, where the action chooses one.
        dense: Whether frames show the answer as pictures, in a second row of tiles.
    """

    def __init__(
        self, grid: tuple[int, ...], layers: tuple[str, ...] = (), dense: bool = False
    ) -> None:
        self.grid, self.layers, self.dense = tuple(grid), tuple(layers), dense
        height = DENSE_HEIGHT if dense else HEIGHT
        chart_height = DENSE_CHART_HEIGHT if dense else CHART_HEIGHT
        figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor=style.PAPER)
        self._canvas = FigureCanvasAgg(figure)

        def text(x: float, y: float, content: str, size: float, color: str) -> Text:
            # A class may be called "$x$": that is no formula.
            return figure.text(
                x / WIDTH, 1 - y / height, content, fontsize=size, color=color, parse_math=False
            )

        left = TILE_LEFTS[0]
        text(left, 42, "RepFusion-v0", 14, style.INK).set_fontweight("bold")
        question = "which diffusion timestep teaches best?"
        if self.layers:
            alone = len(self.grid) == 1
            question = f"which {'layer teaches' if alone else 'timestep and layer teach'} best?"
        text(left + 158, 42, question, 10, style.MUTED)
        titles = ("image", "noised", "teacher feature (PCA)")
        self._titles = [
            text(x, TILE_TOP - 10, title, 10, style.INK)
            for x, title in zip(TILE_LEFTS, titles, strict=True)
        ]
        self._values: dict[str, Text] = {}
        names = ("decision", "timestep", "reward", *(("score",) if dense else CLASS_VALUES))
        self._names: dict[str, Text] = {}
        for index, name in enumerate(names):
            x, y = left + index * VALUES_APART, VALUES_TOP
            if dense:  # below each other, where a third tile would be
                x, y = TILE_LEFTS[2], SECOND_TOP + 8 + index * TILE_SIDE // len(names)
            self._names[name] = text(x, y, name, 9, style.MUTED)
            self._values[name] = text(x, y + (30 if dense else 36), "", 20, style.INK)
        if dense:
            for x, title in zip(TILE_LEFTS[:2], ("ground truth", "student says"), strict=True):
                text(x, SECOND_TOP - 10, title, 10, style.INK)

        def chart(top: int, title: str, x: str, start: float = 0.0, part: float = 1.0) -> Axes:
            bottom = 1 - (top + chart_height) / height
            left = (CHART_LEFT + start * CHART_WIDTH) / WIDTH
            size = (part * CHART_WIDTH / WIDTH, chart_height / height)
            axes = figure.add_axes((left, bottom, *size))
            style.style_axes(axes)
            style.label_axes(axes, title, x, size=8.5)
            return axes

        self._bars: _Bars | None = None
        self._layer_bars: _Bars | None = None
        shared = len(self.grid) > 1 and bool(self.layers)
        if len(self.grid) > 1 or not self.layers:
            part = 1 - LAYERS_PART - GAP_PART if shared else 1.0
            axes = chart(BARS_TOP, "choices so far", "timestep", part=part)
            axes.set_xticks(*style.grid_ticks(self.grid, 4 if shared else 7))
            self._bars = _Bars(axes, len(self.grid), part)
        if self.layers:
            part = LAYERS_PART if shared else 1.0
            title = "" if shared else "choices so far"
            axes = chart(BARS_TOP, title, "layer", start=1 - part, part=part)
            axes.set_xticks(*_layer_ticks(self.layers, part))
            self._layer_bars = _Bars(axes, len(self.layers), part)
        self._curve_axes = chart(SECOND_TOP if dense else CURVE_TOP, "reward", "step")
        self._set_up_curve()

    def draw(self, frame: Frame) -> np.ndarray:
        """Draw ``frame``.

        Returns:
            A new array, uint8 (480, 1120, 3), or (656, 1120, 3) where frames are dense.

        Raises:
            ValueError: ``frame`` is over another grid or other layers, or of another kind.
        """
        if frame.grid != self.grid:
            raise ValueError(
                f"the frame's grid of {len(frame.grid)} timesteps is not the renderer's of "
                f"{len(self.grid)}"
            )
        if frame.layers != self.layers:
            raise ValueError(
                f"the frame's {len(frame.layers)} layers are not the renderer's {len(self.layers)}"
            )
        if frame.dense != self.dense:
            raise ValueError(
                f"the frame is {'' if frame.dense else 'not '}dense, the renderer is the opposite"
            )
        self._update_text(frame)
        if self._bars is not None:
            self._bars.update(frame.counts, frame.chosen)
        if self._layer_bars is not None:
            chosen = () if frame.layer is None else (frame.layer,)
            self._layer_bars.update(frame.layer_counts, chosen)
        self._update_curve(frame)
        self._canvas.draw()
        pixels = np.array(self._canvas.buffer_rgba())[..., :3].copy()
        image = [] if frame.image is None else [image_colors(frame.image)]
        noised = [] if frame.noised is None else [image_colors(one) for one in frame.noised]
        feature = [] if frame.feature is None else _feature_tiles(frame.feature)
        truth, answer = ([] if one is None else [one] for one in (frame.truth, frame.answer))
        places = [(TILE_TOP, left) for left in TILE_LEFTS]
        places += [(SECOND_TOP, left) for left in TILE_LEFTS[:2]]
        shown = (image, noised, feature, *((truth, answer) if self.dense else ()))
        for (top, left), tiles in zip(places, shown, strict=False):
            place = pixels[top : top + TILE_SIDE, left : left + TILE_SIDE]
            place[:] = EMPTY_TILE
            for part, tile in zip(_parts(place, len(tiles)), tiles, strict=True):
                _fill(part, tile)
        return pixels

    def _update_text(self, frame: Frame) -> None:
        reward = None if frame.reward is None else f"{frame.reward:.3f}"
        values = {
            "decision": None if frame.decisions is None else f"{frame.decisions:,}",
            "timestep": ", ".join(map(str, frame.timesteps)) or None,
            "reward": reward and reward.replace("-", "\N{MINUS SIGN}"),
            "score": None if frame.score is None else f"{frame.score:.0%}",
            "label": frame.label,
            "student says": frame.prediction,
        }
        if self.dense:
            self._names["score"].set_text(shortened(frame.score_name.replace("_", " "), 34))
        for name in self._values:
            value = values[name]
            # A set of timesteps needs more room than a number.
            wide = name == "timestep" and len(frame.timesteps) > 1
            shown = "–" if value is None else str(value)
            self._values[name].set_text(shortened(shown, 18) if wide else _shortened(shown))
            size = 20 if len(shown) <= 10 or not wide else 12 if len(shown) <= 14 else 10
            self._values[name].set_fontsize(size)
        if not self.dense:
            known = frame.label is not None and frame.prediction is not None
            right = str(frame.label) == str(frame.prediction)
            color = (style.GREEN if right else style.RED) if known else style.INK
            self._values["student says"].set_color(color)
        at = f" at t = {values['timestep']}" if frame.timesteps else ""
        self._titles[1].set_text(shortened(f"{frame.seen}{at}", 34))
        of = "teacher" if frame.layer is None else short_names(self.layers, 17)[frame.layer]
        self._titles[2].set_text(f"{of} feature (PCA)")

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


class _Bars:
    """A bar for each of ``count`` choices, the chosen ones orange and marked."""

    def __init__(self, axes: Axes, count: int, part: float) -> None:
        self._axes, self._count = axes, count
        axes.set_xlim(-0.5 - 0.02 * count, count - 0.5 + 0.02 * count)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        points_apart = part * CHART_WIDTH / (1.04 * count) * 72 / DPI
        self._bars = LineCollection([], linewidths=max(0.75 * points_apart, 0.8), capstyle="butt")
        axes.add_collection(self._bars)
        [self._marker] = axes.plot([], [], "v", color=style.ORANGE, markersize=6, mew=0)

    def update(self, counts: np.ndarray | None, chosen: tuple[int, ...]) -> None:
        heights = np.zeros(self._count) if counts is None else np.asarray(counts)
        self._bars.set_segments([[(x, 0), (x, heights[x])] for x in range(self._count)])
        top = max(float(heights.max()), 1.0)
        self._bars.set_color(
            [style.ORANGE if x in chosen else style.BLUE for x in range(self._count)]
        )
        self._axes.set_ylim(0, 1.18 * top)
        self._marker.set_data(list(chosen), [heights[x] + 0.09 * top for x in chosen])


def image_colors(image: np.ndarray) -> np.ndarray:
    """An image (C, H, W) in [-1, 1] as uint8 (H, W, 3); values outside are clipped."""
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
def _renderer(grid: tuple[int, ...], layers: tuple[str, ...], dense: bool) -> Renderer:
    return Renderer(grid, layers, dense)


def _layer_ticks(layers: tuple[str, ...], part: float) -> tuple[list[int], list[str]]:
    """The layers' names where there is room for them, else their numbers."""
    room = int(36 * part) // len(layers)
    if room >= 8:
        return list(range(len(layers))), short_names(layers, room)
    return style.grid_ticks(range(len(layers)), 7 if part == 1 else 4)


def _feature_tiles(features: np.ndarray) -> list[np.ndarray]:
    """Maps (k, F, h, w) as k pictures in colors of the same meaning."""
    side_by_side = np.concatenate(list(features), axis=2)  # (F, h, k * w)
    return np.split(feature_colors(side_by_side), len(features), axis=1)


def _parts(place: np.ndarray, count: int) -> list[np.ndarray]:
    """Squares of ``place`` (side, side, 3) for ``count`` pictures, row by row."""
    across = math.ceil(math.sqrt(count))
    if across <= 1:
        return [place] * count
    side, gap = (place.shape[0] - 4 * (across - 1)) // across, 4
    corners = [divmod(index, across) for index in range(count)]
    return [place[y * (side + gap) :][:side, x * (side + gap) :][:, :side] for y, x in corners]


def _fill(place: np.ndarray, tile: np.ndarray) -> None:
    """Scale ``tile`` (H, W, 3) into ``place`` (side, side, 3), centred, proportions kept."""
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
