"""Segmentation: a class for every pixel, cross-entropy, mean intersection over union.

Shape letters: B samples, H,W image, K classes, h,w a head's map.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repfusion_env.config import ExperimentConfig
from repfusion_env.data.annotations import IGNORE, Masks
from repfusion_env.data.bank import ImageBank
from repfusion_env.tasks import Shape
from repfusion_env.tasks.requirements import require_annotation
from repfusion_env.tasks.segmentation_metric import SegmentationMetric
from students.segmentation import (
    HEADS,
    READ_ALL_STAGES,
    HeadSettings,
    WithAuxiliary,
    position_mlp,
)

# Logits of the answer, or of the answer and of the auxiliary heads.
Logits = Tensor | tuple[Tensor, ...]


class SegmentationTask:
    """Masks ``(B, H, W)`` of class ids, :data:`IGNORE` where a pixel does not count.

    Heads give logits (B, K, h, w) at their maps' resolution; losses, answers and metrics bring
    them to the masks' by bilinear interpolation.

    Args:
        config: Which head, under ``segmentation``.
        bank: Images with masks.

    Raises:
        ValueError: The bank has no masks, masks of another size than its images, a single class, or
            no pixel that counts.
    """

    annotation = "masks"
    score = "pixel_accuracy"
    headline = "miou"
    higher_is_better = True
    percent = True

    def __init__(self, config: ExperimentConfig, bank: ImageBank) -> None:
        masks = require_annotation(bank, Masks, "segmentation")
        images, found = bank.shape[1:], tuple(masks.values.shape[1:])
        if images != found:
            raise ValueError(
                f"data set '{bank.name}': images are {images[0]}x{images[1]} pixels, but their "
                f"masks {found[0]}x{found[1]}; a mask has one id for every pixel of its image"
            )
        if len(masks.classes) < 2:
            raise ValueError(
                f"data set '{bank.name}' has masks of the one class '{masks.classes[0]}', but task "
                "'segmentation' needs two or more; a background is a class, too"
            )
        # Most banks end the search with their first image.
        if not any(bool((mask != IGNORE).any()) for mask in masks.values):
            raise ValueError(
                f"no pixel of data set '{bank.name}' counts: its {len(masks):,} masks hold nothing "
                f"but {IGNORE}; expected are ids of classes"
            )
        self.settings = config.segmentation
        self.classes = masks.classes
        self.size = images
        self.reads: Literal["last", "stages"] = "last"
        if self.settings.head in READ_ALL_STAGES or self.settings.auxiliary:
            self.reads = "stages"

    def head(self, shapes: list[Shape], hidden: int = 0) -> nn.Module:
        """The configured head, or with ``hidden`` > 0 three linear layers at every position."""
        settings = HeadSettings(
            shapes, len(self.classes), hidden or self.settings.width, min(self.size)
        )
        if hidden:
            return position_mlp(settings)
        head = HEADS[self.settings.head](settings)
        if self.settings.auxiliary and len(shapes) > 1:
            return WithAuxiliary(head, settings)
        return head

    def targets(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """Masks of the images ``ids``, (B, H, W) int64."""
        masks = require_annotation(bank, Masks, "segmentation")
        return masks.values.index_select(0, ids).long()

    def losses(self, outputs: Logits, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the pixels that count, in nats, (B,); 0 where none does.

        Auxiliary heads' losses are added with their weight.
        """
        if isinstance(outputs, tuple):
            answer, *further = (_cross_entropy(logits, targets) for logits in outputs)
            return answer + self.settings.auxiliary * torch.stack(further).sum(0)
        return _cross_entropy(outputs, targets)

    def correct(self, outputs: Logits, targets: Tensor) -> Tensor:
        """The part of the pixels that count whose class is found, (B,); 1 where none counts."""
        counts = targets != IGNORE
        hits = (_answer(outputs, targets.shape[1:]) == targets) & counts
        pixels = counts.sum((1, 2))
        return torch.where(pixels > 0, hits.sum((1, 2)) / pixels.clamp_min(1), 1.0)

    def predict(self, outputs: Logits) -> Tensor:
        """The class of the largest logit of every pixel, (B, H, W) int64."""
        return _answer(outputs, self.size)

    def metric(self) -> SegmentationMetric:
        """mIoU, IoU of each class, and pixel accuracy, of all pixels together."""
        return SegmentationMetric(self.classes, _answer)

    def draw(self, image: np.ndarray, answer: Tensor, side: int) -> np.ndarray:
        """The image under its classes' colours."""
        from repfusion_env.tasks.pictures import draw_masks

        return draw_masks(image, answer, side, self.classes)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    resized = _resized(logits, targets.shape[1:])
    pixels = F.cross_entropy(resized, targets, reduction="none", ignore_index=IGNORE)
    # Each image counts as one, however many of its pixels are unlabelled.
    return pixels.sum((1, 2)) / (targets != IGNORE).sum((1, 2)).clamp_min(1)


def _answer(outputs: Logits, size: tuple[int, ...]) -> Tensor:
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return _resized(logits, size).argmax(1)


def _resized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, K, h, w) as float32 (B, K, *size)."""
    logits = logits.float()
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
