"""Relational knowledge distillation of the angles among points.

Shape letters: G groups of related points, L points, L' others, F feature width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from repfusion_env.losses.relations import per_sample, related
from repfusion_env.losses.shape import Anchors


def rkd_angle(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Huber loss between the cosines of the angles at each sample to all pairs of others.

    Park et al., "Relational Knowledge Distillation", CVPR 2019, section 3.2. Memory grows with
    the cube of the number of related points.
    """
    points = related(student, teacher, anchors)
    student_angle = _angles(points[0], points[2])
    teacher_angle = _angles(points[1], points[3])
    huber = F.smooth_l1_loss(student_angle, teacher_angle, reduction="none")
    return per_sample(huber.mean((-1, -2)), student)


def _angles(points: Tensor, others: Tensor) -> Tensor:
    """(G, L, F), (G, L', F) -> (G, L, L', L') cosines of the angles at each point."""
    directions = F.normalize(others[:, None] - points[:, :, None], dim=-1)  # (G, L, L', F)
    return directions @ directions.transpose(-1, -2)
