"""The heatmap heads: what they compute, the sizes they give, the students they sit on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from students import build_backbone
from students.landmarks import (
    HEADS,
    DeconvHeatmaps,
    HighResolutionHeatmaps,
    LinearHeatmaps,
)

STAGES = [(8, 16, 16), (12, 8, 8), (20, 4, 4)]


def _maps(shapes: list[tuple[int, int, int]], images: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, *shape, generator=generator) for shape in shapes]


def test_linear_head_is_one_affine_map_at_every_position_of_the_last_map() -> None:
    head = LinearHeatmaps(STAGES, 5)
    maps = _maps(STAGES)
    weight, bias = (p.detach().squeeze().numpy() for p in head.parameters())
    expected = np.einsum("pc,nchw->nphw", weight, maps[-1].numpy()) + bias[:, None, None]
    np.testing.assert_allclose(head(*maps).detach(), expected, atol=1e-5)


def test_hidden_width_makes_three_layers_per_position() -> None:
    head = LinearHeatmaps(STAGES, 5, hidden=7)
    assert [p.shape[0] for n, p in head.named_parameters() if n.endswith("weight")] == [7, 7, 5]
    x = _maps(STAGES)[-1]
    moved = torch.roll(x, 1, dims=3)
    torch.testing.assert_close(head(moved), torch.roll(head(x), 1, dims=3))


def test_high_resolution_head_is_concatenated_upsampled_maps_under_one_convolution() -> None:
    head = HighResolutionHeatmaps(STAGES, 5, 32, (16, 16)).double()
    maps = [x.double() for x in _maps(STAGES)]
    upsampled = [
        functional.interpolate(x, (16, 16), mode="bilinear", align_corners=False) for x in maps
    ]
    weight = torch.cat([mix.weight for mix in head.mix], dim=1)  # (32, 8 + 12 + 20, 1, 1)
    hidden = functional.conv2d(torch.cat(upsampled, dim=1), weight)
    expected = head.output(functional.relu(head.norm(hidden)))
    torch.testing.assert_close(head(*maps), expected)


@pytest.mark.parametrize(
    ("shape", "size", "given"),
    [
        ((20, 4, 4), (32, 32), (32, 32)),
        ((20, 2, 2), (16, 16), (16, 16)),
        ((20, 7, 7), (64, 64), (56, 56)),  # as close as doubling comes without passing it
        ((20, 8, 8), (8, 8), (8, 8)),
        ((20, 16, 16), (8, 8), (16, 16)),
        ((20, 2, 4), (16, 32), (16, 32)),
        ((20, 1, 1), (8, 8), (8, 8)),
    ],
)
def test_deconvolutions_double_the_map_up_to_the_size(shape, size, given) -> None:
    head = DeconvHeatmaps([(3, 32, 32), shape], 5, 24, size)
    assert head(torch.zeros(1, 3, 32, 32), *_maps([shape])).shape == (2, 5, *given)


def test_deconvolution_head_behind_resnet50_has_the_papers_parameters() -> None:
    # 2048 x 7 x 7 to 56 x 56 and 17 joints: three 4x4 layers of 256 and one 1x1. Norms have a
    # scale and an offset per channel, whichever they are.
    head = DeconvHeatmaps([(2048, 7, 7)], 17, 256, (56, 56))
    paper = 4 * 4 * 256 * (2048 + 256 + 256) + 3 * 2 * 256 + 256 * 17 + 17
    assert sum(p.numel() for p in head.parameters()) == paper


def test_high_resolution_heatmaps_are_no_larger_than_the_largest_map_and_never_than_asked() -> None:
    for size, given in (((64, 64), (16, 16)), ((8, 8), (8, 8)), ((16, 16), (16, 16))):
        head = HighResolutionHeatmaps(STAGES, 5, 24, size)
        assert head(*_maps(STAGES)).shape == (2, 5, *given)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_works_on_a_single_map(name) -> None:
    head = HEADS[name]([(6, 8, 8)], 3, 16, (16, 16))
    heatmaps = head(*_maps([(6, 8, 8)]))
    assert heatmaps.shape[:2] == (2, 3) and heatmaps.isfinite().all()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("width", [7, 64])
def test_what_a_head_says_of_an_image_depends_on_that_image_alone(name, width) -> None:
    head = HEADS[name](STAGES, 3, width, (16, 16)).train()
    maps = _maps(STAGES, images=3)
    alone = head(*(x[:1] for x in maps))
    torch.testing.assert_close(head(*maps)[:1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("student", "name"),
    [("timm/hrnet_w18", "hrnet"), ("torchvision/resnet50", "deconv")],
)
def test_published_students_give_heatmaps_and_learn_in_all_their_parts(student, name) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(student, in_channels=3, image_size=64)
    # Frozen statistics: two images do not make any.
    backbone.eval()
    images = torch.randn(2, 3, 64, 64)
    maps = list(backbone(images).values())
    shapes = [tuple(x.shape[1:]) for x in maps]
    head = HEADS[name](shapes, 68, 32, (16, 16))
    heatmaps = head(*maps)
    assert heatmaps.shape == (2, 68, 16, 16)
    heatmaps.square().mean().backward()
    if name == "hrnet":
        assert [shape[1] for shape in shapes] == [32, 16, 8, 4, 2]
        parts = [mix.weight for mix in head.mix]
    else:
        assert shapes[-1] == (2048, 2, 2)
        parts = list(head.parameters())
    stems = [
        p for n, p in backbone.named_parameters() if n in ("conv1.weight", "network.conv1.weight")
    ]
    assert len(stems) == 1
    for parameter in (*parts, *stems):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
