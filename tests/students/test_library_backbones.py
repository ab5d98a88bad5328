"""Students taken from torchvision and timm: stages, cuts, grey images, pretrained weights."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from students import available_backbones, build_backbone

# Widths as the publications state them: stem or first stage onwards, one for each resolution.
TORCHVISION_WIDTHS = {
    "resnet34": [64, 64, 128, 256, 512],
    "resnet50": [64, 256, 512, 1024, 2048],
    "mobilenet_v3_small": [16, 16, 24, 48, 576],
    "efficientnet_b0": [16, 24, 40, 112, 1280],
    "regnet_y_400mf": [32, 48, 104, 208, 440],
    "convnext_tiny": [96, 192, 384, 768],
    "densenet121": [64, 256, 512, 1024, 1024],
    "vgg11_bn": [64, 128, 256, 512, 512, 512],
    "shufflenet_v2_x1_0": [24, 24, 116, 232, 1024],
    "squeezenet1_0": [96, 256, 512, 512],
}


def unused_parameters(backbone: nn.Module) -> list[str]:
    return [path for path, parameter in backbone.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("name", TORCHVISION_WIDTHS)
def test_torchvision_stages_halve_the_resolution_and_train_whole(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(f"torchvision/{name}", in_channels=1, image_size=32)
    features = backbone(torch.randn(2, 1, 32, 32))
    assert list(features) == list(backbone.stages)
    assert [feature.shape[1] for feature in features.values()] == TORCHVISION_WIDTHS[name]
    assert list(backbone.channels.values()) == TORCHVISION_WIDTHS[name]
    resolutions = [feature.shape[2] for feature in features.values()]
    assert resolutions == sorted(resolutions, reverse=True)
    assert len(set(resolutions)) == len(resolutions)
    sum(feature.square().mean() for feature in features.values()).backward()
    assert unused_parameters(backbone) == []


def test_torchvision_stages_equal_those_of_the_uncut_network() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("torchvision/resnet18", in_channels=3, image_size=32).eval()
    network = torchvision.models.resnet18(weights=None).eval()
    missing, unexpected = network.load_state_dict(backbone.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"}
    assert unexpected == []
    x = torch.randn(2, 3, 32, 32)
    features = backbone(x)
    y = network.relu(network.bn1(network.conv1(x)))
    assert torch.equal(features["relu"], y)
    y = network.maxpool(y)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        y = network.get_submodule(stage)(y)
        assert torch.equal(features[stage], y)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("densenet121", "relu0 denseblock1 denseblock2 denseblock3 norm5"),
        ("squeezenet1_0", "1 5 10 12"),
        ("convnext_tiny", "1 3 5 7"),
    ],
)
def test_torchvision_stage_is_the_outermost_module_that_ends_a_resolution(
    name: str, stages: str
) -> None:
    backbone = build_backbone(f"torchvision/{name}", in_channels=1, image_size=32)
    assert backbone.stages == tuple(f"features.{stage}" for stage in stages.split())


def test_torchvision_stages_do_not_depend_on_the_image_size() -> None:
    small = build_backbone("torchvision/mobilenet_v3_small", in_channels=1, image_size=32)
    large = build_backbone("torchvision/mobilenet_v3_small", in_channels=1, image_size=96)
    assert small.channels == large.channels
    assert small.stages == large.stages


def test_torchvision_backbone_follows_train_and_eval() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("torchvision/mobilenet_v3_small", in_channels=1, image_size=32)
    stage = backbone.stages[-1]
    images = torch.randn(4, 1, 32, 32)
    backbone.eval()
    evaluated = backbone(images)[stage]
    assert torch.equal(backbone(images)[stage], evaluated)
    backbone.train()
    assert not torch.equal(backbone(images)[stage], evaluated)


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/test_efficientnet"])
def test_copies_and_pickles_of_a_library_backbone_are_independent(name: str) -> None:
    backbone = build_backbone(name, in_channels=1, image_size=32).eval()
    images = torch.randn(2, 1, 32, 32)
    expected = backbone(images)[backbone.stages[-1]]
    twins = [copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))]
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    for twin in twins:
        assert not any(module.training for module in twin.modules())
        assert torch.equal(twin(images)[twin.stages[-1]], expected)


@pytest.mark.parametrize("name", ["swin_t", "vit_b_32"])
def test_torchvision_transformers_are_referred_to_timm(name: str) -> None:
    with pytest.raises(ValueError, match=f"'torchvision/{name}' is no chain .* 'timm/<name>'"):
        build_backbone(f"torchvision/{name}", in_channels=3, image_size=64)


class Doubling(nn.Module):
    """A network that does something to the image between its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(2 * self.first(x)).mean((2, 3))


