"""Probabilistic knowledge transfer: how likely a point picks each other as its neighbour."""

from __future__ import annotations

import torch
from torch import Tensor

from repfusion_env.losses.relations import TINY, itself, per_sample, related, unit
from repfusion_env.losses.shape import Anchors

_LEAST_AFFINITY = 1e-7  # of opposite directions, whose logarithm would be infinite


def pkt(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Kullback-Leibler divergence, in nats, of the student's neighbours from the teacher's.

    Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV
    2018, section 3: affinity ``(cos + 1) / 2``, divided by its sum over all others, ``sum_j p_j|i
    log(p_j|i / q_j|i)``; the mean over samples is the published sum over their number.
    Non-negative, 0 at a match; no pair of a point with itself. Memory grows with the square of the
    related points.
    """
    mine, theirs, my_others, their_others = related(student, teacher, anchors)
    _, log_q = _neighbours(mine, my_others)
    p, log_p = _neighbours(theirs, their_others)
    divergence = (p * (log_p - log_q)).sum(-1)
    return per_sample(divergence.clamp_min(0.0), student)  # rounding may fall below


def _neighbours(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(G, L, F), (G, L', F) -> (G, L, L') probabilities and their logarithms."""
    affinity = (0.5 * (unit(points) @ unit(others).transpose(1, 2) + 1.0)).clamp_min(
        _LEAST_AFFINITY
    )
    weight = torch.where(itself(affinity), 0.0, affinity)
    total = weight.sum(-1, keepdim=True).clamp_min(TINY)  # a point alone has no neighbour
    return weight / total, affinity.log() - total.log()
