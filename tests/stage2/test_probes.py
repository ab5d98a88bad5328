"""Probes against scikit-learn, and that held-out labels choose nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data
from repfusion_env.stage2 import knn_probe, labelled_subset, linear_probe
from repfusion_env.stage2.splits import validation_splits


@pytest.fixture(scope="module")
def digits():
    """Half-size pixels of the handwritten digits as features: (train x, y, test x, y)."""
    train, heldout = load_data(DataConfig(image_size=8))
    pairs = [(bank.images.flatten(1).float() / 255, bank.labels) for bank in (train, heldout)]
    return *pairs[0], *pairs[1]


@pytest.mark.parametrize("strength", [0.1, 1e-3])
def test_one_strength_is_scikit_learns_logistic_regression(digits, strength):
    x, y, test_x, test_y = digits
    mean, deviation = x.mean(0), x.std(0, correction=0)
    deviation[deviation == 0] = 1
    theirs = LogisticRegression(C=1 / (len(x) * strength), max_iter=5000, tol=1e-8)
    theirs.fit(((x - mean) / deviation).double().numpy(), y.numpy())
    expected = theirs.score(((test_x - mean) / deviation).double().numpy(), test_y.numpy())

    found = linear_probe(x, y, test_x, test_y, seed=0, strengths=[strength])

    assert found.accuracy == pytest.approx(expected, abs=1.5 / len(test_y))
    assert found.strength == strength


def test_the_strength_is_the_best_on_labels_left_out(digits):
    x, y, test_x, test_y = digits
    ids = labelled_subset(y, 60, seed=0)
    strengths = [1e-4, 1e-2, 1.0, 100.0]
    right = dict.fromkeys(strengths, 0)
    mean, deviation = x[ids].mean(0), x[ids].std(0, correction=0)
    deviation[deviation == 0] = torch.inf
    z = ((x[ids] - mean) / deviation).double().numpy()
    labels = y[ids].numpy()
    for fitted, left in validation_splits(y[ids], seed=0):
        for strength in strengths:
            theirs = LogisticRegression(C=1 / (len(fitted) * strength), max_iter=5000, tol=1e-8)
            theirs.fit(z[fitted], labels[fitted])
            right[strength] += int((theirs.predict(z[left]) == labels[left]).sum())

    found = linear_probe(x[ids], y[ids], test_x, test_y, seed=0, strengths=strengths)

    assert right[found.strength] >= max(right.values()) - 1
    assert found.validation_accuracy == pytest.approx(right[found.strength] / 60, abs=1.01 / 60)
    assert min(right.values()) < max(right.values()) - 1, "the strengths must differ to be chosen"


def test_test_labels_choose_nothing(digits):
    x, y, test_x, test_y = digits
    ids = labelled_subset(y, 50, seed=0)
    wrong = (test_y + 1) % 10
    for probe, chosen in ((linear_probe, "strength"), (knn_probe, "neighbours")):
        right = probe(x[ids], y[ids], test_x, test_y, seed=0)
        shuffled = probe(x[ids], y[ids], test_x, wrong, seed=0)
        assert getattr(right, chosen) == getattr(shuffled, chosen)
        assert right.validation_accuracy == shuffled.validation_accuracy
        assert shuffled.accuracy < 0.2 < right.accuracy


def test_neighbours_vote_as_in_scikit_learn(digits):
    x, y, test_x, test_y = digits
    theirs = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.07)
    )
    expected = theirs.fit(x.numpy(), y.numpy()).score(test_x.numpy(), test_y.numpy())
    found = knn_probe(x, y, test_x, test_y, seed=0, neighbours=[20])
    assert found.accuracy == pytest.approx(expected, abs=1.5 / len(test_y))


def test_the_number_of_neighbours_is_chosen_among_those_that_can_vote(digits):
    x, y, test_x, test_y = digits
    ids = labelled_subset(y, 30, seed=0)
    found = knn_probe(x[ids], y[ids], test_x, test_y, seed=0, neighbours=[3, 25, 1000])
    assert found.neighbours == 3  # 24 are left to vote in each fold
    with pytest.raises(ValueError, match="24 labelled images can vote"):
        knn_probe(x[ids], y[ids], test_x, test_y, seed=0, neighbours=[25])


def test_constant_and_unbounded_features(digits):
    x, y, test_x, test_y = digits
    ids = labelled_subset(y, 40, seed=0)
    plain = linear_probe(x[ids], y[ids], test_x, test_y, seed=0, strengths=[0.1])
    # A feature that is constant on the labelled images says nothing, whatever the test images hold.
    constant = torch.cat((x[ids], torch.full((40, 1), 0.3)), dim=1)
    moved = torch.cat((test_x, torch.randn(len(test_x), 1)), dim=1)
    assert linear_probe(constant, y[ids], moved, test_y, seed=0, strengths=[0.1]) == plain
    broken = x[ids].clone()
    broken[3, 5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        linear_probe(broken, y[ids], test_x, test_y, seed=0)


@pytest.mark.parametrize("count", [20, 600])
def test_validation_splits_are_stratified_and_apart(digits, count):
    y = digits[1][labelled_subset(digits[1], count, seed=0)]
    splits = validation_splits(y, seed=0)
    assert len(splits) == (5 if count < 500 else 1)
    for fitted, left in splits:
        assert sorted([*fitted.tolist(), *left.tolist()]) == list(range(count))
        sizes = torch.bincount(y[left], minlength=10)
        assert sizes.max() - sizes.min() <= 1


def test_a_single_label_is_refused(digits):
    x, y, test_x, test_y = digits
    with pytest.raises(ValueError, match="2 or more"):
        linear_probe(x[:1], y[:1], test_x, test_y, seed=0)


def test_small_pieces_find_the_same_neighbours(digits, monkeypatch):
    whole = knn_probe(*digits, seed=0)
    monkeypatch.setattr("repfusion_env.stage2.knn.MOST_SIMILARITIES", 7 * len(digits[0]))
    assert knn_probe(*digits, seed=0) == whole
