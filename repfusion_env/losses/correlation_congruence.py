"""Correlation congruence: the kernel matrix of the points."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repfusion_env.losses.relations import per_sample, products, related, unit
from repfusion_env.losses.shape import Anchors


def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    anchors: Anchors | None = None,
    *,
    gamma: float = 0.4,
    order: int = 2,
) -> Tensor:
    """Mean squared difference of the rows of Gaussian kernel matrices of unit vectors.

    Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, section 3: ``|C_s -
    C_t|^2 / n^2`` with ``exp(-gamma |x - y|^2)`` by its Taylor series, ``sum_p exp(-2 gamma) (2
    gamma)^p (x y)^p / p!``; the mean over samples is that. Non-negative, 0 at a match. Memory grows
    with the square of the related points.

    Args:
        student: (B, F) or (B, F, H, W).
        teacher: The same shape.
        anchors: Others that stay fixed.
        gamma: Width of the kernel, above 0 (published: 0.4).
        order: Last power p of the series, 1 or more (published: 2).

    Returns:
        (B,).
    """
    mine, theirs, my_others, their_others = related(student, teacher, anchors)
    difference = _kernel(mine, my_others, gamma, order) - _kernel(
        theirs, their_others, gamma, order
    )
    return per_sample(difference.square().mean(-1), student)


def _kernel(points: Tensor, others: Tensor, gamma: float, order: int) -> Tensor:
    """(G, L, F), (G, L', F) -> (G, L, L')."""
    directions = unit(points)
    cosines = products(directions, directions if others is points else unit(others))
    series = torch.ones_like(cosines)
    for power in range(order, 0, -1):
        series = 1.0 + series * cosines * (2.0 * gamma / power)
    return math.exp(-2.0 * gamma) * series
