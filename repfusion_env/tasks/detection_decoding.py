"""From what a detector says to boxes with a class and a score.

Shape letters: B samples, A anchors, K classes, G objects found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from repfusion_env.data.annotations import NO_BOX
from repfusion_env.tasks.detection_boxes import FCOS_CODER, RETINANET_CODER, SSD_CODER
from repfusion_env.tasks.detection_losses import fcos_losses, retinanet_losses, ssd_losses

# As many as the metric counts in an image, and how many go into the suppression of doubles.
MOST_OBJECTS = 100
MOST_CANDIDATES = 1000


@dataclass(frozen=True)
class Reading:
    """How a kind of detector is read.

    Attributes:
        losses: One loss per sample, of outputs and targets (B, G, 5).
        boxes: (B, A, 4) in pixels.
        scores: (B, A, K) in [0, 1].
        overlap: IoU from which the less sure of two boxes of a class is a double; torchvision's.
        least: Score below which nothing is found.
    """

    losses: Callable[[dict[str, Tensor], Tensor], Tensor]
    boxes: Callable[[dict[str, Tensor]], Tensor]
    scores: Callable[[dict[str, Tensor]], Tensor]
    overlap: float
    least: float


def surest(
    reading: Reading, outputs: dict[str, Tensor], size: tuple[int, int], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The surest answers of each sample, doubles among them, without waiting for the device.

    Args:
        reading: Of the detector's kind.
        outputs: What it said of B images.
        size: Height and width of the images; boxes are cut there.
        count: How many.

    Returns:
        Boxes (B, n, 4), labels (B, n) and scores (B, n), the surest first; n is ``count``, or
        A * K where that is less.
    """
    scores = reading.scores(outputs)
    classes = scores.shape[2]
    scores, index = scores.flatten(1).topk(min(count, scores[0].numel()), dim=1)
    anchor = torch.div(index, classes, rounding_mode="floor")
    boxes = reading.boxes(outputs).gather(1, anchor[..., None].expand(-1, -1, 4))
    return clip_boxes_to_image(boxes, size), index % classes, scores


def detections(reading: Reading, outputs: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """What a detector found, each object once: non-maximum suppression within a class.

    Args:
        reading: Of the detector's kind.
        outputs: What it said of B images.
        size: Height and width of the images.

    Returns:
        float32 (B, 100, 6): left, top, right, bottom in pixels, label, score, the surest first;
        label -1 and zeros behind the last one found.
    """
    boxes, labels, scores = surest(reading, outputs, size, MOST_CANDIDATES)
    found = torch.zeros(len(boxes), MOST_OBJECTS, 6, device=boxes.device)
    found[..., 4] = NO_BOX
    # A box of no width cannot be an object, and no library takes it.
    solid = ((boxes[..., 2:] - boxes[..., :2]) > 0).all(2) & (scores >= reading.least)
    for row, counts in enumerate(solid):
        kept = boxes[row][counts], scores[row][counts], labels[row][counts]
        best = batched_nms(*kept, reading.overlap)[:MOST_OBJECTS]
        parts = (kept[0], kept[2][:, None], kept[1][:, None])
        found[row, : len(best)] = torch.cat([part[best].float() for part in parts], dim=1)
    return found


def _fcos_boxes(outputs: dict[str, Tensor]) -> Tensor:
    boxes: Tensor = FCOS_CODER.decode(outputs["bbox_regression"].float(), outputs["anchors"])
    return boxes


def _fcos_scores(outputs: dict[str, Tensor]) -> Tensor:
    middle = outputs["bbox_ctrness"].float().sigmoid()
    return (outputs["cls_logits"].float().sigmoid() * middle).sqrt()


def _retinanet_boxes(outputs: dict[str, Tensor]) -> Tensor:
    return RETINANET_CODER.decode(outputs["bbox_regression"].float(), outputs["anchors"])


def _retinanet_scores(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["cls_logits"].float().sigmoid()


def _ssd_boxes(outputs: dict[str, Tensor]) -> Tensor:
    return SSD_CODER.decode(outputs["bbox_regression"].float(), outputs["anchors"])


def _ssd_scores(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["cls_logits"].float().softmax(2)[..., 1:]


READINGS: dict[str, Reading] = {
    "fcos": Reading(fcos_losses, _fcos_boxes, _fcos_scores, overlap=0.6, least=0.05),
    "retinanet": Reading(
        retinanet_losses, _retinanet_boxes, _retinanet_scores, overlap=0.5, least=0.05
    ),
    "ssdlite": Reading(ssd_losses, _ssd_boxes, _ssd_scores, overlap=0.55, least=0.01),
}
