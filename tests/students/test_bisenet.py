"""BiSeNetV1: what its two paths see, and that its modules are the paper's formulas."""

import pytest
import torch
from torch import Tensor, nn

from students import build_backbone
from students.bisenet import AttentionRefinement, BiSeNetV1, FeatureFusion

STAGES = ["layer3", "layer4", "spatial", "context16", "context8", "fused"]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def build(name: str = "bisenet_resnet18", in_channels: int = 3, side: int = 64) -> BiSeNetV1:
    torch.manual_seed(0)
    network = build_backbone(name, in_channels=in_channels, image_size=side)
    assert isinstance(network, BiSeNetV1)
    return network


def layer(narrow: int, wide: int, kernel: int) -> int:
    """Parameters of a convolution without offset and its batch norm."""
    return narrow * wide * kernel**2 + 2 * wide


@pytest.mark.parametrize(
    ("name", "resnet", "layer3", "layer4", "stem", "spatial", "context", "fused"),
    [
        # The ResNets as torchvision states them, less their classifiers of 1000 classes.
        ("bisenet_resnet18", 11_689_512 - 513_000, 256, 512, 64, 128, 128, 256),
        ("bisenet_resnet50", 25_557_032 - 2_049_000, 1024, 2048, 256, 512, 512, 1024),
    ],
)
def test_parameters_are_those_of_the_papers_parts(
    name: str, resnet: int, layer3: int, layer4: int, stem: int, spatial: int, context: int,
    fused: int,
) -> None:  # fmt: skip
    expected = resnet
    expected += layer(3, stem, 7) + 2 * layer(stem, stem, 3) + layer(stem, spatial, 1)
    for width in (layer3, layer4):
        expected += layer(width, context, 3) + layer(context, context, 1)
    expected += layer(layer4, context, 1)  # the global average
    expected += 2 * layer(context, context, 3)
    expected += layer(spatial + context, fused, 1) + 2 * (fused * fused + fused)
    assert count(build(name)) == expected


@pytest.mark.parametrize(
    ("side", "in_channels", "sides"),
    [(64, 1, [4, 2, 8, 4, 8, 8]), (96, 3, [6, 3, 12, 6, 12, 12]), (72, 3, [5, 3, 9, 5, 9, 9])],
)
def test_stages_have_the_stated_widths_and_strides(
    side: int, in_channels: int, sides: list[int]
) -> None:
    network = build(in_channels=in_channels, side=side).eval()
    with torch.no_grad():
        maps = network(torch.randn(2, in_channels, side, side))
    assert list(maps) == list(network.stages) == STAGES
    widths = [256, 512, 128, 128, 128, 256]
    expected = [(2, width, n, n) for width, n in zip(widths, sides, strict=True)]
    assert [tuple(stage.shape) for stage in maps.values()] == expected
    assert network.feature_channels == 256


def test_the_wider_network_is_as_wide_as_it_states() -> None:
    network = build("bisenet_resnet50").eval()
    with torch.no_grad():
        maps = network(torch.randn(1, 3, 64, 64))
    assert {name: stage.shape[1] for name, stage in maps.items()} == network.channels
    assert list(network.channels.values()) == [1024, 2048, 512, 512, 512, 1024]


