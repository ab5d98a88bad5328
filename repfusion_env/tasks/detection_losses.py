"""The losses of torchvision's detectors for every sample by itself.

The detectors' own ``compute_loss`` goes through the images one by one, selects positions, which
makes the device wait, and gives one number for the whole batch. Here the same sums are taken over
all positions of all images at once; what is not matched is weighted by 0. A sample's loss is what
``compute_loss`` says of it alone; tests compare the two.

Shape letters: B samples, A anchors, G most objects of an image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from repfusion_env.tasks.detection_boxes import (
    FCOS_CODER,
    RETINANET_CODER,
    SSD_CODER,
    box_ious,
    generalized_iou_losses,
)

BACKGROUND = -1
UNDECIDED = -2

# A point learns a box when it lies within so many strides of its middle (arXiv:2006.09214), and
# when the box's farthest side is between so many strides away; the finest grid takes all smaller
# ones too, the coarsest all larger ones.
CENTRE_RADIUS = 1.5
RANGE = (4.0, 8.0)
# Boxes that SSD learns as background, for each that it learns as an object: the hardest.
NEGATIVES = 3

# Pairs of object and anchor that are looked at together: on a CPU what its cache holds, several
# times faster than all at once; elsewhere what memory allows.
CPU_PAIRS, PAIRS = 2**18, 2**26


def fcos_losses(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Focal loss, generalized IoU loss and centerness of FCOS (arXiv:2006.09214).

    Args:
        outputs: Of a ``fcos`` detector.
        targets: (B, G, 5) left, top, right, bottom in pixels, label; -1 where there is no object.

    Returns:
        (B,), each part divided by the sample's number of matched points, at least 1.
    """
    logits, anchors, boxes, labels = _read(outputs, targets)
    matched = in_parts(match_points, anchors, boxes, labels >= 0)
    goal, classes, weight, count = _matched(matched, anchors, boxes, labels)
    rows = anchors.expand_as(goal)
    predicted = FCOS_CODER.decode(outputs["bbox_regression"].float(), rows)
    focal = sigmoid_focal_loss(logits, _one_hot(classes, logits)).sum((1, 2))
    place = generalized_iou_losses(predicted, goal)
    sides = FCOS_CODER.encode(rows, goal)
    pairs = torch.stack([sides[..., 0::2], sides[..., 1::2]], dim=2)  # left, right; top, bottom
    centre = (pairs.amin(3) / pairs.amax(3).clamp_min(1e-6)).prod(2).clamp(0, 1).sqrt()
    given = outputs["bbox_ctrness"].float().squeeze(2)
    middle = functional.binary_cross_entropy_with_logits(given, centre, reduction="none")
    return (focal + ((place + middle) * weight).sum(1)) / count


def retinanet_losses(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Focal loss (arXiv:1708.02002) and generalized IoU loss (arXiv:1902.09630).

    Args:
        outputs: Of a ``retinanet`` detector.
        targets: As in :func:`fcos_losses`.

    Returns:
        (B,), each part divided by the sample's number of matched anchors, at least 1.
    """
    logits, anchors, boxes, labels = _read(outputs, targets)
    matched = in_parts(match_anchors, anchors, boxes, labels >= 0)
    goal, classes, weight, count = _matched(matched, anchors, boxes, labels)
    focal = sigmoid_focal_loss(logits, _one_hot(classes, logits)).sum(2)
    focal = (focal * (matched != UNDECIDED)).sum(1)
    predicted = RETINANET_CODER.decode(outputs["bbox_regression"].float(), anchors)
    return (focal + (generalized_iou_losses(predicted, goal) * weight).sum(1)) / count


def ssd_losses(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy over matched boxes and the three times as many hardest others, smooth L1.

    Liu et al., "SSD: Single Shot MultiBox Detector", arXiv:1512.02325. In an image without an
    object, of which the library learns nothing, the three hardest boxes count.

    Args:
        outputs: Of an ``ssdlite`` detector.
        targets: As in :func:`fcos_losses`.

    Returns:
        (B,), each part divided by the sample's number of matched boxes, at least 1.
    """
    logits, anchors, boxes, labels = _read(outputs, targets)
    matched = in_parts(match_default_boxes, anchors, boxes, labels >= 0)
    goal, classes, weight, count = _matched(matched, anchors, boxes, labels)
    classes = classes + 1  # the background is 0
    entropy = functional.cross_entropy(logits.transpose(1, 2), classes, reduction="none")
    found = weight > 0
    hardness = entropy.detach().masked_fill(found, -torch.inf)
    order = hardness.argsort(dim=1, descending=True, stable=True)
    numbers = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, numbers)
    counted = found | (rank < NEGATIVES * count[:, None])
    moved, wanted = outputs["bbox_regression"].float(), SSD_CODER.encode(goal, anchors)
    place = functional.smooth_l1_loss(moved, wanted, reduction="none").sum(2)
    return ((entropy * counted).sum(1) + (place * weight).sum(1)) / count


