"""The nearest-neighbour probe: a vote of the most similar training images.

Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018.

Shape letters: M training images, T test images, S features, C classes, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from repfusion_env.stage2.splits import check_labels, validation_splits

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
# Similarities held at a time: 256 MB of float32.
MOST_SIMILARITIES = 2**26


@dataclass(frozen=True)
class KnnProbe:
    """What a nearest-neighbour probe found.

    Attributes:
        accuracy: On the test images, in [0, 1].
        neighbours: The chosen number of neighbours.
        validation_accuracy: Of that number, on the labels left out.
    """

    accuracy: float
    neighbours: int
    validation_accuracy: float


def knn_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    seed: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> KnnProbe:
    """Let the most similar training images vote on each test image.

    Similarity ``s`` is the cosine of the features; a neighbour's vote weighs
    ``exp(s / temperature)``. How many vote is chosen on the same validation split as the linear
    probe's penalty, the fewest of equal ones; test labels choose nothing.

    Args:
        train_x: (M, S) features.
        train_y: (M,) int64 classes.
        test_x: Features of the test images.
        test_y: Their classes.
        seed: Of the validation split.
        neighbours: Numbers to choose from; those above the labels' number are left out.
        temperature: Of the votes.

    Raises:
        ValueError: Fewer than two labels, no usable number of neighbours, or shapes that do not
            fit.
    """
    check_labels(train_y, train_x, "training")
    check_labels(test_y, test_x, "test")
    splits = validation_splits(train_y, seed)
    most = min(len(fitted) for fitted, _ in splits)
    allowed = sorted({k for k in neighbours if 1 <= k <= most})
    if not allowed:
        raise ValueError(
            f"neighbours: {list(neighbours)} given, but {most} labelled images can vote; give one "
            f"of 1 to {most}"
        )
    classes = int(torch.maximum(train_y.max(), test_y.max())) + 1
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    right = torch.zeros(len(allowed), dtype=torch.float64)
    images = 0
    for fitted, left in splits:
        bank = (train_x[fitted], train_y[fitted])
        queries = (train_x[left], train_y[left])
        right += _right(bank, queries, allowed, classes, temperature)
        images += len(left)
    best = int(torch.argmax(right))
    chosen = allowed[best]
    bank, queries = (train_x, train_y), (test_x, test_y)
    correct = _right(bank, queries, [chosen], classes, temperature)
    return KnnProbe(
        accuracy=float(correct[0] / len(test_y)),
        neighbours=chosen,
        validation_accuracy=float(right[best] / images),
    )


def _right(
    bank: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    numbers: Sequence[int],
    classes: int,
    temperature: float,
) -> Tensor:
    """How many queries each number of neighbours gets right, (len(numbers),) float64."""
    features, labels = bank
    right = torch.zeros(len(numbers), dtype=torch.float64)
    chunk = max(1, min(1024, MOST_SIMILARITIES // len(features)))
    for x, y in zip(queries[0].split(chunk), queries[1].split(chunk), strict=True):
        similar, nearest = (x @ features.T).topk(max(numbers), dim=1)  # (T, K)
        # Relative to the nearest one, so that no exponential overflows.
        weights = ((similar - similar[:, :1]) / temperature).exp()
        voters = labels[nearest]
        for place, number in enumerate(numbers):
            votes = weights.new_zeros(len(x), classes)
            votes.scatter_add_(1, voters[:, :number], weights[:, :number])
            right[place] += int((votes.argmax(1) == y).sum())
    return right
