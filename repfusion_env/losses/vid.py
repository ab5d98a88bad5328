"""Variational information distillation: squared differences over a learned variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repfusion_env.losses.shape import Anchors, FeatureShape


class VariationalInformation(nn.Module):
    """Gaussian log-likelihood of the teacher's feature with one variance per channel.

    Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019:
    ``log sigma_c + (t_c - mu_c(s))^2 / (2 sigma_c^2)`` with ``sigma_c^2 = softplus(alpha_c) +
    floor``, mean over channels (published: sum) and positions; ``mu`` is the projection. The log
    term, which no feature can change, enters less its own present value: all gradients are the
    published loss's, and the value is the Mahalanobis part alone, non-negative and 0 at a match,
    where the published one has no lower bound at 0 and would pass the look-ahead for a distance.

    Args:
        shape: Gives the channels.
        initial_variance: At the start, above ``floor``.
        floor: Least variance, above 0.

    Raises:
        ValueError: ``initial_variance`` does not exceed ``floor``.
    """

    def __init__(
        self, shape: FeatureShape, initial_variance: float = 5.0, floor: float = 1e-5
    ) -> None:
        super().__init__()
        excess = initial_variance - floor
        if excess <= 0:
            raise ValueError(
                f"loss 'vid', option initial_variance: {initial_variance} given; it must be "
                f"greater than floor, {floor}"
            )
        self.floor = floor
        inverse = excess + math.log(-math.expm1(-excess))  # softplus(inverse) = excess
        self.alpha = nn.Parameter(torch.full((shape.width,), inverse))

    @property
    def variance(self) -> Tensor:
        """(F,)."""
        return F.softplus(self.alpha) + self.floor

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        anchors: Anchors | None = None,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The loss per sample, (B,), of features (B, F) or (B, F, H, W)."""
        variance = self.variance
        squares = (student - teacher).square().flatten(2 if student.ndim == 4 else 1)
        squares = squares.mean(2) if student.ndim == 4 else squares  # (B, F)
        log = variance.log().mean()
        return 0.5 * ((squares / variance).mean(1) + log - log.detach())
