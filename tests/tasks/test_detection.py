from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from repfusion_env.config import DataConfig, DetectionConfig, ExperimentConfig
from repfusion_env.data.annotations import Boxes, padded_boxes
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.data.digit_scenes import load
from repfusion_env.tasks.detection import DetectionTask
from repfusion_env.tasks.detection_boxes import FCOS_CODER
from repfusion_env.tasks.detection_losses import match_points
from repfusion_env.tasks.detection_metric import MeanPrecision
from students.detection import HEADS

SIDE = 32
SHAPES = [(6, 8, 8), (8, 4, 4)]
OBJECTS = [
    [(2.0, 3.0, 12.0, 15.0, 0), (16.0, 14.0, 30.0, 29.0, 1)],
    [(9.0, 9.0, 21.0, 19.0, 2)],
    [],
]


def _bank(objects: list[list[tuple[float, ...]]] = OBJECTS) -> ImageBank:
    rows = [torch.tensor(found, dtype=torch.float32).reshape(-1, 5) for found in objects]
    boxes = padded_boxes([row[:, :4] for row in rows], [row[:, 4] for row in rows], ("a", "b", "c"))
    images = torch.zeros(len(objects), 3, SIDE, SIDE, dtype=torch.uint8)
    labels = torch.zeros(len(objects), dtype=torch.int64)
    return ImageBank("boxed", images, labels, UNLABELLED, annotations={"boxes": boxes})


def _config(kind: str = "fcos") -> ExperimentConfig:
    return replace(ExperimentConfig(), detection=DetectionConfig(head=kind, width=32))  # type: ignore[arg-type]


def _perfect(task: DetectionTask, targets: Tensor) -> dict[str, Tensor]:
    """What an FCOS that has learned everything would say."""
    with torch.no_grad():
        head = task.head(SHAPES)
        outputs = head(*[torch.zeros(len(targets), *shape) for shape in SHAPES])
    anchors = outputs["anchors"]
    matched = match_points(anchors[0], targets[..., :4], targets[..., 4] >= 0)
    index = matched.clamp_min(0)
    boxes = targets.gather(1, index[..., None].expand(-1, -1, 5))
    numbers = torch.arange(len(task.classes))
    hit = (matched >= 0)[..., None] & (boxes[..., 4:] == numbers)
    return {
        "cls_logits": torch.where(hit, 8.0, -8.0),
        "bbox_regression": FCOS_CODER.encode(anchors, boxes[..., :4]),
        "bbox_ctrness": torch.full((*matched.shape, 1), 8.0),
        "anchors": anchors,
    }


def test_targets_hold_boxes_labels_and_the_mark_of_no_object():
    bank = _bank()
    task = DetectionTask(_config(), bank)
    targets = task.targets(bank, torch.tensor([1, 0, 2]))
    assert targets.shape == (3, 2, 5) and targets.dtype == torch.float32
    assert targets[0, 0].tolist() == list(OBJECTS[1][0])
    assert {tuple(row) for row in targets[1].tolist()} == set(OBJECTS[0])
    assert targets[0, 1, 4] == -1 and (targets[2, :, 4] == -1).all()


def test_a_held_out_bank_without_any_place_for_a_box_still_has_targets():
    task = DetectionTask(_config(), _bank())
    empty = Boxes(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), task.classes)
    bank = replace(_bank(OBJECTS[:2]), annotations={"boxes": empty})
    assert task.targets(bank, torch.arange(2)).tolist() == [[[0, 0, 0, 0, -1]]] * 2


def test_answers_that_are_right_are_found_and_score_one():
    bank = _bank()
    task = DetectionTask(_config(), bank)
    targets = task.targets(bank, torch.arange(3))
    outputs = _perfect(task, targets)
    assert task.correct(outputs, targets).tolist() == [1, 1, 1]
    found = task.predict(outputs)
    assert found.shape == (3, 100, 6)
    assert [(row[:, 4] >= 0).sum().item() for row in found] == [2, 1, 0]
    torch.testing.assert_close(found[1, 0, :5], targets[1, 0], rtol=0, atol=1e-3)
    metric = task.metric()
    metric.update(outputs, targets)
    values = metric.compute()
    assert values["map"] == values["map_50"] == pytest.approx(1.0)
    assert {name for name in values if "/" in name} == {"map/a", "map/b", "map/c"}
    lower = task.losses(outputs, targets)
    outputs["cls_logits"] = -outputs["cls_logits"]
    assert (task.losses(outputs, targets) > lower + 1).all()


