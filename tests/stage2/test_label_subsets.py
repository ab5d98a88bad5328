"""Which images keep their labels: balanced, nested, and said plainly."""

from __future__ import annotations

import pytest
import torch

from repfusion_env.stage2 import label_count, labelled_subset

# 30 images of class 0, 12 of 1, 5 of 2, mixed up.
LABELS = torch.tensor([0] * 30 + [1] * 12 + [2] * 5)[
    torch.randperm(47, generator=torch.Generator().manual_seed(3))
]


@pytest.mark.parametrize(
    ("given", "count"), [("1%", 14), ("10%", 140), ("100%", 1400), ("7", 7), (7, 7), (0.1, 140)]
)
def test_labels_are_a_percentage_or_a_number(given, count):
    assert label_count(given, 1400) == count


@pytest.mark.parametrize("given", ["0%", "101%", "ten", "-3", 0, 0.0, 1.5, True, "2.5"])
def test_other_labels_are_refused(given):
    with pytest.raises(ValueError, match=r"labels: .* given"):
        label_count(given, 1400)


def test_more_labels_than_images_are_refused():
    with pytest.raises(ValueError, match="1401 given, but there are 1,400"):
        label_count(1401, 1400)


def test_every_count_is_balanced_as_far_as_the_classes_reach():
    for count in range(1, 48):
        sizes = torch.bincount(LABELS[labelled_subset(LABELS, count, seed=1)], minlength=3)
        assert sizes.sum() == count
        # No class may have two images more than one that still had some to give.
        unspent = sizes < torch.tensor([30, 12, 5])
        if unspent.any():
            assert sizes.max() - sizes[unspent].min() <= 1


def test_fewer_labels_are_the_first_of_more():
    more = labelled_subset(LABELS, 40, seed=5)
    assert len(set(more.tolist())) == 40
    for count in (1, 3, 10, 39):
        assert torch.equal(labelled_subset(LABELS, count, seed=5), more[:count])


def test_another_seed_draws_others():
    draws = {tuple(labelled_subset(LABELS, 6, seed).tolist()) for seed in range(5)}
    assert len(draws) == 5
