"""Validation splits of the training labels, for what a probe chooses.

Shape letters: M labelled images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repfusion_env.noise import derive_seed

# Below this many labels one split says too little, and every image takes its turn.
FEW_LABELS = 500
FOLDS = 5
Split = tuple[Tensor, Tensor]


def validation_splits(labels: Tensor, seed: int) -> list[Split]:
    """Pairs of positions (fitted on, validated on), stratified by class.

    One split of 4 to 1 where there are 500 labels or more, else all five of a five-fold one (fewer
    folds for fewer than five labels).

    Args:
        labels: (M,) int64, M >= 2.
        seed: Of the assignment.

    Raises:
        ValueError: There is a single label, of which nothing can be left out.
    """
    count = len(labels)
    if count < 2:
        raise ValueError(f"labels: {count} given; a probe needs 2 or more to validate its settings")
    generator = torch.Generator().manual_seed(derive_seed(seed, "validation"))
    order = torch.randperm(count, generator=generator)
    by_class = order[torch.sort(labels.cpu()[order], stable=True).indices]
    folds = min(FOLDS, count)
    fold = torch.empty_like(by_class)
    # Dealt out like cards, class after class, so that every fold has its share of each class.
    fold[by_class] = torch.arange(count) % folds
    fold = fold.to(labels.device)
    used = range(1) if count >= FEW_LABELS else range(folds)
    return [((fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]) for k in used]


def check_labels(labels: Tensor, features: Tensor, name: str) -> None:
    """Refuse features (M, S) and labels (M,) that do not belong together."""
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
        raise ValueError(
            f"{name}: features of shape {tuple(features.shape)} and labels of shape "
            f"{tuple(labels.shape)} given; they must be (M, S) and (M,)"
        )