def test_torchvision_network_that_is_no_chain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: Doubling())
    with pytest.raises(ValueError, match="is no chain of modules"):
        build_backbone("torchvision/resnet18", in_channels=3, image_size=32)


@pytest.mark.parametrize(
    ("name", "image_size", "widths", "resolutions"),
    [
        ("resnet18", 32, [64, 64, 128, 256, 512], [16, 8, 4, 2, 1]),
        ("resnet18.a1_in1k", 32, [64, 64, 128, 256, 512], [16, 8, 4, 2, 1]),
        ("test_efficientnet", 32, [16, 24, 32, 48, 64], [16, 8, 4, 2, 1]),
        ("convnext_atto", 32, [40, 80, 160, 320], [8, 4, 2, 1]),
        ("vit_tiny_patch16_224", 64, [192, 192, 192], [4, 4, 4]),
        ("swin_tiny_patch4_window7_224", 64, [96, 192, 384, 768], [16, 8, 4, 2]),
    ],
)
def test_timm_stages_have_the_published_widths(
    name: str, image_size: int, widths: list[int], resolutions: list[int]
) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(f"timm/{name}", in_channels=1, image_size=image_size)
    features = backbone(torch.randn(2, 1, image_size, image_size))
    expected = [(2, width, side, side) for width, side in zip(widths, resolutions, strict=True)]
    assert [tuple(feature.shape) for feature in features.values()] == expected
    assert list(backbone.channels.values()) == widths
    features[backbone.stages[-1]].square().mean().backward()
    assert unused_parameters(backbone) == []


def test_timm_channels_last_maps_are_turned_not_reshaped() -> None:
    backbone = build_backbone(
        "timm/swin_tiny_patch4_window7_224", in_channels=3, image_size=64
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    deepest = backbone.network(x)[-1]
    assert deepest.shape == (1, 2, 2, 768)
    assert torch.equal(backbone(x)["layers.3"][0, :, 1, 0], deepest[0, 1, 0, :])


def test_timm_network_without_maps_is_refused_in_one_sentence() -> None:
    name = "efficientformer_l1"  # its attention is fixed to 224 pixels
    with pytest.raises(ValueError, match=f"'timm/{name}' cannot take 32x32 images"):
        build_backbone(f"timm/{name}", in_channels=3, image_size=32)


def test_library_names_carry_their_prefix() -> None:
    assert "torchvision/resnet34" in available_backbones("torchvision")
    assert "timm/vit_tiny_patch16_224" in available_backbones("timm")


@pytest.mark.parametrize(("pretrained", "weights"), [(True, "DEFAULT"), (False, None)])
def test_pretrained_is_handed_to_torchvision(
    monkeypatch: pytest.MonkeyPatch, pretrained: bool, weights: str | None
) -> None:
    asked: list[object] = []

    def get_model(name: str, weights: str | None) -> nn.Module:
        asked.append((name, weights))
        return torchvision.models.resnet18(weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    build_backbone("torchvision/resnet18", in_channels=3, image_size=32, pretrained=pretrained)
    assert asked == [("resnet18", weights)]


@pytest.mark.parametrize("pretrained", [True, False])
def test_pretrained_is_handed_to_timm(monkeypatch: pytest.MonkeyPatch, pretrained: bool) -> None:
    asked: list[object] = []
    create = timm.create_model

    def create_model(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
        asked.append(pretrained)
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    build_backbone("timm/test_vit", in_channels=3, image_size=32, pretrained=pretrained)
    assert asked == [pretrained]


@pytest.mark.parametrize("in_channels", [1, 5])
def test_pretrained_torchvision_sees_a_grey_image_as_it_saw_it_in_colour(
    monkeypatch: pytest.MonkeyPatch, in_channels: int
) -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights: copy.deepcopy(network)
    )
    name = "torchvision/resnet18"
    colour = build_backbone(name, in_channels=3, image_size=32, pretrained=True).eval()
    grey = build_backbone(name, in_channels=in_channels, image_size=32, pretrained=True).eval()
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(
        grey(image.expand(-1, in_channels, -1, -1))["layer4"],
        colour(image.expand(-1, 3, -1, -1))["layer4"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_random_torchvision_stem_keeps_the_scale_of_its_initialisation() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("torchvision/resnet18", in_channels=1, image_size=32)
    # ResNets draw from N(0, 2 / (k^2 C_out)), whatever the number of input channels.
    expected = (2 / (49 * 64)) ** 0.5
    assert backbone.conv1.weight.shape == (64, 1, 7, 7)
    assert backbone.conv1.weight.std().item() == pytest.approx(expected, rel=0.05)
