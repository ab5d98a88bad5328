"""Frames: what they show, pixel for pixel where that can be said."""

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from repfusion_env.layer_names import short_names
from repfusion_env.plot_style import BLUE, GREEN, ORANGE, RED, grid_ticks, moving_average
from repfusion_env.rendering import (
    BARS_TOP,
    CHART_HEIGHT,
    CHART_LEFT,
    CHART_WIDTH,
    SECOND_TOP,
    TILE_LEFTS,
    TILE_SIDE,
    TILE_TOP,
    Frame,
    Renderer,
    draw_frame,
    feature_colors,
    image_colors,
)

GRID = tuple(range(0, 1000, 40))


def frame_after(steps: int, *, size: int = 8, width: int = 12) -> Frame:
    rng = np.random.default_rng(steps)
    digit = load_digits().images[steps % 1000].repeat(size // 8, 0).repeat(size // 8, 1)
    image = (digit / 8 - 1)[None]
    counts = rng.multinomial(steps, np.ones(len(GRID)) / len(GRID))
    chosen = int(counts.argmax())
    return Frame(
        grid=GRID,
        image=image,
        noised=(image + rng.normal(size=image.shape))[None],
        feature=rng.normal(size=(1, width, 4, 4)),
        counts=counts,
        chosen=(chosen,),
        rewards=rng.normal(size=steps),
        timesteps=(GRID[chosen],),
        reward=-0.25,
        label=7,
        prediction=7,
        decisions=steps,
    )


def tile(pixels: np.ndarray, index: int) -> np.ndarray:
    left = TILE_LEFTS[index]
    return pixels[TILE_TOP : TILE_TOP + TILE_SIDE, left : left + TILE_SIDE]


def count_pixels(pixels: np.ndarray, color: str) -> int:
    return int((pixels == np.round(255 * np.array(to_rgb(color)))).all(-1).sum())


def bars(pixels: np.ndarray) -> np.ndarray:
    return pixels[BARS_TOP : BARS_TOP + CHART_HEIGHT, CHART_LEFT : CHART_LEFT + CHART_WIDTH]


@pytest.mark.parametrize(
    "frame",
    [
        Frame(grid=GRID),
        Frame(grid=(40,), counts=np.zeros(1, dtype=int)),
        Frame(grid=GRID, image=np.zeros((3, 32, 32))),
        frame_after(1),
        frame_after(3000),
        replace(frame_after(5), feature=np.ones((1, 3, 1, 1)), image=np.zeros((3, 300, 500))),
        replace(frame_after(5), rewards=np.array([np.nan, -1e30, np.inf, 2.0])),
        replace(frame_after(5), label="a class with a long name", prediction=r"$\frac$ ^_{"),
        Frame(grid=tuple(range(1000)), counts=np.arange(1000), chosen=(999,)),
    ],
    ids=["empty", "one", "first", "second", "many", "odd", "nonfinite", "text", "long grid"],
)
def test_every_frame_has_one_even_size(frame: Frame) -> None:
    pixels = draw_frame(frame)
    assert (pixels.shape, pixels.dtype) == ((480, 1120, 3), np.uint8)


def test_equal_frames_give_equal_pixels_in_memory_of_their_own() -> None:
    frame, other = frame_after(100), frame_after(2000)
    renderer = Renderer(GRID)
    first = renderer.draw(frame)
    kept = first.copy()
    renderer.draw(other)
    renderer.draw(Frame(grid=GRID))
    again = renderer.draw(frame)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, again)
    assert not np.shares_memory(first, again)
    np.testing.assert_array_equal(first, Renderer(GRID).draw(frame))
    np.testing.assert_array_equal(first, draw_frame(frame))
    assert (first != renderer.draw(other)).any()


def test_drawing_changes_no_global_state() -> None:
    settings = dict(matplotlib.rcParams)
    state = np.random.get_state()  # noqa: NPY002
    draw_frame(frame_after(10))
    assert dict(matplotlib.rcParams) == settings
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


def test_the_image_is_shown_enlarged_without_blur() -> None:
    image = np.linspace(-1, 1, 4 * 4).reshape(1, 4, 4)
    pixels = tile(draw_frame(Frame(grid=GRID, image=image)), 0)
    expected = np.round((image[0] + 1) / 2 * 255).astype(np.uint8)
    enlarged = np.kron(expected, np.ones((61, 61), dtype=np.uint8))
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], enlarged)


def test_a_wide_image_keeps_its_proportions() -> None:
    pixels = tile(draw_frame(Frame(grid=GRID, image=np.ones((3, 100, 400)))), 0)
    white = (pixels == 255).all(-1)
    assert white.any(axis=0).sum() == TILE_SIDE
    assert white.any(axis=1).sum() == TILE_SIDE // 4


def test_channels_become_red_green_and_blue_and_are_clipped() -> None:
    image = np.array([1.0, -1.0, 0.0]).reshape(3, 1, 1)
    assert image_colors(image).tolist() == [[[255, 0, 128]]]
    assert image_colors(np.array([[[9.0, -9.0, np.nan]]])).tolist() == [
        [[255] * 3, [0] * 3, [128] * 3]
    ]


