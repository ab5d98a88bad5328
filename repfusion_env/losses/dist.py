"""DIST: correlation within a point's channels, and within a channel's points.

Shape letters: G groups of related points, L points, L' others, F feature width.
"""

from __future__ import annotations

from torch import Tensor

from repfusion_env.losses.relations import TINY, per_sample, related
from repfusion_env.losses.shape import Anchors


def dist(
    student: Tensor,
    teacher: Tensor,
    anchors: Anchors | None = None,
    *,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Tensor:
    """One minus Pearson's correlation, over a point's channels and over a channel's points.

    Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, section 3, on
    features in place of class probabilities: ``inter (1 - r(s_i, t_i))`` for each sample plus
    ``intra`` times the mean over channels of ``1 - r`` across samples. As ``1 - r`` is half the
    squared distance of the standardised vectors, each sample has its share of the second too, and
    the mean over samples is the published loss. Non-negative, 0 at a match. On dense features the
    points are the positions of one image.

    Args:
        student: (B, F) or (B, F, H, W).
        teacher: The same shape.
        anchors: Others that stay fixed.
        inter: Weight of the correlation over channels, 0 or more.
        intra: Weight of the correlation over points, 0 or more.

    Returns:
        (B,).
    """
    mine, theirs, my_others, their_others = related(student, teacher, anchors)
    by_point = 0.5 * (_over_channels(mine) - _over_channels(theirs)).square().sum(-1)  # (G, L)
    difference = _over_points(mine, my_others) - _over_points(theirs, their_others)
    by_channel = 0.5 * my_others.shape[1] * difference.square().mean(-1)  # (G, L)
    return per_sample(inter * by_point + intra * by_channel, student)


def _over_channels(points: Tensor) -> Tensor:
    """(G, L, F) minus its mean over F, of unit length."""
    centred = points - points.mean(-1, keepdim=True)
    return centred / centred.square().sum(-1, keepdim=True).clamp_min(TINY).sqrt()


def _over_points(points: Tensor, others: Tensor) -> Tensor:
    """(G, L, F): each channel minus its mean over points, over its length across points.

    Where the others are fixed, mean and length follow each point as it moves alone.
    """
    count = others.shape[1]
    mean = others.mean(1, keepdim=True)
    centred = others - mean
    squares = centred.square().sum(1, keepdim=True)  # (G, 1, F)
    if others is points:
        return centred / squares.clamp_min(TINY).sqrt()
    old, new = centred[:, : points.shape[1]], points - mean
    shift = (new - old) / count  # of the mean
    squares = squares + new.square() - old.square() - count * shift.square()
    return (new - shift) / squares.clamp_min(TINY).sqrt()
