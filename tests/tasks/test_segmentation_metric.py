"""IoU and pixel accuracy against scikit-learn's confusion matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor

from repfusion_env.data.annotations import IGNORE
from repfusion_env.tasks.segmentation_metric import SegmentationMetric

CLASSES = ("sky", "roof", "tree", "ghost")


def _metric() -> SegmentationMetric:
    """One that is given the answers themselves."""
    return SegmentationMetric(CLASSES, lambda answers, size: answers)


def _batches(highest: int) -> list[tuple[Tensor, Tensor]]:
    """Answers and masks with ids up to ``highest``, a fifth of the pixels not counting."""
    random = torch.Generator().manual_seed(3)
    found = []
    for batch in (3, 5):
        masks = torch.randint(0, highest + 1, (batch, 7, 9), generator=random)
        answers = torch.where(
            torch.rand(masks.shape, generator=random) < 0.6,
            masks,
            torch.randint(0, highest + 1, masks.shape, generator=random),
        )
        masks[torch.rand(masks.shape, generator=random) < 0.2] = IGNORE
        found.append((answers, masks))
    return found


def _counted(batches: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    answers = torch.cat([a.flatten() for a, _ in batches]).numpy()
    masks = torch.cat([m.flatten() for _, m in batches]).numpy()
    return masks[masks != IGNORE], answers[masks != IGNORE]


def test_values_are_those_of_all_pixels_of_all_batches_together():
    batches = _batches(highest=3)
    metric = _metric()
    for answers, masks in batches:
        metric.update(answers, masks)
    found = metric.compute()
    truth, said = _counted(batches)
    each = jaccard_score(truth, said, average=None, labels=range(4))
    assert list(found) == ["miou", "pixel_accuracy", *(f"iou/{name}" for name in CLASSES)]
    np.testing.assert_allclose([found[f"iou/{name}"] for name in CLASSES], each, rtol=1e-5)
    assert found["miou"] == pytest.approx(each.mean(), rel=1e-5)
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(truth, said), rel=1e-5)


def test_a_class_that_nothing_is_taken_for_is_left_out_of_the_mean():
    batches = _batches(highest=2)
    metric = _metric()
    for answers, masks in batches:
        metric.update(answers, masks)
    found = metric.compute()
    assert "iou/ghost" not in found
    truth, said = _counted(batches)
    each = jaccard_score(truth, said, average=None, labels=range(3))
    assert found["miou"] == pytest.approx(each.mean(), rel=1e-5)


def test_a_class_that_is_only_seen_where_it_is_not_counts_as_missed():
    metric = _metric()
    metric.update(torch.tensor([[[0, 0], [0, 3]]]), torch.zeros(1, 2, 2, dtype=torch.int64))
    found = metric.compute()
    assert found["iou/ghost"] == 0
    assert found["miou"] == pytest.approx(0.75 / 2)


def test_values_go_on_with_every_batch():
    (first, first_masks), (second, second_masks) = _batches(highest=3)
    metric, whole = _metric(), _metric()
    metric.update(first, first_masks)
    early = metric.compute()
    metric.update(second, second_masks)
    whole.update(torch.cat((first, second)), torch.cat((first_masks, second_masks)))
    assert metric.compute() == whole.compute() != early


def test_it_can_be_fed_in_inference_mode_and_out_of_it():
    metric = _metric()
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            for answers, masks in _batches(highest=3):
                metric.update(answers, masks)
    once = _metric()
    for answers, masks in _batches(highest=3):
        once.update(answers, masks)
    assert metric.compute() == pytest.approx(once.compute())


def test_nothing_that_counts_has_no_value():
    metric = _metric()
    with pytest.raises(ValueError, match="no pixel of these images counts"):
        metric.compute()
    metric.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), IGNORE))
    with pytest.raises(ValueError, match="no pixel of these images counts"):
        metric.compute()