def test_the_last_stage_teaches_every_parameter() -> None:
    network = build()
    network(torch.randn(2, 3, 64, 64))["fused"].square().sum().backward()
    silent = [
        path
        for path, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


def test_stages_stay_as_they_are_when_later_ones_are_computed() -> None:
    network = build()
    seen: dict[str, Tensor] = {}

    def remember(name: str, part: nn.Module) -> None:
        part.register_forward_hook(
            lambda module, args, output: seen.update({name: output.detach().clone()})
        )

    for name, part in (
        ("layer3", network.context_path[2]),
        ("layer4", network.context_path[3]),
        ("spatial", network.spatial_path),
        ("context16", network.smooth16),
        ("context8", network.smooth8),
    ):
        remember(name, part)
    maps = network(torch.randn(2, 3, 64, 64))
    for name, before in seen.items():
        assert torch.equal(maps[name], before)
    sum(stage.square().mean() for stage in maps.values()).backward()


def test_one_path_sees_what_is_near_and_the_other_all_of_the_image() -> None:
    network = build(side=128).eval()
    image = torch.randn(1, 3, 128, 128)
    touched = image.clone()
    touched[:, :, 0, 0] += 5
    with torch.no_grad():
        before, after = network(image), network(touched)
    changed = {
        stage: (before[stage] != after[stage]).any(1)[0] for stage in ("spatial", "context16")
    }
    # Its receptive field: 7 + 2 * 2 + 2 * 4 pixels, 9 of them to the left of the middle.
    assert changed["spatial"][0, 0]
    assert not changed["spatial"][2:].any() and not changed["spatial"][:, 2:].any()
    assert changed["context16"].all()


def randomized(part: nn.Module) -> nn.Module:
    """In inference mode, with running statistics as after some training."""
    for module in part.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return part.double().eval()


def normalised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    shape = (1, -1, 1, 1)
    spread = (norm.running_var + norm.eps).sqrt().reshape(shape)
    y = (x - norm.running_mean.reshape(shape)) / spread
    return y * norm.weight.reshape(shape) + norm.bias.reshape(shape)


def mixed(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    y = torch.einsum("kc,nchw->nkhw", convolution.weight[:, :, 0, 0], x)
    return y if convolution.bias is None else y + convolution.bias.reshape(1, -1, 1, 1)


def test_attention_refinement_weighs_channels_by_a_sigmoid_of_their_averages() -> None:
    torch.manual_seed(0)
    module = randomized(AttentionRefinement(3, 5))
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    refined = module.layer(x)
    _, convolution, norm, _ = module.weights
    average = refined.sum((2, 3), keepdim=True) / 24
    weights = 1 / (1 + torch.exp(-normalised(mixed(average, convolution), norm)))
    torch.testing.assert_close(module(x), refined * weights)


def test_feature_fusion_amplifies_channels_by_up_to_twice() -> None:
    torch.manual_seed(0)
    module = randomized(FeatureFusion(7, 6))
    spatial = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    context = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    convolution, norm, _ = module.mix
    fused = normalised(mixed(torch.cat([spatial, context], 1), convolution), norm).clamp_min(0)
    _, first, _, second, _ = module.weights
    hidden = mixed(fused.sum((2, 3), keepdim=True) / 25, first).clamp_min(0)
    weights = 1 / (1 + torch.exp(-mixed(hidden, second)))
    torch.testing.assert_close(module(spatial, context), fused * (1 + weights))


def test_the_same_seed_gives_the_same_network() -> None:
    first, second = build(), build()
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_pretrained_loads_the_resnet_and_leaves_the_rest_new(
    in_channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    original = models.get_model
    asked: list[tuple[str, object]] = []

    def with_known_weights(name: str, weights: object = None) -> nn.Module:
        # The library would download them.
        asked.append((name, weights))
        network: nn.Module = original(name, weights=None)
        for parameter in network.parameters():
            nn.init.constant_(parameter, 0.125)
        return network

    monkeypatch.setattr(models, "get_model", with_known_weights)
    network = build_backbone(
        "bisenet_resnet18", in_channels=in_channels, image_size=64, pretrained=True
    )
    assert asked == [("resnet18", "DEFAULT")]
    loaded = dict(network.context_path.named_parameters())
    first = loaded.pop("0.0.weight")
    # The response to a grey image is that to three equal colours.
    assert first.shape[1] == in_channels and (first == 0.125 * 3 / in_channels).all()
    assert all((parameter == 0.125).all() for parameter in loaded.values())
    assert all(
        parameter.std() > 0 for parameter in network.spatial_path.parameters() if parameter.ndim > 1
    )


def test_images_below_the_strides_are_refused() -> None:
    with pytest.raises(ValueError, match="'bisenet_resnet18' cannot take 8x8 images"):
        build(side=8)
