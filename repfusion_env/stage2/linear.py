"""The linear probe: multinomial logistic regression on frozen features.

Shape letters: M images, S features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from repfusion_env.stage2.splits import check_labels, validation_splits

# Penalties of the mean cross-entropy, weak to strong: two for each power of ten.
STRENGTHS = tuple(float(f"{10.0**power:.2g}") for power in np.arange(-5.0, 0.51, 0.5))
MOST_ITERATIONS = 500
TOLERANCE = 1e-4


@dataclass(frozen=True)
class LinearProbe:
    """What a linear probe found.

    Attributes:
        accuracy: On the test images, in [0, 1].
        strength: The chosen L2 penalty.
        validation_accuracy: Of that penalty, on the labels left out of the fit.
    """

    accuracy: float
    strength: float
    validation_accuracy: float


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    seed: int,
    strengths: Sequence[float] = STRENGTHS,
) -> LinearProbe:
    """Fit a linear classifier to frozen features and count what it gets right.

    Features are standardised by the training images' mean and deviation. The L2 penalty is the one
    with the best accuracy on a stratified validation split of the training labels (five folds below
    500 labels), of equal ones that with the least cross-entropy there; then the classifier is
    fitted to all training labels. Test labels choose nothing.

    Args:
        train_x: (M, S) features.
        train_y: (M,) int64 classes.
        test_x: Features of the test images.
        test_y: Their classes.
        seed: Of the validation split.
        strengths: Penalties to choose from: weights ``w`` of the mean cross-entropy in nats plus
            ``strength / 2 * |w|^2``, biases free. scikit-learn's ``C`` is ``1 / (M * strength)``.

    Raises:
        ValueError: Fewer than two labels, no or negative strengths, shapes that do not fit, or
            features that are not finite.
    """
    check_labels(train_y, train_x, "training")
    check_labels(test_y, test_x, "test")
    path = sorted(set(strengths), reverse=True)
    if not path or path[-1] < 0:
        raise ValueError(
            f"strengths: {list(strengths)} given; they must be 0 or more, one at least"
        )
    classes = int(torch.maximum(train_y.max(), test_y.max())) + 1
    train_x, test_x = _standardized(train_x, test_x)
    right = np.zeros(len(path))
    nats = np.zeros(len(path))
    images = 0
    starts: list[Tensor] = []
    for fitted, left in validation_splits(train_y, seed):
        x, y = train_x[fitted], train_y[fitted]
        weights, starts = None, []
        images += len(left)
        # From strong to weak: each fit starts where the one before ended.
        for place, strength in enumerate(path):
            weights = fit(x, y, classes, strength, weights)
            starts.append(weights)
            logits = _logits(train_x[left], weights)
            right[place] += float((logits.argmax(1) == train_y[left]).sum())
            nats[place] += float(F.cross_entropy(logits, train_y[left], reduction="sum"))
    best = max(range(len(path)), key=lambda place: (right[place], -nats[place]))
    weights = fit(train_x, train_y, classes, path[best], starts[best])
    correct = _logits(test_x, weights).argmax(1) == test_y
    return LinearProbe(
        accuracy=float(correct.double().mean()),
        strength=path[best],
        validation_accuracy=float(right[best] / images),
    )


def fit(x: Tensor, y: Tensor, classes: int, strength: float, start: Tensor | None) -> Tensor:
    """Minimise mean cross-entropy plus ``strength / 2 * |w|^2`` by L-BFGS.

    Args:
        x: (M, S) features.
        y: (M,) classes.
        classes: C.
        strength: 0 or more.
        start: Where to start, as returned; None: zeros.

    Returns:
        (S + 1, C) float32 weights, the biases in the last row.
    """
    inputs = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)  # (M, S + 1)
    targets = F.one_hot(y, classes).to(x.dtype)
    transposed = inputs.T.contiguous()
    shape = (inputs.shape[1], classes)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).to(x).view(shape)
        logs = torch.log_softmax(inputs @ weights, dim=1)
        loss = -(logs * targets).sum(dtype=torch.float64) / len(x)
        gradient = transposed @ logs.exp_().sub_(targets).div_(len(x))
        penalised = weights[:-1]
        loss = loss + 0.5 * strength * penalised.square().sum(dtype=torch.float64)
        gradient[:-1] += strength * penalised
        return float(loss), gradient.flatten().double().cpu().numpy()

    first = torch.zeros(shape) if start is None else start
    found = minimize(
        objective,
        first.flatten().double().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": MOST_ITERATIONS, "gtol": TOLERANCE, "ftol": 1e-7, "maxcor": 10},
    )
    return torch.from_numpy(found.x).to(x).view(shape)


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    return x @ weights[:-1] + weights[-1]


def _standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the training images' mean and deviation; a constant feature becomes 0."""
    mean, deviation = train.mean(0), train.std(0, correction=0)
    if not bool(torch.isfinite(deviation).all()) or not bool(torch.isfinite(test).all()):
        raise ValueError("the features are not finite; the student's weights have diverged")
    deviation = torch.where(deviation > 1e-6 * train.abs().amax(0), deviation, torch.inf)
    return (train - mean) / deviation, (test - mean) / deviation
