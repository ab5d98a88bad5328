"""Angle between the features, whatever their length."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from repfusion_env.losses.shape import Anchors


def cosine(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """One minus the cosine similarity over channels, mean over positions; in [0, 2]."""
    distance = 1.0 - F.cosine_similarity(student, teacher, dim=1)
    return distance.flatten(1).mean(1) if student.ndim == 4 else distance
