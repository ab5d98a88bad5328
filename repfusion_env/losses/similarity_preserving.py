"""Similarity-preserving distillation: which points are alike, not what they are."""

from __future__ import annotations

from torch import Tensor

from repfusion_env.losses.relations import per_sample, products, related, unit
from repfusion_env.losses.shape import Anchors


def similarity_preserving(
    student: Tensor, teacher: Tensor, anchors: Anchors | None = None
) -> Tensor:
    """Mean squared difference of the rows of the similarity matrices, each row of unit length.

    Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, section 3: ``G = Q
    Q^T``, its rows divided by their length, ``|G_T - G_S|_F^2 / b^2``; the mean over samples is
    that. Non-negative, 0 at a match. Memory grows with the square of the related points.
    """
    mine, theirs, my_others, their_others = related(student, teacher, anchors)
    difference = unit(products(mine, my_others)) - unit(products(theirs, their_others))
    return per_sample(difference.square().mean(-1), student)
