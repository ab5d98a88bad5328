from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from repfusion_env.tasks.detection_boxes import box_ious
from repfusion_env.tasks.detection_decoding import READINGS, detections
from students.detection import HEADS, Detector

SIDE, CLASSES = 64, 3
SHAPES = [(8, 16, 16), (8, 8, 8), (8, 4, 4)]
ALL: dict[str, Any] = {"topk_candidates": 10_000, "detections_per_img": 10_000}


class _NoBackbone(nn.Module):
    out_channels = 32


def _library(kind: str) -> Any:
    """The library's detector, of which only the loss and the reading are used."""
    backbone = _NoBackbone()
    if kind == "fcos":
        return FCOS(backbone, CLASSES, score_thresh=0.05, **ALL)
    if kind == "retinanet":
        head = RetinaNetHead(32, 9, CLASSES)
        head.regression_head._loss_type = "giou"
        return RetinaNet(backbone, CLASSES, head=head, **ALL)
    return SSD(
        backbone,
        DefaultBoxGenerator([[2]]),
        (SIDE, SIDE),
        CLASSES + 1,
        head=nn.Identity(),
        nms_thresh=0.55,
        **ALL,
    )


def _outputs(kind: str, images: int, seed: int = 0, sure: float = 0.0) -> dict[str, Tensor]:
    """Random answers on the anchors of a real detector."""
    generator = torch.Generator().manual_seed(seed)
    anchors = Detector(SHAPES, (SIDE, SIDE), CLASSES, kind, width=16).anchors
    columns = {"cls_logits": CLASSES + (kind == "ssdlite"), "bbox_regression": 4}
    if kind == "fcos":
        columns["bbox_ctrness"] = 1
    outputs = {
        name: torch.randn(images, len(anchors), count, generator=generator)
        for name, count in columns.items()
    }
    outputs["cls_logits"] += sure
    if kind == "fcos":
        outputs["bbox_regression"] = outputs["bbox_regression"].relu()
    return {**outputs, "anchors": anchors.expand(images, -1, -1)}


