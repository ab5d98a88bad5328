"""Samples among others: what the relational losses share.

On pooled features the related points are the images of the batch, on dense features the positions
of one image. Shape letters: G groups of related points, L points, L' others, F feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from repfusion_env.losses.shape import Anchors

TINY = 1e-12


def related(
    student: Tensor, teacher: Tensor, anchors: Anchors | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, student's others, teacher's others, each (G, L, F) or (G, L', F).

    Other ``i`` of point ``i`` is the point itself; without anchors all others are the points.
    """

    def arranged(features: Tensor) -> Tensor:
        if features.ndim == 4:
            return features.flatten(2).transpose(1, 2)  # (B, H*W, F)
        return features[None]  # (1, B, F)

    points = arranged(student), arranged(teacher)
    others = points if anchors is None else (arranged(anchors[0]), arranged(anchors[1]))
    return *points, *others


def per_sample(values: Tensor, student: Tensor) -> Tensor:
    """(G, L) -> (B,): the points themselves where pooled, their mean where dense."""
    return values.mean(1) if student.ndim == 4 else values[0]


def products(points: Tensor, others: Tensor) -> Tensor:
    """(G, L, F), (G, L', F) -> (G, L, L') inner products, a point's with itself being its own.

    Where the others are fixed the point still moves on both sides of that one.
    """
    values = points @ others.transpose(1, 2)
    if others is points:
        return values
    count = points.shape[1]
    own = (points * (points - others[:, :count])).sum(-1)  # (G, L)
    return values + F.pad(torch.diag_embed(own), (0, others.shape[1] - count))


def unit(vectors: Tensor) -> Tensor:
    """Vectors along the last axis divided by their length.

    One shorter than 1e-6 is divided by 1e-6 instead, so that no gradient exceeds its millionfold.
    """
    return F.normalize(vectors, dim=-1, eps=1e-6)


def itself(values: Tensor) -> Tensor:
    """(G, L, L') -> (L, L') bool, True where a point meets itself."""
    return torch.eye(*values.shape[-2:], dtype=torch.bool, device=values.device)