def test_feature_colors_are_the_principal_components() -> None:
    feature = np.random.default_rng(0).normal(size=(20, 6, 5)) * np.arange(1, 21)[:, None, None]
    colors = feature_colors(feature).astype(float) / 255 - 0.5
    scores = PCA(3, svd_solver="full").fit_transform(feature.reshape(20, -1).T).reshape(6, 5, 3)
    for index in range(3):
        found, score = colors[..., index], scores[..., index]
        extreme = score.flat[np.abs(score).argmax()]
        np.testing.assert_allclose(found, 0.45 * score / extreme, atol=0.004)


def test_feature_colors_do_not_depend_on_scale_or_offset() -> None:
    feature = np.random.default_rng(1).normal(size=(8, 4, 4))
    np.testing.assert_array_equal(feature_colors(feature), feature_colors(1000 * feature + 5))
    np.testing.assert_array_equal(feature_colors(feature), feature_colors(feature.copy()))


@pytest.mark.parametrize(
    "feature",
    [
        np.ones((5, 4, 4)),
        np.full((5, 4, 4), 0.1) + 1e-12,
        np.random.default_rng(0).normal(size=(5, 1, 1)),
        np.full((5, 2, 2), np.inf),
    ],
    ids=["ones", "rounding", "1x1", "infinite"],
)
def test_a_feature_without_variation_is_grey(feature: np.ndarray) -> None:
    colors = feature_colors(feature)
    assert colors.shape == (*feature.shape[1:], 3)
    assert np.unique(colors).tolist() == [128]


def test_a_feature_with_one_direction_uses_one_color() -> None:
    feature = np.outer([1.0, 2.0], np.arange(9.0)).reshape(2, 3, 3)
    colors = feature_colors(feature)
    assert np.unique(colors[..., 0]).size == 9
    assert np.unique(colors[..., 1:]).tolist() == [128]


def test_bars_grow_with_the_choices_and_the_last_is_marked() -> None:
    counts = np.zeros(len(GRID), dtype=int)
    counts[3], counts[10] = 10, 5
    pixels = bars(draw_frame(Frame(grid=GRID, counts=counts, chosen=(3,))))
    blue, orange = count_pixels(pixels, BLUE), count_pixels(pixels, ORANGE)
    # Twice as high, and the marker above it.
    assert 1.9 < orange / blue < 2.4
    swapped = bars(draw_frame(Frame(grid=GRID, counts=counts, chosen=(10,))))
    assert count_pixels(swapped, BLUE) > count_pixels(swapped, ORANGE) > 0
    assert count_pixels(bars(draw_frame(Frame(grid=GRID))), ORANGE) == 0


def test_a_right_prediction_is_green_and_a_wrong_one_red() -> None:
    right = draw_frame(Frame(grid=GRID, label="cat", prediction="cat"))
    wrong = draw_frame(Frame(grid=GRID, label="cat", prediction="dog"))
    unknown = draw_frame(Frame(grid=GRID, label="cat"))
    found = [
        [count_pixels(p, color) > 0 for color in (GREEN, RED)] for p in (right, wrong, unknown)
    ]
    assert found == [[True, False], [False, True], [False, False]]


def dense_frame(steps: int = 40) -> Frame:
    rng = np.random.default_rng(1)
    truth, answer = rng.integers(0, 256, (2, TILE_SIDE, TILE_SIDE, 3), dtype=np.uint8)
    return replace(
        frame_after(steps),
        dense=True,
        label=None,
        prediction=None,
        truth=truth,
        answer=answer,
        score=0.873,
        score_name="pixel_accuracy",
    )


def second_row(pixels: np.ndarray, index: int) -> np.ndarray:
    left = TILE_LEFTS[index]
    return pixels[SECOND_TOP : SECOND_TOP + TILE_SIDE, left : left + TILE_SIDE]


def test_a_dense_frame_shows_truth_and_answer_below_the_three_tiles_of_all_frames() -> None:
    frame = dense_frame()
    pixels, flat = draw_frame(frame), draw_frame(frame_after(40))
    assert pixels.shape == (656, 1120, 3)
    np.testing.assert_array_equal(second_row(pixels, 0), frame.truth)
    np.testing.assert_array_equal(second_row(pixels, 1), frame.answer)
    for index in range(3):
        np.testing.assert_array_equal(tile(pixels, index), tile(flat, index))
    # Before the first decision there is nothing to say.
    empty = draw_frame(Frame(grid=GRID, dense=True))
    assert empty.shape == pixels.shape
    assert np.unique(second_row(empty, 0)).size == np.unique(second_row(empty, 1)).size == 1


def test_a_dense_frame_tells_how_much_is_solved_and_what_that_means() -> None:
    frame = dense_frame()
    pixels = draw_frame(frame)
    values = slice(SECOND_TOP, SECOND_TOP + TILE_SIDE), slice(TILE_LEFTS[2], TILE_LEFTS[2] + 244)
    for changed in (replace(frame, score=0.1), replace(frame, score_name="objects found")):
        assert (draw_frame(changed)[values] != pixels[values]).any()


