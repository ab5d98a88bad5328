"""Squared difference of features, element by element."""

from __future__ import annotations

from torch import Tensor

from repfusion_env.losses.shape import Anchors


def hint(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Mean squared difference. Hints: Romero et al., "FitNets", ICLR 2015, section 2.2."""
    return (student - teacher).square().flatten(1).mean(1)
