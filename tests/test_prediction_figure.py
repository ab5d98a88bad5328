"""The figure of predictions: the pictures in it are those that the task draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch.nn.functional import one_hot

from repfusion_env.config_loading import load_config
from repfusion_env.data import digit_scenes, digits
from repfusion_env.data.bank import ImageBank
from repfusion_env.prediction_figure import (
    GAP,
    LEFT,
    SIDE,
    TOP,
    Predictions,
    draw_predictions,
    prediction_figure,
)
from repfusion_env.tasks import Task
from repfusion_env.tasks.build import build_task
from repfusion_env.tasks.pictures import class_colors, draw_boxes, draw_masks, draw_points


@pytest.fixture(scope="module")
def scenes() -> ImageBank:
    config = load_config(None, {"data.name": "digit_scenes"})
    return digit_scenes.load(config.data)[1].take(slice(20))


def task_of(name: str, bank: ImageBank) -> Task:
    dense = name != "classification"
    return build_task(load_config(None, {"task": name, "distillation.dense": dense}), bank)


def pixels_of(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def words_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def tile(pixels: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = TOP + row * (SIDE + GAP), LEFT + column * (SIDE + GAP)
    return pixels[top : top + SIDE, left : left + SIDE]


def made_up(count: int, **changes: Any) -> Predictions:
    pictures = np.random.default_rng(0).integers(0, 256, (3, count, SIDE, SIDE, 3), dtype=np.uint8)
    images, truths, answers = (list(part) for part in pictures)
    found = {"scores": [0.5] * count, "score_name": "pixel accuracy", "answer_name": "student says"}
    return Predictions(images, truths, answers, **{**found, "colors": {}, **changes})


@pytest.mark.parametrize("count", [1, 3])
def test_every_picture_is_where_its_row_and_column_say_untouched(count: int):
    predictions = made_up(count)
    pixels = pixels_of(prediction_figure(predictions, "a run"))
    for column in range(count):
        for row, pictures in enumerate(
            (predictions.images, predictions.truths, predictions.answers)
        ):
            np.testing.assert_array_equal(tile(pixels, row, column), pictures[column])


def test_scores_are_parts_or_right_and_wrong():
    words = words_of(prediction_figure(made_up(2, scores=[0.731, 1.0]), "a run"))
    assert {"73%", "100%", "pixel accuracy", "ground truth", "student says", "a run"} <= set(words)
    words = words_of(prediction_figure(made_up(2, scores=[True, False]), "$x_1$"))
    assert {"right", "wrong", "$x_1$"} <= set(words)


def test_all_classes_have_their_color_beside_their_name():
    names = [f"class number {index}" for index in range(40)]
    colors = {name: color for name, color in zip(names, class_colors(names), strict=True) if color}
    figure = prediction_figure(made_up(2, colors=colors), "a run")
    assert set(names) <= set(words_of(figure))
    below = pixels_of(figure)[TOP + 3 * (SIDE + GAP) :]
    for color in colors.values():
        assert 100 < (below == np.array(color)).all(-1).sum() < 300


def test_pictures_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="as many pictures of each kind as scores"):
        prediction_figure(made_up(2, scores=[1.0]), "a run")
    with pytest.raises(ValueError, match="at least 1"):
        prediction_figure(made_up(0), "a run")


def test_masks_of_a_student_that_knows_them_equal_the_truth(scenes: ImageBank):
    task, masks = task_of("segmentation", scenes), scenes.annotations["masks"]
    ids = torch.linspace(0, 19, 6).round().long()

    def knowing(images: torch.Tensor) -> torch.Tensor:
        assert torch.equal(images, scenes.pixels(ids))
        return one_hot(masks.values[ids].long(), len(masks.classes)).permute(0, 3, 1, 2).float()

    found = draw_predictions(task, knowing, scenes)
    image = scenes.images[19].permute(1, 2, 0).repeat(1, 1, 3).numpy()
    expected = draw_masks(image, masks.values[19].long(), SIDE, masks.classes)
    for pictures in (found.truths, found.answers):
        np.testing.assert_array_equal(pictures[5], expected)
    assert found.scores == [1.0] * 6 and found.score_name == "pixel accuracy"
    there = {masks.classes[value] for value in masks.values[ids].unique().tolist()}
    assert set(found.colors) == there - {"background"}


class Known:
    """Says what it is told, whatever the image."""

    score, headline = "part", "part"

    def __init__(self, annotation: str, answers: torch.Tensor, bank: ImageBank) -> None:
        self.annotation, self.answers = annotation, answers
        self.names = bank.annotations[annotation].names

    def targets(self, bank: ImageBank, ids: torch.Tensor) -> torch.Tensor:
        found = bank.annotations[self.annotation]
        where, last = found.tensors
        return torch.cat([where[ids], last[ids][..., None].float()], -1)

    def predict(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.answers

    def correct(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.full((len(targets),), 0.25)

    def draw(self, image: np.ndarray, answer: torch.Tensor, side: int) -> np.ndarray:
        if self.annotation == "keypoints":
            return draw_points(image, answer, side)
        return draw_boxes(image, answer, side, self.names)


def test_points_that_nobody_knows_are_not_drawn_of_the_student_either(scenes: ImageBank):
    points = scenes.annotations["keypoints"]
    answers = torch.cat([points.points + 1.0, torch.ones(20, points.points.shape[1], 1)], -1)
    task: Any = Known("keypoints", answers, scenes)
    found = draw_predictions(task, lambda images: images, scenes, count=20, side=96)
    answers[..., 2] *= points.visible
    for row, (image, picture) in enumerate(zip(found.images, found.answers, strict=True)):
        assert (image != picture).any()
        given = scenes.images[row].permute(1, 2, 0).repeat(1, 1, 3).numpy()
        np.testing.assert_array_equal(picture, draw_points(given, answers[row], 96))
    assert found.colors == {}


def test_colors_are_named_of_the_boxes_that_are_drawn(scenes: ImageBank):
    boxes = scenes.annotations["boxes"]
    answers = torch.zeros(20, 2, 6)
    answers[:, :, :4] = torch.tensor([2.0, 2.0, 20.0, 20.0])
    answers[:, 0, 4:] = torch.tensor([4.0, 0.9])
    answers[:, 1, 4:] = torch.tensor([9.0, 0.1])
    one = scenes.take(slice(1))
    task: Any = Known("boxes", answers[:1], one)
    found = draw_predictions(task, lambda images: images, one)
    known = {boxes.classes[label] for label in boxes.labels[0].tolist() if label >= 0}
    assert set(found.colors) == known | {"4"} and "9" not in known | {"4"}
    assert found.answer_name == "student says (score ≥ 0.3)"


def test_labels_are_shown_as_right_or_wrong():
    bank = digits.load(load_config(None, {}).data)[1].take(slice(3))
    logits = one_hot(bank.labels, 10).float()
    logits[1] = logits[1].roll(1)
    found = draw_predictions(task_of("classification", bank), lambda images: logits, bank)
    assert found.scores == [True, False, True]
    assert found.colors == {} and len(found.images) == 3
    same = [np.array_equal(*pair) for pair in zip(found.truths, found.answers, strict=True)]
    assert same == found.scores


def test_what_is_shown_does_not_depend_on_the_random_state(scenes: ImageBank):
    task, state = task_of("segmentation", scenes), torch.get_rng_state()
    draw_predictions(task, lambda images: torch.zeros(len(images), 11, 8, 8), scenes)
    assert torch.equal(state, torch.get_rng_state())


def test_without_photographs_nothing_of_the_images_is_in_the_figure(scenes: ImageBank):
    """Predictions come from the true images; black ones in their place change no pixel."""
    task = task_of("segmentation", scenes)
    logits = torch.randn(20, 11, 32, 32, generator=torch.Generator().manual_seed(0))
    figures = []
    for bank in (scenes, replace(scenes, images=torch.zeros_like(scenes.images))):
        shown = draw_predictions(task, lambda x: logits[: len(x)], bank, 2, photographs=False)
        assert shown.images == []
        figures.append(prediction_figure(shown, "masks alone"))
    assert np.array_equal(*map(pixels_of, figures))
    assert "image" not in words_of(figures[0]) and "ground truth" in words_of(figures[0])
    assert figures[0].get_figheight() < prediction_figure(made_up(2), "all").get_figheight()
