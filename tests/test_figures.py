"""Figures: the numbers that are drawn are the numbers that were given."""

import resource
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from repfusion_env.figures import reward_by_arm_figure, save_figure, summary_figure

GRID = (0, 10, 50, 100, 400)


def summary(points: int = 12, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "decisions": 64 * np.arange(1, points + 1),
        "reward": rng.normal(size=points),
        "entropy": np.linspace(1.6, 0.2, points),
        "counts_over_time": rng.multinomial(64, np.ones(5) / 5, size=points),
        "grid": GRID,
        "reward_by_arm": np.array([-0.9, -0.7, -0.5, -0.6, -1.4]),
        "learned_counts": np.array([0, 10, 70, 20, 0]),
        "learned_reward": -0.52,
        "random_reward": -0.82,
        "title": "digits",
        **changes,
    }


def line_with(figure: Figure, values: np.ndarray) -> bool:
    """Whether some line of the figure has exactly these y values."""
    return any(
        np.array_equal(np.asarray(line.get_ydata(), dtype=float), values, equal_nan=True)
        for axes in figure.axes
        for line in axes.lines
    )


def levels(figure: Figure) -> list[float]:
    """Heights of the figure's horizontal lines."""
    return [
        float(line.get_ydata()[0])  # type: ignore[index]
        for axes in figure.axes
        for line in axes.lines
        if list(line.get_xdata()) == [0, 1]  # type: ignore[arg-type]
    ]


def bar_heights(figure: Figure) -> list[float]:
    return [
        bar.get_height()  # type: ignore[attr-defined]
        for axes in figure.axes
        for container in axes.containers
        for bar in container
    ]


def heat_map(figure: Figure, label: str = "timestep") -> QuadMesh:
    [axes] = [
        axes
        for axes in figure.axes
        if axes.get_ylabel() == label or axes.get_title(loc="left").startswith(label.capitalize())
    ]
    [mesh] = [item for item in axes.collections if isinstance(item, QuadMesh)]
    return mesh


def test_the_summary_draws_what_it_is_given() -> None:
    given = summary()
    figure = summary_figure(**given)
    for name in ("reward", "entropy", "reward_by_arm"):
        assert line_with(figure, given[name]), name
    assert levels(figure) == [-0.52, -0.82]
    np.testing.assert_allclose(bar_heights(figure), [0, 0.1, 0.7, 0.2, 0])
    shares = np.asarray(heat_map(figure).get_array())
    assert shares.shape == (5, 12)
    np.testing.assert_allclose(shares, given["counts_over_time"].T / 64)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["learned −0.520", "random −0.820"]


def test_the_heat_map_pools_many_logging_points() -> None:
    given = summary(points=6000)
    shares = np.asarray(heat_map(summary_figure(**given)).get_array())
    assert shares.shape == (5, 60)
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    first = given["counts_over_time"][:100].sum(axis=0) / 6400
    np.testing.assert_allclose(shares[:, 0], first)


def test_a_label_beside_wide_numbers_is_not_cut_off() -> None:
    figure = summary_figure(**summary(reward=np.linspace(-2.412, -2.208, 12)))
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].yaxis.label.get_window_extent().x0 >= 0