@torch.no_grad()
def in_parts(
    match: Callable[[Tensor, Tensor, Tensor], Tensor], anchors: Tensor, boxes: Tensor, valid: Tensor
) -> Tensor:
    """One of the three below, a few samples at a time.

    Args:
        match: :func:`match_points`, :func:`match_anchors` or :func:`match_default_boxes`.
        anchors: (A, 4).
        boxes: (B, G, 4).
        valid: bool (B, G), False where there is no object.

    Returns:
        int64 (B, A).
    """
    pairs = CPU_PAIRS if boxes.device.type == "cpu" else PAIRS
    rows = max(1, pairs // max(1, boxes.shape[1] * len(anchors)))
    parts = []
    for some, real in zip(boxes.split(rows), valid.split(rows), strict=True):
        most = most_objects(real)
        parts.append(match(anchors, some[:, :most], real[:, :most]))
    return torch.cat(parts)


def most_objects(valid: Tensor) -> int:
    """Columns of ``valid`` (B, G) up to the last that holds an object, at least one.

    All of them where it is not on a CPU: another device would have to be waited for.
    """
    if valid.device.type != "cpu":
        return valid.shape[1]
    return int((valid.any(0) * torch.arange(1, valid.shape[1] + 1)).max().clamp_min(1))


def match_points(anchors: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
    """Which object each point of FCOS learns: of several the smallest.

    Args:
        anchors: (A, 4) cells around the points, fine to coarse.
        boxes: (B, G, 4).
        valid: bool (B, G), False where there is no object.

    Returns:
        int64 (B, A): the object, or :data:`BACKGROUND`.
    """
    size = anchors[:, 2] - anchors[:, 0]
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)
    x0, y0, x1, y1 = boxes[..., None].unbind(2)  # (B, G, 1)
    left, top, right, bottom = x - x0, y - y0, x1 - x, y1 - y  # (B, G, A)
    nearest = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom))
    farthest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
    away = torch.maximum((left - right).abs(), (top - bottom).abs()) / 2
    least = torch.where(size == size.min(), 0.0, RANGE[0] * size)
    most = torch.where(size == size.max(), torch.inf, RANGE[1] * size)
    fits = (nearest > 0) & (away < CENTRE_RADIUS * size) & (farthest > least) & (farthest < most)
    area = ((x1 - x0) * (y1 - y0)).where(fits & valid[..., None], torch.inf)
    smallest, index = area.min(1)
    return torch.where(smallest < torch.inf, index, BACKGROUND)


def match_anchors(
    anchors: Tensor, boxes: Tensor, valid: Tensor, high: float = 0.5, low: float = 0.4
) -> Tensor:
    """Which object each anchor of RetinaNet learns: the one with the greatest IoU.

    The best anchors of an object learn it (or their own best object) however small the IoU is.

    Args:
        anchors: (A, 4).
        boxes: (B, G, 4).
        valid: bool (B, G), False where there is no object.
        high: IoU from which an anchor learns an object.
        low: IoU below which it learns background.

    Returns:
        int64 (B, A): the object, :data:`BACKGROUND`, or :data:`UNDECIDED`.
    """
    overlap = box_ious(boxes, anchors[None]) * valid[..., None]
    best, index = overlap.max(1)
    matched = torch.where(best >= low, UNDECIDED, BACKGROUND)
    own = (overlap == overlap.amax(2, keepdim=True)) & (overlap > 0)
    return torch.where((best >= high) | own.any(1), index, matched)


def match_default_boxes(
    anchors: Tensor, boxes: Tensor, valid: Tensor, least: float = 0.5
) -> Tensor:
    """Which object each default box of SSD learns: the one with the greatest IoU.

    Each object's best default box learns it in any case; of several objects the last.

    Args:
        anchors: (A, 4).
        boxes: (B, G, 4).
        valid: bool (B, G), False where there is no object.
        least: IoU from which a default box learns an object.

    Returns:
        int64 (B, A): the object, or :data:`BACKGROUND`.
    """
    overlap = box_ious(boxes, anchors[None]) * valid[..., None]
    best, index = overlap.max(1)
    matched = torch.where(best >= least, index, BACKGROUND)
    numbers = torch.arange(boxes.shape[1], device=boxes.device)
    own = torch.where(valid, numbers, BACKGROUND)
    forced = torch.full_like(matched, BACKGROUND)
    forced = forced.scatter_reduce(1, overlap.argmax(2), own, "amax")
    return torch.where(forced >= 0, forced, matched)


def _read(outputs: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, anchors (A, 4), boxes (B, G, 4) and labels (B, G)."""
    labels = targets[..., 4].round().long()
    return outputs["cls_logits"].float(), outputs["anchors"][0], targets[..., :4], labels


def _matched(
    matched: Tensor, anchors: Tensor, boxes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each anchor is to say.

    Returns:
        Boxes (B, A, 4), an unmatched anchor's own, so that every loss is finite there; classes
        (B, A), :data:`BACKGROUND` where unmatched; weights (B, A), 1 where matched; how many are
        matched (B,), at least 1.
    """
    found = matched >= 0
    index = matched.clamp_min(0)
    goal = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    goal = torch.where(found[..., None], goal, anchors)
    classes = torch.where(found, labels.gather(1, index), BACKGROUND)
    return goal, classes, found.float(), found.sum(1).clamp_min(1)


def _one_hot(classes: Tensor, logits: Tensor) -> Tensor:
    """(B, A) to (B, A, K), nothing for the background."""
    numbers = torch.arange(logits.shape[2], device=logits.device)
    return (classes[..., None] == numbers).to(logits.dtype)
