"""Attention transfer: where a network looks, not what it sees there."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from repfusion_env.losses.shape import Anchors


def attention_transfer(student: Tensor, teacher: Tensor, anchors: Anchors | None = None) -> Tensor:
    """Mean squared difference of unit-norm maps ``sum_c |A_c|^2``, dense features only.

    Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1 with p = 2.
    """

    def attention(features: Tensor) -> Tensor:
        return F.normalize(features.square().mean(1).flatten(1), dim=1)  # (B, H*W)

    return (attention(student) - attention(teacher)).square().mean(1)