def test_rows_without_reward_or_counts_are_left_out() -> None:
    given = summary(points=4)
    reward = np.array([1.0, np.nan, 2.0, 3.0])
    counts = given["counts_over_time"].astype(float)
    counts[3] = np.nan
    figure = summary_figure(**{**given, "reward": reward, "counts_over_time": counts})
    assert line_with(figure, np.array([1.0, 2.0]))
    assert heat_map(figure).get_array().shape == (5, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("points", [0, 1, 2])
def test_a_short_run_has_a_figure(points: int, tmp_path: Path) -> None:
    save_figure(summary_figure(**summary(points)), tmp_path / "summary.png")
    assert Image.open(tmp_path / "summary.png").size == (2160, 660)


def test_entropy_and_band_are_optional(tmp_path: Path) -> None:
    with_band = summary(entropy=None, reward_band=np.full(12, 0.1))
    save_figure(summary_figure(**with_band), tmp_path / "summary.png")
    whose = [axes.get_title(loc="right") for axes in summary_figure(**summary()).axes]
    assert "policy entropy (nats)" in whose
    chosen = summary_figure(**summary(entropy_of="choice"))
    assert "choice entropy (nats)" in [axes.get_title(loc="right") for axes in chosen.axes]
    plain = summary_figure(**summary(entropy=None))
    assert len(plain.axes) == len(summary_figure(**summary()).axes) - 1


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("reward", (3,)),
        ("counts_over_time", (12, 4)),
        ("reward_by_arm", (6,)),
        ("learned_counts", (5, 1)),
        ("entropy", (1,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{name} has shape .*; it must have \("):
        summary_figure(**summary(**{name: np.zeros(shape)}))


def test_reward_by_arm_shows_rewards_and_shares() -> None:
    reward = np.array([-1.0, np.nan, -0.5, -0.7, -2.0])
    figure = reward_by_arm_figure(GRID, reward, np.array([0, 0, 3, 1, 0]))
    assert line_with(figure, reward)
    assert bar_heights(figure) == [0, 0, 0.75, 0.25, 0]
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["0", "10", "50", "100", "400"]
    with pytest.raises(ValueError, match="counts has shape"):
        reward_by_arm_figure(GRID, reward, np.zeros(2))


def test_figures_change_no_global_settings(tmp_path: Path) -> None:
    settings = dict(matplotlib.rcParams)
    save_figure(summary_figure(**summary()), tmp_path / "summary.png")
    assert dict(matplotlib.rcParams) == settings


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.png"
    save_figure(reward_by_arm_figure(GRID, np.arange(5.0)), path)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_figure(summary_figure(**summary()), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["summary.png"]


def test_pairs_have_a_line_for_each_layer_and_their_layers_over_time() -> None:
    rng = np.random.default_rng(1)
    reward, layers = rng.normal(size=(5, 2)), rng.multinomial(64, [0.5, 0.5], size=12)
    more = {"layers": ("mid_block.1", "up_blocks.1"), "layer_counts_over_time": layers}
    figure = summary_figure(**summary(reward_by_arm=reward, noun="timestep, layer", **more))
    assert line_with(figure, reward[:, 0]) and line_with(figure, reward[:, 1])
    [legend] = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["mid_block", "up_blocks"]
    assert heat_map(figure).get_array().shape == (5, 12)  # type: ignore[union-attr]
    np.testing.assert_allclose(np.asarray(heat_map(figure, "layer").get_array()), layers.T / 64)


def test_layers_alone_stand_where_timesteps_would() -> None:
    rng = np.random.default_rng(1)
    layers, names = rng.multinomial(64, [0.5, 0.5], size=12), ("mid_block.1", "up_blocks.1")
    figure = summary_figure(
        **summary(
            grid=(40,),
            counts_over_time=np.full((12, 1), 64),
            reward_by_arm=np.array([-0.5, -0.7]),
            learned_counts=np.array([3, 1]),
            arms=names,
            noun="layer",
            layers=names,
            layer_counts_over_time=layers,
        )
    )
    np.testing.assert_allclose(np.asarray(heat_map(figure, "layer").get_array()), layers.T / 64)
    np.testing.assert_allclose(bar_heights(figure), [0.75, 0.25])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "Held-out reward by layer" in titles and "Timesteps chosen over time" not in titles
    labels = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes]
    assert ["mid_block", "up_blocks"] in labels
    with pytest.raises(ValueError, match=r"layer_counts_over_time has shape \(12, 2\); it must"):
        summary_figure(**summary(layers=("a",), layer_counts_over_time=layers))
    # Choices that are none of the arms leave no bars.
    assert bar_heights(summary_figure(**summary(learned_counts=None))) == []
