"""Segmentation heads on the maps of any backbone."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from students import build_backbone, mlp_head
from students.segmentation import (
    HEADS,
    HeadSettings,
    atrous_rates,
    finer_map,
    linear,
    position_mlp,
)

SHAPES = [(6, 16, 16), (8, 8, 8), (12, 4, 4)]
NAMES = sorted(HEADS)


def settings(
    shapes: list[tuple[int, int, int]], classes: int = 5, width: int = 32, side: int = 32
) -> HeadSettings:
    return HeadSettings(shapes, classes, width, side)


def maps(
    batch: int, shapes: list[tuple[int, int, int]] | None = None, seed: int = 0
) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=random) for shape in shapes or SHAPES]


@pytest.mark.parametrize("name", NAMES)
def test_logits_come_at_the_resolution_of_the_finest_map_that_is_read(name: str) -> None:
    logits = HEADS[name](settings(SHAPES))(*maps(2))
    assert logits.shape == ((2, 5, 8, 8) if name == "lraspp" else (2, 5, 4, 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 4, 4), (40, 1, 1), (7, 9, 5)])
def test_a_single_map_of_any_width_is_enough(name: str, shape: tuple[int, int, int]) -> None:
    logits = HEADS[name](settings([shape]))(torch.randn(2, *shape))
    assert logits.shape == (2, 5, *shape[1:])
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_depends_on_its_own_image_alone_even_in_training_mode(name: str) -> None:
    head = HEADS[name](settings(SHAPES)).train()
    together = maps(3)
    alone = [stage[1:2] for stage in together]
    expected = head(*together)
    before = [value.clone() for value in head.state_dict().values()]
    torch.testing.assert_close(head(*alone), expected[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.eval()(*together), expected)
    for value, old in zip(head.state_dict().values(), before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str) -> None:
    head = HEADS[name](settings(SHAPES))
    head(*maps(4)).square().sum().backward()
    silent = [
        path
        for path, parameter in head.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


def test_linear_is_the_same_affine_map_at_every_position() -> None:
    head = linear(settings(SHAPES))
    weight, bias = (value.detach().double().numpy() for value in head.parameters())
    last = maps(2)[-1]
    expected = np.einsum("kc,nchw->nkhw", weight[:, :, 0, 0], last.double().numpy())
    np.testing.assert_allclose(
        head(*maps(2)).detach(), expected + bias[:, None, None], rtol=1e-4, atol=1e-5
    )


def test_position_mlp_is_the_published_three_layers_at_every_position() -> None:
    head, flat = position_mlp(settings(SHAPES, width=11)), mlp_head(12, 11, 5)
    pairs = zip(flat.parameters(), head.parameters(), strict=True)
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs.reshape(mine.shape))
    last = maps(2)[-1]
    expected = flat(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(head(*maps(2)), expected)


def test_lraspp_gates_the_last_map_and_adds_what_the_finer_one_says() -> None:
    chosen = settings(SHAPES)
    head = HEADS["lraspp"](chosen)
    parts = {path: part for path, part in head.named_modules() if list(part.parameters(False))}
    parameters = {
        path.rpartition("layers.")[2]: (part.weight, part.bias) for path, part in parts.items()
    }
    low, high = maps(2)[1:]

    def conv(name: str, x: Tensor) -> Tensor:
        weight, bias = parameters[name]
        y = torch.einsum("kc,nchw->nkhw", weight[:, :, 0, 0], x)
        return y if bias is None else y + bias[:, None, None]

    hidden = conv("cbr.0", high)
    # Two groups of 16 channels, each standardised over all of its values.
    grouped = hidden.reshape(2, 2, -1)
    spread = grouped.var(2, unbiased=False, keepdim=True) + 1e-5
    hidden = ((grouped - grouped.mean(2, keepdim=True)) / spread.sqrt()).reshape(hidden.shape)
    gate = torch.sigmoid(conv("scale.1", high.mean((2, 3), keepdim=True)))
    gated = hidden.clamp_min(0) * gate
    # From 4 to 8 positions: three quarters of the nearer one, a quarter of the farther.
    weights = torch.zeros(8, 4)
    for at, place in enumerate(np.clip(np.arange(8) / 2 - 0.25, 0, 3)):
        weights[at, int(place)] += 1 - place % 1
        weights[at, min(3, int(place) + 1)] += place % 1
    finer = torch.einsum("ya,xb,ncab->ncyx", weights, weights, gated)
    expected = conv("low_classifier", low) + conv("high_classifier", finer)
    torch.testing.assert_close(head(*maps(2)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "image_side", "chosen"),
    [
        ([112, 56, 28, 14, 7], 224, 2),  # MobileNetV3: 1/8 beside 1/32
        ([32, 16, 8], 32, 1),  # the small CNN: nothing is as coarse as 1/8
        ([32, 16, 8, 4], 32, 2),  # ResNet-18 for small images: 1/4 beside 1/8
        ([4, 2, 8, 4, 8, 8], 64, 4),  # BiSeNetV1: the context path beside the fused map
        ([4, 2], 64, 0),  # nothing finer than 1/16
        ([14, 14, 14], 224, 1),  # a vision transformer has one resolution
        ([14], 224, 0),
    ],
)
def test_lraspp_reads_the_map_at_an_eighth_of_the_image_where_there_is_one(
    sides: list[int], image_side: int, chosen: int
) -> None:
    assert finer_map([(4, side, side) for side in sides], image_side) == chosen


def test_atrous_rates_are_the_published_ones_and_keep_within_small_maps() -> None:
    assert atrous_rates(65) == atrous_rates(128) == (12, 24, 36)
    assert atrous_rates(33) == (6, 12, 18)  # the published ones at output stride 16
    assert atrous_rates(8) == (1, 3, 4)
    assert atrous_rates(1) == (1,)
    assert all(max(atrous_rates(side)) < side for side in range(2, 66))


def test_deeplabv3_sees_beyond_its_neighbours_and_fcn_does_not() -> None:
    shape = [(8, 16, 16)]
    random = torch.Generator().manual_seed(0)
    image = torch.randn(1, *shape[0], generator=random, requires_grad=True)
    reach = {}
    for name in ("fcn", "deeplabv3"):
        torch.manual_seed(0)
        head = HEADS[name](settings(shape, width=16))
        # Norms see the whole map; what is asked here is what the kernels see.
        for path, part in list(head.named_modules()):
            if isinstance(part, nn.GroupNorm):
                owner, _, last = path.rpartition(".")
                setattr(head.get_submodule(owner), last, nn.Identity())
        (gradient,) = torch.autograd.grad(head(image)[0, :, 8, 8].sum(), image)
        seen = (gradient[0].abs().sum(0) > 1e-9).nonzero()
        reach[name] = int((seen - 8).abs().max())
    assert reach["fcn"] == 1
    assert reach["deeplabv3"] == 8  # its pooled branch sees all


@pytest.mark.parametrize("width", [16, 48])
@pytest.mark.parametrize("name", ["fcn", "lraspp", "deeplabv3"])
def test_hidden_layers_have_the_configured_width(name: str, width: int) -> None:
    head = HEADS[name](settings(SHAPES, width=width))
    convolutions = [part for part in head.modules() if isinstance(part, nn.Conv2d)]
    assert {part.out_channels for part in convolutions} == {width, 5}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("backbone", "side"),
    [
        ("small_cnn", 16),
        ("torchvision/mobilenet_v3_small", 64),
        ("timm/test_resnet", 64),
        ("timm/test_vit", 160),
    ],
)
def test_any_backbone_can_carry_any_head(name: str, backbone: str, side: int) -> None:
    student = build_backbone(backbone, in_channels=3, image_size=side).eval()
    found = list(student(torch.randn(1, 3, side, side)).values())
    shapes = [tuple(stage.shape[1:]) for stage in found]
    chosen = settings(shapes, side=side)  # type: ignore[arg-type]
    logits = HEADS[name](chosen)(*found)
    finest = shapes[finer_map(chosen.shapes, side)] if name == "lraspp" else shapes[-1]
    assert logits.shape == (1, 5, *finest[1:])
    logits.sum().backward()
    assert any(parameter.grad is not None for parameter in student.parameters())