def test_a_frame_of_the_other_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="the frame is dense, the renderer is the opposite"):
        Renderer(GRID).draw(Frame(grid=GRID, dense=True))


def test_a_frame_over_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="grid of 2 timesteps is not the renderer's of 25"):
        Renderer(GRID).draw(Frame(grid=(0, 1)))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5, 50])
def test_moving_average_is_the_mean_of_the_window(window: int, centred: bool) -> None:
    values = np.random.default_rng(0).normal(size=30)
    values[[0, 4, 5, 6, 7, 8, 9]] = np.nan
    found = moving_average(values, window, centred=centred)
    for index in range(len(values)):
        last = index + (window // 2 if centred else 0)
        inside = [values[i] for i in range(last - window + 1, last + 1) if 0 <= i < 30]
        finite = [value for value in inside if np.isfinite(value)]
        expected = np.mean(finite) if finite else np.nan
        np.testing.assert_allclose(found[index], expected, rtol=1e-12)


def test_grid_ticks_are_few_and_name_their_timestep() -> None:
    for count in [*range(1, 200), 1000]:
        grid = tuple(range(5, 5 + 3 * count, 3))
        places, labels = grid_ticks(grid, 7)
        assert 1 <= len(places) <= 7
        assert len(places) >= min(count, 4)
        assert [str(grid[place]) for place in places] == labels
        assert len(set(np.diff(places))) <= 1


LAYERS = ("down_blocks.0.resnets.1", "mid_block.resnets.1", "up_blocks.0.resnets.1")


def test_a_chosen_layer_has_its_own_bars_and_names_the_feature() -> None:
    counts = np.full(len(GRID), 10)
    first = Frame(
        grid=GRID, layers=LAYERS, counts=counts, layer_counts=np.array([20, 20, 20]), layer=0
    )
    left, right = CHART_WIDTH * 6 // 10, CHART_WIDTH * 7 // 10
    shown = bars(draw_frame(first))
    assert count_pixels(shown[:, :left], BLUE) > 0 == count_pixels(shown[:, :left], ORANGE)
    orange, blue = (count_pixels(shown[:, right:], color) for color in (ORANGE, BLUE))
    assert 0.4 < orange / blue < 0.7  # one of three bars, and its marker
    second = draw_frame(replace(first, layer=1))
    title = slice(TILE_TOP - 25, TILE_TOP), slice(TILE_LEFTS[2], TILE_LEFTS[2] + TILE_SIDE)
    assert (second[title] != draw_frame(first)[title]).any()
    # With a single timestep the layers have the whole chart.
    alone = bars(draw_frame(replace(first, grid=(40,), counts=np.array([60]))))
    assert count_pixels(alone[:, :left], ORANGE) > 0 and count_pixels(alone[:, right:], BLUE) > 0
    with pytest.raises(ValueError, match="the frame's 3 layers are not the renderer's 0"):
        Renderer(GRID).draw(first)


def test_a_set_shows_each_of_its_timesteps() -> None:
    noised = np.stack([np.full((1, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    counts = np.full(len(GRID), 10)
    frame = Frame(
        grid=GRID, counts=counts, noised=noised, chosen=(1, 5, 9), timesteps=(40, 200, 360)
    )
    pixels = draw_frame(frame)
    middle = tile(pixels, 1)
    corners = middle[40, 40], middle[40, -40], middle[-40, 40], middle[-40, -40]
    assert [int(corner[0]) for corner in corners] == [0, 128, 255, 243]
    one = count_pixels(bars(draw_frame(replace(frame, chosen=(1,)))), ORANGE)
    assert count_pixels(bars(pixels), ORANGE) == pytest.approx(3 * one, rel=0.05)


def test_features_of_a_set_share_their_colors() -> None:
    feature = np.random.default_rng(0).normal(size=(6, 4, 4))
    pixels = draw_frame(Frame(grid=GRID, feature=np.stack([feature, feature + 3.0, feature])))
    shown = tile(pixels, 2)
    side = (TILE_SIDE - 4) // 2
    first, second, third = shown[:side, :side], shown[:side, -side:], shown[-side:, :side]
    np.testing.assert_array_equal(first, third)
    assert (first != second).any()


@pytest.mark.parametrize(
    ("names", "most", "expected"),
    [
        (LAYERS, 20, ["down_blocks", "mid_block", "up_blocks"]),
        (["net.up.0.conv", "net.up.1.conv", "net.mid"], 20, ["up.0", "up.1", "mid"]),
        (["mid_block.resnets.1"], 30, ["mid_block.resnets.1"]),
        (["abcdefghijkl", "b"], 7, ["abc…jkl", "b"]),
        (["a.b", "a"], 9, ["a.b", "a"]),
    ],
)
def test_short_names_tell_layers_apart(names: list[str], most: int, expected: list[str]) -> None:
    found = short_names(names, most)
    assert found == expected
    assert all(len(name) <= most for name in found)
