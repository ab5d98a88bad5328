"""Image classification: one label per image, cross-entropy, accuracy."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repfusion_env.config import ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.tasks import Shape
from students import linear_head, mlp_head


class ClassificationTask:
    """Labels ``(B,)`` in [0, classes), logits ``(B, classes)``."""

    annotation = "labels"
    reads: Literal["pooled"] = "pooled"
    score = "accuracy"
    headline = "accuracy"
    higher_is_better = True
    percent = True

    def __init__(self, config: ExperimentConfig, bank: ImageBank) -> None:
        self.names = bank.classes

    def head(self, shapes: list[Shape], hidden: int = 0) -> nn.Module:
        """Linear, or with ``hidden`` > 0 the published method's three layers."""
        in_features = shapes[-1][0]
        if hidden:
            return mlp_head(in_features, hidden, len(self.names))
        return linear_head(in_features, len(self.names))

    def targets(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """Labels of the images ``ids``, (B,) int64."""
        return bank.labels[ids]

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, (B,)."""
        return F.cross_entropy(outputs.float(), targets, reduction="none")

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether the largest logit is the label's, (B,) bool."""
        return outputs.argmax(dim=1) == targets

    def predict(self, outputs: Tensor) -> Tensor:
        """The labels of the largest logits, (B,) int64."""
        return outputs.argmax(dim=1)

    def metric(self) -> Accuracy:
        """Accuracy of all images together."""
        return Accuracy()

    def draw(self, image: np.ndarray, answer: Tensor, side: int) -> np.ndarray:
        """The image with the name of its class below it."""
        from repfusion_env.tasks.pictures import draw_name

        return draw_name(image, self.names[int(answer)], side)


class Accuracy:
    """The part of the images whose largest logit is their label's."""

    def __init__(self) -> None:
        self._right, self._images = 0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take logits (B, classes) and labels (B,)."""
        self._right += int(torch.count_nonzero(outputs.argmax(dim=1) == targets))
        self._images += len(targets)

    def compute(self) -> dict[str, float]:
        """``accuracy`` in [0, 1]."""
        return {"accuracy": self._right / self._images if self._images else float("nan")}
