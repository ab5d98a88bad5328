"""Image classification: one label per image, cross-entropy, accuracy."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from repfusion_env.data.bank import ImageBank
from students import linear_head, mlp_head


class ClassificationTask:
    """Labels ``(B,)`` in [0, classes), logits ``(B, classes)``."""

    def __init__(self, bank: ImageBank) -> None:
        self.classes = len(bank.classes)

    def head(self, in_features: int, hidden: int = 0) -> nn.Module:
        """Linear, or with ``hidden`` > 0 the published method's three layers."""
        if hidden:
            return mlp_head(in_features, hidden, self.classes)
        return linear_head(in_features, self.classes)

    def targets(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """Labels of the images ``ids``, (B,) int64."""
        return bank.labels[ids]

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, (B,)."""
        return F.cross_entropy(outputs.float(), targets, reduction="none")

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether the largest logit is the label's, (B,) bool."""
        return outputs.argmax(dim=1) == targets