def test_an_object_is_not_found_under_a_wrong_name_in_another_place_or_unsurely():
    bank = _bank()
    task = DetectionTask(_config(), bank)
    targets = task.targets(bank, torch.arange(3))
    outputs = _perfect(task, targets)
    one_moved = targets.clone()
    one_moved[0, 0, :4] += 6.0  # IoU below a half
    assert task.correct(outputs, one_moved).tolist() == [0.5, 1, 1]
    one_moved[1, 0, 4] = 0
    assert task.correct(outputs, one_moved).tolist() == [0.5, 0, 1]
    unsure = {**outputs, "bbox_ctrness": torch.full_like(outputs["bbox_ctrness"], -4.0)}
    assert task.correct(unsure, targets).tolist() == [0, 0, 1]
    alarm = {**outputs, "cls_logits": outputs["cls_logits"].flip(0)}
    assert task.correct(alarm, targets)[2] == 0


def test_precision_is_that_of_a_hand_made_curve():
    # Four objects of one class in four images, the first two found, with a false alarm between
    # them: precision 1 up to recall 1/4, 2/3 up to 2/4. COCO reads it at 101 recalls.
    box = [4.0, 4.0, 24.0, 24.0]
    wrong = [0.0, 24.0, 8.0, 32.0]
    answers = torch.zeros(4, 2, 6)
    answers[..., 4] = -1
    answers[0, 0] = torch.tensor([*box, 0, 0.9])
    answers[1, 0] = torch.tensor([*wrong, 0, 0.8])
    # IoU 0.825: found up to the threshold 0.8, and not from 0.85 on.
    answers[1, 1] = torch.tensor([4.0, 4.0, 24.0, 20.5, 0, 0.7])
    targets = torch.tensor([[[*box, 0.0]]] * 4)
    metric = MeanPrecision(lambda outputs: outputs["answers"], ("a", "b"))
    for half in (slice(0, 2), slice(2, 4)):
        metric.update({"answers": answers[half]}, targets[half])
    values = metric.compute()
    both = (26 * 1 + 25 * 2 / 3) / 101
    first = 26 / 101
    assert values["map_50"] == pytest.approx(both, abs=1e-6)
    assert values["map"] == pytest.approx((7 * both + 3 * first) / 10, abs=1e-6)
    assert values["map/a"] == pytest.approx(values["map"])
    assert "map/b" not in values


def test_without_any_object_there_is_no_precision():
    metric = MeanPrecision(lambda outputs: outputs["answers"], ("a",))
    nothing = torch.tensor([[[0.0, 0, 0, 0, -1, 0]]])
    metric.update({"answers": nothing}, nothing[..., :5])
    assert math.isnan(metric.compute()["map"])


@pytest.mark.parametrize("kind", HEADS)
def test_every_kind_of_detector_learns_a_few_scenes(kind):
    torch.manual_seed(0)
    bank = load(DataConfig())[0].head(3)
    config = replace(_config(), detection=DetectionConfig(head=kind, width=16))
    task = DetectionTask(config, bank)
    ids = torch.arange(len(bank))
    images, targets = bank.pixels(ids), task.targets(bank, ids)
    # Without a backbone: the pixels of each cell tell three scenes apart.
    pixels = torch.nn.functional.pixel_unshuffle(images, 4)
    head = task.head([(16, 8, 8)])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    first = task.losses(head(pixels), targets).mean().item()
    for _ in range(40):
        loss = task.losses(head(pixels), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 5.0)
        optimizer.step()
    outputs = head(pixels)
    metric = task.metric()
    metric.update(outputs, targets)
    values = metric.compute()
    assert loss.item() < 0.5 * first
    assert task.correct(outputs, targets).mean() > 0.6
    assert values["map_50"] > 0.6


def test_pictures_show_sure_answers_alone():
    bank = _bank()
    task = DetectionTask(_config(), bank)
    targets = task.targets(bank, torch.arange(3))
    grey = np.full((SIDE, SIDE, 3), 90, np.uint8)
    empty = task.draw(grey, targets[2], 96)
    assert empty.shape == (96, 96, 3) and (empty == 90).all()
    assert (task.draw(grey, targets[0], 96) != 90).any()
    answer = torch.cat([targets[0], torch.tensor([[0.9], [0.1]])], dim=1)
    answer[1, 4] = -1
    assert (task.draw(grey, answer, 96) != 90).any()
    answer[0, 5] = 0.1
    assert (task.draw(grey, answer, 96) == 90).all()


def test_banks_without_boxes_or_objects_are_refused():
    bare = replace(_bank(), annotations={})
    with pytest.raises(ValueError, match=r"needs boxes, but data set 'boxed' has images alone"):
        DetectionTask(_config(), bare)
    with pytest.raises(ValueError, match="none of the 2 images of data set 'boxed' has a box"):
        DetectionTask(_config(), _bank([[], []]))
