"""Absolute difference of features, element by element."""

from __future__ import annotations

from torch import Tensor

from repfusion_env.losses.shape import Anchors


def l1(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Mean absolute difference, as Kim et al., "Factor Transfer", NeurIPS 2018, take of factors."""
    return (student - teacher).abs().flatten(1).mean(1)
