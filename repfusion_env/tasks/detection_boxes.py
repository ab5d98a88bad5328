"""Boxes in torch: their overlap, and the codes by which detectors say them.

The same formulas as torchvision's, without the selections by a mask and the constants made on the
host, for which the device would have to be waited for; tests compare the two.

Shape letters: B samples, A anchors, G most objects of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxLinearCoder

# Sizes are at most so many times the anchor's, as logarithm; torchvision's bound.
LARGEST_GROWTH = math.log(1000.0 / 16)
# Areas below this count as it, so that a division stays finite; torchvision's.
TINY = 1e-7


@dataclass(frozen=True)
class CentreCoder:
    """A box as a move of an anchor's centre and a logarithm of the change of its size.

    Girshick et al., "Rich feature hierarchies", arXiv:1311.2524, appendix C.

    Attributes:
        place: Weight of the centre's move.
        size: Weight of the size's change.
    """

    place: float = 1.0
    size: float = 1.0

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Codes (..., 4) of boxes (..., 4) at anchors (A, 4)."""
        centre, sides = _centre_and_sides(boxes)
        middle, extent = _centre_and_sides(anchors)
        moves = self.place * (centre - middle) / extent
        return torch.cat([moves, self.size * torch.log(sides / extent)], dim=-1)

    def decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (..., 4) of codes (..., 4) at anchors (A, 4)."""
        middle, extent = _centre_and_sides(anchors)
        centre = codes[..., :2] / self.place * extent + middle
        growth = (codes[..., 2:] / self.size).clamp(max=LARGEST_GROWTH)
        half = 0.5 * (growth.exp() * extent)
        return torch.cat([centre - half, centre + half], dim=-1)


# Each detector's own, as torchvision has them.
FCOS_CODER = BoxLinearCoder(normalize_by_size=True)
RETINANET_CODER = CentreCoder()
SSD_CODER = CentreCoder(place=10.0, size=5.0)


def generalized_iou_losses(boxes: Tensor, others: Tensor) -> Tensor:
    """1 minus the generalized intersection over union of pairs (arXiv:1902.09630).

    Args:
        boxes: (..., 4) left, top, right, bottom.
        others: (..., 4).

    Returns:
        (...), in [0, 2].
    """
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    shared = torch.where((high > low).all(-1), _area(low, high), 0.0)
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:]) - shared
    first = torch.minimum(boxes[..., :2], others[..., :2])
    last = torch.maximum(boxes[..., 2:], others[..., 2:])
    around = _area(first, last)
    return 1 - (shared / (union + TINY) - (around - union) / (around + TINY))


def box_ious(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each box with each other one of the same sample.

    Args:
        boxes: (B, G, 4) left, top, right, bottom.
        others: (B, A, 4), or (1, A, 4) for all samples.

    Returns:
        (B, G, A) in [0, 1]; 0 where both have no area.
    """
    x0, y0, x1, y1 = boxes[..., None].unbind(2)  # (B, G, 1)
    u0, v0, u1, v1 = others[:, None].unbind(3)  # (B, 1, A)
    wide = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp_min_(0)
    high = (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp_min_(0)
    shared = wide.mul_(high)
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared
    return shared.div_(union.clamp_min_(1e-9))


def _area(low: Tensor, high: Tensor) -> Tensor:
    # No prod: its backward waits for the device, to look for zeros.
    wide, tall = (high - low).unbind(-1)
    return wide * tall


def _centre_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sides, sides
