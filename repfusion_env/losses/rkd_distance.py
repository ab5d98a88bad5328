"""Relational knowledge distillation of the distances among points.

Shape letters: G groups of related points, L points, L' others, F feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from repfusion_env.losses.relations import TINY, per_sample, related
from repfusion_env.losses.shape import Anchors


def rkd_distance(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Huber loss between distances, each divided by its mean over the related pairs.

    Park et al., "Relational Knowledge Distillation", CVPR 2019, section 3.2; row means, so that
    the mean over samples is the published loss up to its factor.
    """
    points = related(student, teacher, anchors)
    student_distance = _relative_distances(points[0], points[2])
    teacher_distance = _relative_distances(points[1], points[3])
    huber = F.smooth_l1_loss(student_distance, teacher_distance, reduction="none")
    return per_sample(huber.mean(-1), student)


def _relative_distances(points: Tensor, others: Tensor) -> Tensor:
    """(G, L, F), (G, L', F) -> (G, L, L') distances over the mean distance among the others."""
    distances = _distances(points, others)
    among = distances if others is points else _distances(others, others)
    positive = (among > 0).sum((1, 2), keepdim=True).clamp_min(1)
    return distances / (among.sum((1, 2), keepdim=True) / positive).clamp_min(TINY)


def _distances(points: Tensor, others: Tensor) -> Tensor:
    """(G, L, F), (G, L', F) -> (G, L, L')."""
    squared = (points[:, :, None] - others[:, None]).square().sum(-1)
    # The root has no gradient at 0, where a point meets itself.
    return torch.where(squared > TINY, squared.clamp_min(TINY).sqrt(), 0.0)
