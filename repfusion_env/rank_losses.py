"""Losses that look beyond one sample, where the batch is spread over ranks.

Shape letters: B samples of this rank, N lanes of this rank, F teacher width of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from repfusion_env.loss_rules import RELATIONAL
from repfusion_env.losses import DistillationLoss
from repfusion_env.measuring import layer_losses
from repfusion_env.ranks import Ranks

# On pooled features these compare a sample with the others of the batch.
COMPARING = RELATIONAL | {"dist"}


def _compares(ranks: Ranks, loss: DistillationLoss) -> bool:
    return ranks.several and not COMPARING.isdisjoint(loss.names)


def shared_losses(
    ranks: Ranks,
    loss: DistillationLoss,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor | None,
    ids: Tensor,
) -> Tensor:
    """:func:`repfusion_env.measuring.layer_losses` of this rank's samples among all ranks', (B,).

    Args:
        ranks: Who holds the others.
        loss: The configured one.
        student: Projected student features per layer.
        teacher: Targets per layer.
        weights: (B, L) or (L,), or None.
        ids: (B,) images of the training bank.
    """
    if not _compares(ranks, loss) or student[0].ndim == 4:
        return layer_losses(loss, student, teacher, weights, ids)
    if weights is not None and weights.ndim == 2:
        weights = ranks.all(weights)
    mine, theirs = [ranks.all(p) for p in student], [ranks.all(z) for z in teacher]
    return ranks.share(layer_losses(loss, mine, theirs, weights, ranks.all(ids)))


def compared(ranks: Ranks, loss: DistillationLoss) -> Callable[[Tensor], Tensor]:
    """What a lane's look-ahead compares it with: from this rank's rows to all, its own first."""
    return ranks.all_own_first if _compares(ranks, loss) else lambda own: own


@torch.no_grad()
def remember(
    ranks: Ranks,
    loss: DistillationLoss,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    ids: Tensor,
    skip: Tensor,
    lanes: int,
) -> None:
    """Bring the memories of the losses up to date, on every rank with the samples of all.

    Args:
        ranks: Who holds the others.
        loss: The configured one.
        student: Projected student features per layer.
        teacher: Targets per layer.
        ids: (B,) images of the training bank.
        skip: () bool; where True nothing changes.
        lanes: N; the batch is so many new samples, then those of earlier steps.
    """
    mine, theirs = [p.detach() for p in student], list(teacher)
    if ranks.several and loss.remembers:
        blocks = len(ids) // lanes
        mine = [ranks.all(p, blocks) for p in mine]
        theirs = [ranks.all(z, blocks) for z in theirs]
        ids = ranks.all(ids, blocks)
    loss.remember(mine, theirs, ids, skip)