def _targets(counts: list[int], seed: int = 0) -> Tensor:
    """Objects whose areas differ by more than the library's float32 arithmetic mixes up."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(counts), max(*counts, 1), 5)
    rows[..., 4] = -1
    for image, count in enumerate(counts):
        for number in range(count):
            side = torch.tensor([7.0 + 9 * number, 9.0 + 7 * number])
            corner = torch.rand(2, generator=generator) * (SIDE - side)
            label = torch.randint(CLASSES, (1,), generator=generator)
            rows[image, number] = torch.cat([corner, corner + side, label.float()])
    return rows


def _library_loss(kind: str, outputs: dict[str, Tensor], row: Tensor) -> Tensor:
    """What the library says of one image alone."""
    model = _library(kind)
    row = row[row[:, 4] >= 0]
    target = {"boxes": row[:, :4], "labels": row[:, 4].long() + int(kind == "ssdlite")}
    anchors = [outputs["anchors"][0]]
    if kind == "fcos":
        cells = [height * width for _, height, width in SHAPES]
        parts = model.compute_loss([target], outputs, anchors, cells)
    elif kind == "retinanet":
        parts = model.compute_loss([target], outputs, anchors)
    else:
        if len(row):
            matched = model.proposal_matcher(box_iou(target["boxes"], anchors[0]))
        else:
            matched = torch.full((len(anchors[0]),), -1)
        parts = model.compute_loss([target], outputs, anchors, [matched])
    return sum(parts.values(), torch.zeros(()))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_samples_loss_is_the_librarys_of_it_alone(kind, seed):
    counts = [1, 5, 2, 4]
    outputs, targets = _outputs(kind, len(counts), seed), _targets(counts, seed)
    losses = READINGS[kind].losses(outputs, targets)
    for image in range(len(counts)):
        alone = {name: values[image : image + 1] for name, values in outputs.items()}
        expected = _library_loss(kind, alone, targets[image])
        torch.testing.assert_close(losses[image], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_are_the_librarys_too(kind):
    targets = _targets([3, 2])
    gradients = []
    for ours in (True, False):
        outputs = _outputs(kind, 2)
        learned = [values.requires_grad_() for name, values in outputs.items() if name != "anchors"]
        if ours:
            total = READINGS[kind].losses(outputs, targets).sum()
        else:
            rows = [{name: v[image : image + 1] for name, v in outputs.items()} for image in (0, 1)]
            total = sum(_library_loss(kind, row, targets[i]) for i, row in enumerate(rows))
        gradients.append(torch.autograd.grad(total, learned))
    for given, expected in zip(*gradients, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_an_image_without_objects_has_a_loss_that_false_alarms_raise(kind):
    calm, alarmed = _outputs(kind, 2), _outputs(kind, 2)
    targets = _targets([0, 2])
    calm["cls_logits"] -= 4
    alarmed["cls_logits"] += 4
    if kind == "ssdlite":
        calm["cls_logits"][..., 0] += 8
        alarmed["cls_logits"][..., 0] -= 8
    low, high = (READINGS[kind].losses(outputs, targets)[0] for outputs in (calm, alarmed))
    assert low.isfinite() and high.isfinite()
    assert 0 <= low < high
    if kind != "ssdlite":  # there the library says 0 of any answer
        alone = {name: values[:1] for name, values in alarmed.items()}
        torch.testing.assert_close(high, _library_loss(kind, alone, targets[0]))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("answer", [0.0, -60.0, 60.0])
def test_losses_and_gradients_stay_finite_at_extreme_answers(kind, answer):
    outputs = _outputs(kind, 3)
    for name in outputs:
        if name != "anchors":
            outputs[name] = torch.full_like(outputs[name], answer, dtype=torch.bfloat16)
            if name == "bbox_regression" and kind == "fcos":
                outputs[name] = outputs[name].relu()
            outputs[name].requires_grad_()
    targets = _targets([0, 3, 1])
    targets[2, 0] = torch.tensor([1.5, 1.5, 2.5, 2.25, 0])  # smaller than any cell or anchor
    losses = READINGS[kind].losses(outputs, targets)
    assert losses.dtype == torch.float32 and losses.isfinite().all() and (losses >= 0).all()
    losses.sum().backward()
    learned = [values for name, values in outputs.items() if name != "anchors"]
    assert all(values.grad is not None and values.grad.isfinite().all() for values in learned)


@pytest.mark.parametrize("kind", HEADS)
def test_losses_depend_neither_on_padding_nor_on_other_samples(kind):
    outputs, targets = _outputs(kind, 2), _targets([2, 4])
    losses = READINGS[kind].losses(outputs, targets)
    alone = {name: values[:1] for name, values in outputs.items()}
    rubbish = torch.tensor([5.0, 5.0, 20.0, 20.0, -1.0]).expand(1, 3, 5)
    padded = torch.cat([rubbish, targets[:1, :2], rubbish], dim=1)
    torch.testing.assert_close(READINGS[kind].losses(alone, padded)[0], losses[0])


def test_overlaps_are_the_librarys():
    boxes, others = _targets([4, 4], seed=3)[..., :4], _targets([6, 6], seed=4)[..., :4]
    for image in (0, 1):
        expected = box_iou(boxes[image], others[image])
        assert expected.max() > 0.2
        torch.testing.assert_close(box_ious(boxes, others)[image], expected)


@pytest.mark.parametrize("kind", HEADS)
def test_what_is_found_is_what_the_library_finds(kind):
    outputs = _outputs(kind, 3, seed=5, sure=-1.0)
    # The boxes of one image's answers all overlap: doubles must go.
    outputs["bbox_regression"] = outputs["bbox_regression"] * (3.0 if kind == "fcos" else 0.5)
    found = detections(READINGS[kind], outputs, (SIDE, SIDE))
    assert found.shape == (3, 100, 6)
    model, sizes = _library(kind), [(SIDE, SIDE)] * 3
    if kind == "ssdlite":
        expected = model.postprocess_detections(outputs, list(outputs["anchors"]), sizes)
    else:
        cells = [height * width * (9 if kind == "retinanet" else 1) for _, height, width in SHAPES]
        levels = {
            name: list(values.split(cells, 1))
            for name, values in outputs.items()
            if name != "anchors"
        }
        anchors = [list(rows.split(cells)) for rows in outputs["anchors"]]
        expected = model.postprocess_detections(levels, anchors, sizes)
    for rows, answer in zip(found, expected, strict=True):
        # The library also gives boxes that lie outside the image, cut to nothing.
        solid = ((answer["boxes"][:, 2:] - answer["boxes"][:, :2]) > 0).all(1)
        boxes, scores = answer["boxes"][solid][:100], answer["scores"][solid][:100]
        labels = answer["labels"][solid][:100] - int(kind == "ssdlite")
        count = len(labels)
        assert count > 20
        torch.testing.assert_close(rows[:count, 5], scores)
        torch.testing.assert_close(rows[:count, :4], boxes)
        assert torch.equal(rows[:count, 4].long(), labels)
        assert (rows[count:, 4] == -1).all()
