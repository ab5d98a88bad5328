"""Scenes made from the digits: what is known of them against their pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data
from repfusion_env.data.digit_scenes import INK


@pytest.fixture(scope="module")
def scenes():
    return load_data(DataConfig(name="digit_scenes"))


def test_there_are_one_to_three_digits_in_each_scene(scenes):
    for bank, count in zip(scenes, (2000, 400), strict=True):
        assert len(bank) == count and bank.shape == (1, 32, 32) and not bank.labelled
        digits = (bank.annotations["boxes"].labels >= 0).sum(1)
        assert sorted(set(digits.tolist())) == [1, 2, 3]
    # The very scenes, on every machine.
    assert scenes[0].fingerprint == load_data(DataConfig(name="digit_scenes"))[0].fingerprint


def test_every_pixel_of_strong_ink_belongs_to_a_digit_that_is_there(scenes):
    bank = scenes[1]
    ink = bank.images[:, 0].float() / 255
    masks, boxes = bank.annotations["masks"], bank.annotations["boxes"]
    assert torch.equal(masks.values > 0, ink > INK) or (
        # Rounding to 8 bits moves a pixel over the threshold now and then.
        ((masks.values > 0) != (ink > INK)).float().mean() < 1e-3
    )
    for mask, labels in zip(masks.values, boxes.labels, strict=True):
        assert set(mask.unique().tolist()) - {0} == {int(one) + 1 for one in labels if one >= 0}


def test_a_box_is_the_outline_of_its_digits_pixels(scenes):
    bank = scenes[1]
    masks, boxes = bank.annotations["masks"].values.numpy(), bank.annotations["boxes"]
    checked = 0
    for scene in range(len(bank)):
        labels = boxes.labels[scene].tolist()
        for place, label in enumerate(labels):
            # A digit that stands there twice, or that another covers, has no outline of its own.
            left, top, right, bottom = boxes.boxes[scene, place].int().tolist()
            inside = np.zeros((32, 32), bool)
            inside[top:bottom, left:right] = True
            alone = labels.count(label) == 1 and set(masks[scene][inside]) <= {0, label + 1}
            if label < 0 or not alone:
                continue
            rows, columns = np.nonzero(masks[scene] == label + 1)
            outline = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert outline == (left, top, right, bottom)
            checked += 1
    assert checked > 400


def test_points_go_from_left_to_right_and_lie_on_their_digits_box(scenes):
    bank = scenes[1]
    points = bank.annotations["keypoints"]
    boxes = bank.annotations["boxes"]
    for scene in range(100):
        seen = points.visible[scene].view(3, 5)
        count = int((boxes.labels[scene] >= 0).sum())
        assert seen.all(1).tolist() == [place < count for place in range(3)]
        centres = points.points[scene].view(3, 5, 2)[:count, 0]
        assert (centres[1:, 0] >= centres[:-1, 0]).all()
        found = {tuple(c.tolist()) for c in centres}
        expected = boxes.boxes[scene][boxes.labels[scene] >= 0]
        middles = ((expected[:, :2] + expected[:, 2:] - 1) / 2).tolist()
        assert found == {tuple(middle) for middle in middles}
        for _, top, right, bottom, left in points.points[scene].view(3, 5, 2)[:count]:
            assert top[1] <= min(right[1], left[1]) and bottom[1] >= max(right[1], left[1])
            assert left[0] <= min(top[0], bottom[0]) and right[0] >= max(top[0], bottom[0])


def test_training_scenes_hold_no_heldout_digit(scenes):
    """Digits of one size are compared pixel by pixel: the splits share none."""
    crops = []
    for bank in scenes:
        boxes, found = bank.annotations["boxes"], set()
        single = (boxes.labels >= 0).sum(1) == 1
        for scene in single.nonzero().flatten().tolist():
            left, top, right, bottom = boxes.boxes[scene, 0].int().tolist()
            found.add(bank.images[scene, 0, top:bottom, left:right].numpy().tobytes())
        crops.append(found)
    assert len(crops[1]) > 80 and not crops[0] & crops[1]
