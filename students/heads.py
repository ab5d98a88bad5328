"""Building blocks of the task heads, on pooled features."""

from __future__ import annotations

from torch import nn


def linear_head(in_features: int, out_features: int) -> nn.Linear:
    """Build the head of a linear probe: (N, in_features) to (N, out_features)."""
    return nn.Linear(in_features, out_features)


def mlp_head(in_features: int, hidden: int, out_features: int) -> nn.Sequential:
    """Build three linear layers with ReLU between them: (N, in_features) to (N, out_features).

    The published method trains such a classifier on the teacher feature (arXiv:2308.10916).

    Args:
        in_features: width of the feature.
        hidden: width of both hidden layers.
        out_features: number of outputs.
    """
    return nn.Sequential(
        nn.Linear(in_features, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out_features),
    )
