"""From an observation to the reward of every timestep: what an agent could choose.

Shape letters: M training images, Q others, E embedding, T timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FOLDS = 5
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# A kernel matrix of so many rows is still solved in a second.
KERNEL_IMAGES = 3000


@dataclass(frozen=True)
class Predictor:
    """How rewards are predicted.

    Attributes:
        kind: "ridge" (linear), "kernel" (Gaussian kernel ridge), or "fixed": the same timestep for
            all images, where nothing did better.
        ridge: Penalty, per image.
        validated_gain: Its gain over the best fixed timestep on training images that it did not
            learn from.
    """

    kind: str
    ridge: float
    validated_gain: float


def choose_predictor(
    rewards: np.ndarray, observations: np.ndarray, others: np.ndarray, seed: int
) -> tuple[Predictor, np.ndarray]:
    """Learn to choose a timestep from the observation.

    Rewards are taken relative to each image's mean, so that its difficulty is no noise. Kind and
    penalty are those whose choices have the highest reward in cross-validation over the training
    images; a kind is taken over the fixed choice only where it gains there.

    Args:
        rewards: (M, T).
        observations: (M, E).
        others: (Q, E) images to choose for.
        seed: Of the folds.

    Returns:
        The predictor, and its choices (Q,) as places in the grid.
    """
    targets = rewards - rewards.mean(1, keepdims=True)
    inputs, queries = _standardized(observations, others)
    fold_of = np.random.default_rng(seed).permutation(len(inputs)) % FOLDS
    values: dict[tuple[str, float], float] = {("fixed", 0.0): 0.0}
    for fold in range(FOLDS):
        seen, new = fold_of != fold, fold_of == fold
        fixed = rewards[seen].mean(0).argmax()
        for kind, ridge, predicted in _all(inputs[seen], targets[seen], inputs[new]):
            chosen = predicted.argmax(1)
            gains = rewards[new][np.arange(len(chosen)), chosen] - rewards[new][:, fixed]
            values[kind, ridge] = values.get((kind, ridge), 0.0) + gains.sum() / len(inputs)
    (kind, ridge), value = max(values.items(), key=lambda item: item[1])
    if kind == "fixed":
        return Predictor(kind, ridge, value), np.full(len(others), rewards.mean(0).argmax())
    found = next(
        predicted
        for name, penalty, predicted in _all(inputs, targets, queries)
        if (name, penalty) == (kind, ridge)
    )
    return Predictor(kind, ridge, float(value)), found.argmax(1)


def _all(
    inputs: np.ndarray, targets: np.ndarray, queries: np.ndarray
) -> Iterator[tuple[str, float, np.ndarray]]:
    """Predictions (Q, T) of every kind and penalty."""
    mean = targets.mean(0)
    centred = targets - mean
    center = inputs.mean(0)
    values, vectors = np.linalg.eigh((inputs - center).T @ (inputs - center) / len(inputs))
    projected = vectors.T @ ((inputs - center).T @ centred / len(inputs))
    for ridge in RIDGES:
        weights = vectors @ (projected / (values.clip(0) + ridge)[:, None])
        yield "ridge", ridge, mean + (queries - center) @ weights
    kept = slice(KERNEL_IMAGES)
    inputs, centred = inputs[kept], centred[kept]
    distances = _distances(inputs, inputs)
    width = np.median(distances) or 1.0
    kernel = np.exp(-distances / width)
    values, vectors = np.linalg.eigh(kernel / len(inputs))
    projected = vectors.T @ centred / len(inputs)
    across = np.exp(-_distances(queries, inputs) / width) @ vectors
    for ridge in RIDGES:
        yield (
            "kernel",
            ridge / 100,
            mean + across @ (projected / (values.clip(0) + ridge / 100)[:, None]),
        )


def _standardized(observations: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inputs, queries = observations.astype(np.float64), others.astype(np.float64)
    mean, deviation = inputs.mean(0), inputs.std(0)
    deviation = np.where(deviation > 1e-9, deviation, 1.0)
    return (inputs - mean) / deviation, (queries - mean) / deviation


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances (len(a), len(b))."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squares, 0.0)
