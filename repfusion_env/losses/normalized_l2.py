"""Squared difference of the features' directions, whatever their length."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from repfusion_env.losses.shape import Anchors


def normalized_l2(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Squared distance of unit vectors, per position, as in Grill et al., "BYOL", NeurIPS 2020."""
    difference = F.normalize(student, dim=1) - F.normalize(teacher, dim=1)
    distance = difference.square().sum(1)
    return distance.flatten(1).mean(1) if student.ndim == 4 else distance
