"""Pictures: what lies where, against positions computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from repfusion_env.tasks.pictures import (
    EMPTY,
    MASK_STRENGTH,
    class_colors,
    draw_boxes,
    draw_masks,
    draw_name,
    draw_points,
    fit,
)

NAMES = ("background", "cat", "dog")


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def colored(picture: np.ndarray) -> np.ndarray:
    """Where a picture of a grey image has a colour, (H, W) bool."""
    return (picture.max(-1).astype(int) - picture.min(-1)) > 40


def centre(where: np.ndarray) -> tuple[float, float]:
    """x, y of the middle of the marked pixels, from the picture's outer edge."""
    rows, columns = np.nonzero(where)
    return columns.mean() + 0.5, rows.mean() + 0.5


def test_the_first_colors_are_far_apart_and_all_are_different():
    colors = class_colors([str(number) for number in range(255)])
    values = np.array(colors, float)
    assert len(set(colors)) == 255
    first = values[:18]
    apart = np.linalg.norm(first[:, None] - first[None], axis=-1)
    assert apart[~np.eye(18, dtype=bool)].min() > 20
    # Greys are what images without colours are made of.
    assert (first.max(1) - first.min(1)).min() > 30


def test_the_background_has_no_color_and_takes_none_from_the_others():
    assert class_colors(("Background", "cat", "dog")) == (None, *class_colors(("cat", "dog")))


def test_a_mask_colors_the_pixels_of_its_classes_alone():
    mask = torch.zeros(4, 4, dtype=torch.int64)
    mask[0, :2], mask[3, 3] = 1, 2
    picture = draw_masks(grey(4, 4), mask, 40, NAMES)
    _, cat, dog = class_colors(NAMES)
    expected = grey(4, 4).astype(float)
    for where, color in (((0, slice(0, 2)), cat), ((3, 3), dog)):
        expected[where] = 100 * (1 - MASK_STRENGTH) + MASK_STRENGTH * np.array(color)
    np.testing.assert_allclose(picture, expected.repeat(10, 0).repeat(10, 1), atol=1)


def test_a_mask_of_another_size_covers_the_same_part_of_the_image():
    coarse = torch.tensor([[0, 1], [2, 0]])
    fine = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        draw_masks(image, coarse, 32, NAMES), draw_masks(image, fine, 32, NAMES)
    )


def test_pixels_that_do_not_count_are_striped_without_a_color():
    mask = torch.full((4, 4), 255)
    mask[:, :2] = 0
    picture = draw_masks(grey(4, 4), mask, 64, NAMES)
    assert np.unique(picture[:, :32]).tolist() == [100]
    assert not colored(picture).any() and len(np.unique(picture[:, 32:])) == 2


@pytest.mark.parametrize(("height", "width"), [(10, 10), (10, 20), (20, 10)])
def test_points_lie_at_the_middle_of_their_pixel(height: int, width: int):
    points = torch.tensor([[3.0, 6.0, 1.0], [8.0, 2.0, 0.0]])
    picture = draw_points(grey(height, width), points, 200)
    x, y = centre(colored(picture))
    scale = 200 / max(height, width)
    left, top = (200 - width * scale) / 2, (200 - height * scale) / 2
    assert (x, y) == pytest.approx((left + 3.5 * scale, top + 6.5 * scale), abs=0.6)


def test_points_have_their_own_colors_and_unsure_ones_are_faint():
    points = torch.tensor([[2.0, 5.0, 0.4], [8.0, 5.0, 0.4]])
    picture = draw_points(grey(10, 10), points, 200)
    assert (picture[110, 50] != picture[110, 170]).any()
    points[1, 2] = 0.1
    faint = draw_points(grey(10, 10), points, 200)
    np.testing.assert_array_equal(faint[110, 50], picture[110, 50])
    away = np.abs(picture[110, 170].astype(float) - 100)
    np.testing.assert_allclose(np.abs(faint[110, 170].astype(float) - 100), away / 4, atol=2)


def test_points_that_are_no_numbers_or_outside_leave_the_image_as_it_is():
    points = torch.tensor([[np.nan, 1.0, 1.0], [500.0, -40.0, 1.0], [1.0, 1.0, 0.0]])
    image = grey(10, 20)
    np.testing.assert_array_equal(draw_points(image, points, 100), fit(image, 100))


def test_a_box_is_drawn_on_the_edge_of_what_it_holds():
    boxes = torch.tensor([[2.0, 3.0, 7.0, 9.0, 1.0], [0.0, 0.0, 9.0, 9.0, -1.0]])
    picture = draw_boxes(grey(10, 10), boxes, 100, NAMES)
    rows, columns = np.nonzero(colored(picture))
    found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert found == (20, 30, 70, 90)
    assert not colored(picture[45:85, 25:65]).any()
    np.testing.assert_array_equal(picture[89, 45], class_colors(NAMES)[1])


def test_a_box_beyond_the_image_ends_at_its_edge():
    boxes = torch.tensor([[-5.0, 2.0, 30.0, 8.0, 1.0], [-9.0, -9.0, -2.0, -2.0, 2.0]])
    picture = draw_boxes(grey(10, 20), boxes, 100, NAMES)
    rows, columns = np.nonzero(colored(picture))
    # Half as high as wide: 25 empty rows above and below.
    assert (columns.min(), columns.max()) == (0, 99)
    assert (rows.min(), rows.max()) == (25 + 10, 25 + 39)


def test_boxes_of_which_the_student_is_not_sure_are_left_out():
    boxes = torch.tensor([[1.0, 1.0, 9.0, 9.0, 1.0, 0.29]])
    image = grey(10, 10)
    np.testing.assert_array_equal(draw_boxes(image, boxes, 100, NAMES), fit(image, 100))
    assert colored(draw_boxes(image, boxes, 100, NAMES, least=0.2)).any()


def test_a_box_is_named_where_its_name_fits():
    wide, narrow = (torch.tensor([[1.0, 1.0, x, 9.0, 1.0]]) for x in (9.0, 2.0))
    inside = slice(15, 30), slice(12, 18)
    assert colored(draw_boxes(grey(10, 10), wide, 100, NAMES)[inside]).any()
    assert not colored(draw_boxes(grey(10, 10), narrow, 100, NAMES)[inside]).any()


@pytest.mark.parametrize(
    "draw",
    [
        lambda image, side: draw_masks(image, torch.ones(image.shape[:2]).long(), side, NAMES),
        lambda image, side: draw_points(image, torch.ones(3, 3), side),
        lambda image, side: draw_boxes(image, torch.tensor([[0.0, 0, 2, 2, 1, 1]]), side, NAMES),
        lambda image, side: draw_name(image, "a very long name of a class", side),
    ],
    ids=["masks", "points", "boxes", "name"],
)
@pytest.mark.parametrize("size", [(3, 3), (300, 300), (40, 25)])
def test_every_picture_is_a_square_of_its_own_memory(draw, size: tuple[int, int]):
    image = grey(*size)
    picture = draw(image, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert (image == 100).all() and (picture != fit(image, 64)).any()
    if size[0] != size[1]:
        assert (picture[:40, 0] == EMPTY).all()
