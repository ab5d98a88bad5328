"""Losses and codes of boxes against torchvision's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import generalized_box_iou_loss

from repfusion_env.tasks.detection_boxes import (
    RETINANET_CODER,
    SSD_CODER,
    CentreCoder,
    generalized_iou_losses,
)


def _boxes(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, side = torch.rand(2, *shape, 2, generator=generator) * 20
    return torch.cat([corner, corner + side + 0.5], dim=-1)


def test_the_loss_and_its_gradient_are_the_librarys():
    mine, library = (_boxes(0, 3, 200).requires_grad_() for _ in range(2))
    others = _boxes(1, 3, 200)
    found = generalized_iou_losses(mine, others)
    expected = generalized_box_iou_loss(library, others)
    # Pairs that are far apart, and pairs that overlap well.
    assert (found > 1).any() and (found < 1).any()
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, library.grad)


@pytest.mark.parametrize(
    ("coder", "weights"),
    [(RETINANET_CODER, (1.0, 1.0, 1.0, 1.0)), (SSD_CODER, (10.0, 10.0, 5.0, 5.0))],
)
def test_codes_are_the_librarys_and_come_back_as_boxes(coder: CentreCoder, weights):
    library, anchors, boxes = BoxCoder(weights), _boxes(2, 50), _boxes(3, 4, 50)
    codes = coder.encode(boxes, anchors)
    for row in range(4):
        torch.testing.assert_close(codes[row], library.encode_single(boxes[row], anchors))
    torch.testing.assert_close(coder.decode(codes, anchors), boxes, rtol=1e-4, atol=1e-4)
    # Sizes beyond all bounds among them.
    wild = 40 * torch.randn(50, 4, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(coder.decode(wild, anchors), library.decode_single(wild, anchors))
