"""Tasks: a head on the student's feature, a loss per sample, a metric."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from repfusion_env.data.bank import ImageBank


class Task(Protocol):
    """What the trainer needs to know of a task. B samples, S student width."""

    def head(self, in_features: int, hidden: int = 0) -> nn.Module:
        """A head on pooled features ``(B, in_features)``; ``hidden`` > 0 makes it three layers."""
        ...

    def targets(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """The targets of the images ``ids`` (B,)."""
        ...

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One non-negative loss per sample, (B,)."""
        ...

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether each sample is solved, (B,) bool."""
        ...
