from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from students import build_backbone
from students.detection import HEADS, Detector

# What backbones make of images of 32 and of 128 pixels.
SMALL_CNN_32 = [(32, 32, 32), (64, 16, 16), (128, 8, 8)]
RESNET_32 = [(64, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)]
RESNET_128 = [(8, 64, 64), (8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
VIT_64 = [(24, 4, 4), (24, 4, 4), (24, 4, 4)]
ENDS_FINE = [(8, 16, 16), (16, 8, 8), (32, 4, 4), (12, 16, 16)]


def _maps(shapes: list[tuple[int, int, int]], images: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, *shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    ("shapes", "side", "grids"),
    [
        (SMALL_CNN_32, 32, [8, 4]),
        (RESNET_32, 32, [8, 4]),
        # From a stride of 8 on.
        (RESNET_128, 128, [16, 8, 4]),
        # Too coarse for objects beside each other: the finest is enlarged.
        (VIT_64, 64, [8, 4]),
        # Too fine to go over every position: averaged.
        ([(16, 64, 64)], 64, [16, 8, 4]),
        ([(16, 8, 8)], 32, [8, 4]),
        ([(16, 1, 1)], 32, [8, 4]),
        (ENDS_FINE, 128, [16, 8, 4]),
        (ENDS_FINE, 64, [16, 8, 4]),
        ([(16, 9, 9)], 36, [9, 5]),
    ],
)
def test_grids_go_start_at_a_stride_of_four_or_eight_and_end_at_four_cells(
    kind, shapes, side, grids
):
    detector = Detector(shapes, (side, side), 3, kind, width=16)
    assert detector.grids == [(grid, grid) for grid in grids]
    outputs = detector(*_maps(shapes))
    count = outputs["anchors"].shape[1]
    assert count % sum(grid**2 for grid in grids) == 0
    assert outputs["cls_logits"].shape == (2, count, 4 if kind == "ssdlite" else 3)
    assert outputs["bbox_regression"].shape == outputs["anchors"].shape == (2, count, 4)
    assert ("bbox_ctrness" in outputs) == (kind == "fcos")


def test_the_stride_can_be_chosen_as_long_as_there_are_eight_cells():
    finest = [
        Detector(RESNET_128, (128, 128), 2, width=16, stride=stride).grids[0][0]
        for stride in (2, 4, 8, 16, 32)
    ]
    assert finest == [64, 32, 16, 8, 8]


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
@pytest.mark.parametrize("convs", [1, 4, 6])
def test_a_head_has_as_many_hidden_convolutions_as_asked_for(kind, convs):
    detector = Detector([(8, 8, 8)], (32, 32), 2, kind, width=16, convs=convs)
    for branch in detector.head.children():
        found = [part for part in branch.conv.modules() if isinstance(part, nn.Conv2d)]
        assert len(found) == convs
    assert detector(torch.zeros(1, 8, 8, 8))["cls_logits"].isfinite().all()


def test_of_maps_of_one_size_the_deepest_is_taken():
    detector = Detector(ENDS_FINE, (128, 128), 2, width=16)
    maps = _maps(ENDS_FINE)
    given = detector(*maps)["cls_logits"]
    assert torch.equal(given, detector(maps[0] + 1, *maps[1:])["cls_logits"])
    assert not torch.equal(given, detector(*maps[:3], maps[3] + 1)["cls_logits"])


@pytest.mark.parametrize("seed", range(5))
def test_every_distance_of_fcos_begins_with_a_gradient(seed: int):
    """Below 0 a distance is cut to 0 and learns nothing; none begins there, or near it."""
    shapes = [(8, 16, 16), (8, 8, 8), (8, 4, 4)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = Detector(shapes, (32, 32), 3, "fcos", width=16, convs=2)
    said = detector(*_maps(shapes, seed=seed))["bbox_regression"]
    assert said.min() > 0.5 and said.max() < 1.5


def test_the_cells_of_fcos_tile_the_image():
    shapes = [(8, 32, 24), (8, 16, 12), (8, 8, 6)]
    detector = Detector(shapes, (128, 96), 2, width=16, stride=4)
    assert detector.grids == [(32, 24), (16, 12), (8, 6)]
    start = 0
    for rows, columns in detector.grids:
        cells = detector.anchors[start : start + rows * columns]
        start += rows * columns
        assert cells.amin(0).tolist()[:2] == [0, 0]
        assert cells.amax(0).tolist()[2:] == [96, 128]
        overlaps = box_iou(cells, cells)
        assert torch.equal(overlaps, torch.eye(len(cells)))
    # From left to right first, as the heads flatten their maps.
    assert detector.anchors[1].tolist() == [4, 0, 8, 4]


@pytest.mark.parametrize("kind", ["retinanet", "ssdlite"])
@pytest.mark.parametrize(("side", "smallest"), [(32, 8), (128, 8)])
def test_every_square_object_has_an_anchor_that_overlaps_it_by_half(kind, side, smallest):
    shapes = SMALL_CNN_32 if side == 32 else RESNET_128
    anchors = Detector(shapes, (side, side), 2, kind, width=16, stride=4).anchors
    generator = torch.Generator().manual_seed(0)
    sides = smallest + (0.95 * side - smallest) * torch.rand(400, 1, generator=generator)
    corners = torch.rand(400, 2, generator=generator) * (side - sides)
    best = box_iou(torch.cat([corners, corners + sides], 1), anchors).amax(1)
    assert (best >= 0.5).float().mean() > 0.93
    assert best.min() > 0.35


@pytest.mark.parametrize("kind", HEADS)
def test_anchors_lie_symmetrically_in_the_image(kind):
    anchors = Detector(SMALL_CNN_32, (32, 32), 2, kind, width=16).anchors
    mirrored = torch.stack([32 - anchors[:, 2], anchors[:, 1], 32 - anchors[:, 0], anchors[:, 3]])
    ordered = [sorted(map(tuple, boxes.tolist())) for boxes in (anchors, mirrored.T)]
    assert torch.allclose(torch.tensor(ordered[0]), torch.tensor(ordered[1]), atol=1e-3)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("shapes", [RESNET_32, [(16, 16, 16)]])
def test_every_parameter_and_every_map_it_reads_learns(kind, shapes):
    torch.manual_seed(0)
    detector = Detector(shapes, (32, 32), 2, kind, width=16)
    maps = [found.requires_grad_() for found in _maps(shapes)]
    outputs = detector(*maps)
    names = [name for name in outputs if name != "anchors"]
    sum((outputs[name] ** 2).sum() for name in names).backward()
    for name, parameter in detector.named_parameters():
        # The last ReLU of FCOS's box regression may be shut at first.
        if "bbox_reg" not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    # The first map of RESNET_32 is too fine; the deepest two are below the coarsest grid.
    read = maps[1:] if len(maps) > 1 else maps
    assert all(found.grad is not None and found.grad.abs().sum() > 0 for found in read)


@pytest.mark.parametrize("kind", HEADS)
def test_what_is_said_of_an_image_does_not_depend_on_the_others(kind):
    detector = Detector(SMALL_CNN_32, (32, 32), 2, kind, width=24).train()
    maps = _maps(SMALL_CNN_32, images=3)
    together = detector(*maps)
    alone = detector(*[found[1:2] for found in maps])
    for name, values in together.items():
        assert torch.allclose(values[1:2], alone[name], atol=1e-5), name


@pytest.mark.parametrize("student", ["small_cnn", "torchvision/resnet18"])
@pytest.mark.parametrize("side", [32, 128])
def test_detectors_stand_on_real_backbones(student, side):
    backbone = build_backbone(student, in_channels=3, image_size=side)
    maps = list(backbone(torch.zeros(2, 3, side, side)).values())
    detector = Detector([tuple(found.shape[1:]) for found in maps], (side, side), 5, width=32)
    assert detector.grids[0] == ((8, 8) if side == 32 else (16, 16))
    assert detector(*maps)["cls_logits"].shape[0] == 2


def test_a_wrong_kind_and_no_map_are_refused():
    with pytest.raises(ValueError, match="Unknown detector 'yolo'; known: fcos, retinanet"):
        Detector(RESNET_32, (32, 32), 2, "yolo")
    with pytest.raises(ValueError, match="at least one map"):
        Detector([], (32, 32), 2)
