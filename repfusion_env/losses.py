"""Distillation losses: student feature against teacher feature, one value per sample.

Each takes the projected student feature and the standardised teacher feature, both ``(B, F)``
(pooled) or ``(B, F, H, W)`` (dense), and gives ``(B,)``, non-negative, 0 where they match.

Relational losses compare a sample with others: on pooled features with the other images of the
batch, on dense features with the other positions of the same image. ``anchors`` fixes those others
(student, teacher) so that the gradient moves one sample alone; without it they are the batch.

Shape letters: B samples, F feature width, H,W positions, L points that are related to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from repfusion_env.registry import LOSSES, look_up

Anchors = tuple[Tensor, Tensor]
Loss = Callable[..., Tensor]
_TINY = 1e-12


def hint(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Mean squared difference. Hints: Romero et al., "FitNets", ICLR 2015, eq. 3."""
    return (student - teacher).square().flatten(1).mean(1)


def l1(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Mean absolute difference. For features: Kim et al., "Factor Transfer", NeurIPS 2018."""
    return (student - teacher).abs().flatten(1).mean(1)


def normalized_l2(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Squared distance of unit vectors, per position. Grill et al., "BYOL", NeurIPS 2020, eq. 2."""
    difference = F.normalize(student, dim=1) - F.normalize(teacher, dim=1)
    return (
        difference.square().sum(1).flatten(1).mean(1)
        if student.ndim == 4
        else (difference.square().sum(1))
    )


def cosine(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """One minus the cosine similarity over channels, mean over positions; in [0, 2]."""
    distance = 1.0 - F.cosine_similarity(student, teacher, dim=1)
    return distance.flatten(1).mean(1) if student.ndim == 4 else distance


def attention_transfer(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Mean squared difference of unit-norm maps ``sum_c |A_c|^2``, dense features only.

    Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1 with p = 2.
    """

    def attention(features: Tensor) -> Tensor:
        return F.normalize(features.square().mean(1).flatten(1), dim=1)  # (B, H*W)

    return (attention(student) - attention(teacher)).square().mean(1)


def rkd_distance(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Huber loss between distances, each divided by its mean over the related pairs.

    Park et al., "Relational Knowledge Distillation", CVPR 2019, eqs. 5 to 7; row means, so that
    the mean over samples is the published loss up to its factor.
    """
    points = _points(student, teacher, anchors)
    student_distance = _relative_distances(points[0], points[2])
    teacher_distance = _relative_distances(points[1], points[3])
    huber = F.smooth_l1_loss(student_distance, teacher_distance, reduction="none")
    return _per_sample(huber.mean(-1), student)


def rkd_angle(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Huber loss between the cosines of the angles at each sample to all pairs of others.

    Park et al., "Relational Knowledge Distillation", CVPR 2019, eqs. 8 to 10. Memory grows with
    the cube of the number of related points.
    """
    points = _points(student, teacher, anchors)
    student_angle = _angles(points[0], points[2])
    teacher_angle = _angles(points[1], points[3])
    huber = F.smooth_l1_loss(student_angle, teacher_angle, reduction="none")
    return _per_sample(huber.mean((-1, -2)), student)


class DistillationLoss:
    """A weighted sum of registered losses.

    Args:
        weights: Weight per name; see :data:`repfusion_env.registry.LOSSES`.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.terms: list[tuple[float, Loss]] = [
            (weight, look_up("loss", name, LOSSES)) for name, weight in weights.items() if weight
        ]
        self.names = frozenset(name for name, weight in weights.items() if weight)

    def __call__(self, student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
        """The weighted sum per sample, (B,)."""
        values = [weight * loss(student, teacher, anchors) for weight, loss in self.terms]
        return torch.stack(values).sum(0)


def _points(
    student: Tensor, teacher: Tensor, anchors: Anchors | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, student's others, teacher's others, each (groups, L, F)."""

    def arranged(features: Tensor) -> Tensor:
        if features.ndim == 4:
            return features.flatten(2).transpose(1, 2)  # (B, H*W, F)
        return features[None]  # (1, B, F)

    points = arranged(student), arranged(teacher)
    others = points if anchors is None else (arranged(anchors[0]), arranged(anchors[1]))
    return *points, *others


def _per_sample(values: Tensor, student: Tensor) -> Tensor:
    """(groups, L) -> (B,)."""
    return values.mean(1) if student.ndim == 4 else values[0]


def _relative_distances(points: Tensor, others: Tensor) -> Tensor:
    """(G, L, F), (G, L', F) -> (G, L, L') distances over the mean distance among the others."""
    distances = _distances(points, others)
    among = distances if others is points else _distances(others, others)
    positive = (among > 0).sum((1, 2), keepdim=True).clamp_min(1)
    return distances / (among.sum((1, 2), keepdim=True) / positive).clamp_min(_TINY)


def _distances(points: Tensor, others: Tensor) -> Tensor:
    """(G, L, F), (G, L', F) -> (G, L, L')."""
    squared = (points[:, :, None] - others[:, None]).square().sum(-1)
    # The root has no gradient at 0, where a point meets itself.
    return torch.where(squared > _TINY, squared.clamp_min(_TINY).sqrt(), 0.0)


def _angles(points: Tensor, others: Tensor) -> Tensor:
    """(G, L, F), (G, L', F) -> (G, L, L', L') cosines of the angles at each point."""
    directions = F.normalize(others[:, None] - points[:, :, None], dim=-1)  # (G, L, L', F)
    return directions @ directions.transpose(-1, -2)
