"""The project's own students: sizes, stages, gradients, determinism, numerics."""

import copy

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from students import BACKBONES, Backbone, available_backbones, build_backbone
from students.small_cnn import build_small_cnn
from students.wideresnet import WideBlock

OWN = ["small_cnn", "small_pyramid", "resnet18", "mobilenetv2", "wideresnet28_2"]
# Have a test file of their own.
SEGMENTATION = ["bisenet_resnet18", "bisenet_resnet50"]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def sizes(backbone: Backbone, in_channels: int, image_size: int) -> dict[str, tuple[int, int, int]]:
    with torch.no_grad():
        features = backbone.eval()(torch.randn(2, in_channels, image_size, image_size))
    assert all(feature.shape[0] == 2 for feature in features.values())
    assert list(features) == list(backbone.stages)
    return {stage: tuple(feature.shape[1:]) for stage, feature in features.items()}


def test_own_students_are_listed_and_buildable_by_registry() -> None:
    assert available_backbones() == [*OWN, *SEGMENTATION] == list(BACKBONES)


def test_resnet18_has_the_parameters_of_the_cifar_resnet18() -> None:
    # 3x3 convolutions of the four stages, two blocks of two; three 1x1 shortcuts; batch norms.
    convolutions = 3 * 64 * 9 + 4 * 64 * 64 * 9
    shortcuts = 0
    norms = 2 * 64 + 4 * 2 * 64
    for narrow, wide in [(64, 128), (128, 256), (256, 512)]:
        convolutions += narrow * wide * 9 + 3 * wide * wide * 9
        shortcuts += narrow * wide
        norms += 4 * 2 * wide + 2 * wide
    expected = convolutions + shortcuts + norms
    assert expected == 11_168_832
    assert count(build_backbone("resnet18", in_channels=3, image_size=32)) == expected


def test_wideresnet28_2_has_the_published_parameters() -> None:
    expected = 3 * 16 * 9
    narrow = 16
    for wide in (32, 64, 128):
        expected += narrow * wide  # 1x1 shortcut
        for block in range(4):
            width = narrow if block == 0 else wide
            expected += 9 * width * wide + 9 * wide * wide + 2 * width + 2 * wide
        narrow = wide
    expected += 2 * 128
    backbone = build_backbone("wideresnet28_2", in_channels=3, image_size=32)
    assert count(backbone) == expected
    # With a classifier of ten classes this is the figure in use for WRN-28-2.
    assert expected + 128 * 10 + 10 == 1_467_610


def test_mobilenetv2_has_the_published_parameters() -> None:
    # 3,504,872 is the ImageNet network with its 1280 -> 1000 classifier.
    backbone = build_backbone("mobilenetv2", in_channels=3, image_size=32)
    assert count(backbone) == 3_504_872 - (1280 * 1000 + 1000)


def test_small_cnn_has_a_tenth_of_a_million_parameters() -> None:
    expected = 9 * (32 + 32 * 64 + 64 * 128) + 128 * 128 + 2 * (32 + 64 + 128 + 128)
    assert count(build_backbone("small_cnn", in_channels=1, image_size=16)) == expected
    assert 100_000 < expected < 250_000


@pytest.mark.parametrize(
    ("name", "widths", "strides"),
    [
        ("small_cnn", [32, 64, 128], [1, 2, 4]),
        ("resnet18", [64, 128, 256, 512], [1, 2, 4, 8]),
        ("mobilenetv2", [16, 24, 32, 96, 1280], [1, 1, 2, 4, 8]),
        ("wideresnet28_2", [32, 64, 128], [1, 2, 4]),
    ],
)
@pytest.mark.parametrize(("in_channels", "image_size"), [(1, 16), (3, 32)])
def test_stages_have_the_stated_widths_and_sizes(
    name: str, widths: list[int], strides: list[int], in_channels: int, image_size: int
) -> None:
    backbone = build_backbone(name, in_channels=in_channels, image_size=image_size)
    expected = [
        (width, image_size // stride, image_size // stride)
        for width, stride in zip(widths, strides, strict=True)
    ]
    assert list(sizes(backbone, in_channels, image_size).values()) == expected
    assert list(backbone.channels.values()) == widths
    assert backbone.feature_channels == widths[-1]


def test_mobilenetv2_has_the_published_strides_on_large_images() -> None:
    backbone = build_backbone("mobilenetv2", in_channels=3, image_size=96)
    assert [size[1] for size in sizes(backbone, 3, 96).values()] == [48, 24, 12, 6, 3]


@pytest.mark.parametrize("name", OWN)
def test_gradient_of_the_last_stage_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, in_channels=2, image_size=16)
    features = backbone(torch.randn(4, 2, 16, 16))
    features[backbone.stages[-1]].square().sum().backward()
    without = [
        path
        for path, parameter in backbone.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert without == []


@pytest.mark.parametrize("name", OWN)
def test_stages_stay_intact_for_backward_when_all_are_used(name: str) -> None:
    # A later layer that works in place on a stage would change it, or break its gradient.
    torch.manual_seed(0)
    backbone = build_backbone(name, in_channels=1, image_size=16)
    seen: dict[str, Tensor] = {}
    for stage in backbone.stages:
        backbone.get_submodule(stage).register_forward_hook(
            lambda module, args, output, stage=stage: seen.update({stage: output.detach().clone()})
        )
    features = backbone(torch.randn(4, 1, 16, 16))
    for stage, feature in features.items():
        assert torch.equal(feature, seen[stage])
    sum(feature.square().mean() for feature in features.values()).backward()


@pytest.mark.parametrize("name", OWN)
def test_same_seed_gives_the_same_backbone(name: str) -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        backbone = build_backbone(name, in_channels=1, image_size=16)
        states.append(torch.cat([p.detach().flatten() for p in backbone.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_building_checks_the_size_without_leaving_a_trace() -> None:
    torch.manual_seed(0)
    build_small_cnn(1, 16)
    expected_draw = torch.rand(1)
    torch.manual_seed(0)
    backbone = build_backbone("small_cnn", in_channels=1, image_size=16)
    assert torch.equal(torch.rand(1), expected_draw)
    assert all(module.training for module in backbone.modules())
    assert all(not module._forward_pre_hooks for module in backbone.modules())
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.num_batches_tracked == 0 for norm in norms)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_initial_weights_have_the_fan_out_variance() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("wideresnet28_2", in_channels=3, image_size=32)
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        if convolution.weight.numel() < 4000:
            continue
        kernel = convolution.kernel_size[0]
        expected = (2 / (kernel**2 * convolution.out_channels)) ** 0.5
        assert convolution.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_resnet18_keeps_the_published_parameter_names() -> None:
    torchvision = pytest.importorskip("torchvision")
    ours = build_backbone("resnet18", in_channels=3, image_size=32).state_dict()
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    assert set(theirs) - set(ours) == {"fc.weight", "fc.bias"}
    different = {name for name in ours if ours[name].shape != theirs[name].shape}
    assert different == {"conv1.weight"}


def test_copy_of_a_backbone_has_weights_of_its_own() -> None:
    backbone = build_backbone("small_cnn", in_channels=1, image_size=16).eval()
    twin = copy.deepcopy(backbone)
    images = torch.randn(2, 1, 16, 16)
    before = twin(images)["stage3"]
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert torch.equal(twin(images)["stage3"], before)
    assert not torch.equal(backbone(images)["stage3"], before)


def reference_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolution as a matrix product over the patches, padded to keep the size."""
    kernel = weight.shape[-1]
    patches = functional.unfold(x, kernel, padding=kernel // 2, stride=stride)
    side = (x.shape[-1] - 1) // stride + 1
    return (weight.flatten(1) @ patches).unflatten(-1, (side, side))


def reference_bn_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    y = (x - mean) / (variance + 1e-5).sqrt()
    return (y * weight[:, None, None] + bias[:, None, None]).clamp(min=0)


@pytest.mark.parametrize(("in_channels", "out_channels", "stride"), [(6, 6, 1), (5, 8, 2)])
def test_wide_block_agrees_with_its_formula_in_float64(
    in_channels: int, out_channels: int, stride: int
) -> None:
    torch.manual_seed(0)
    block = WideBlock(in_channels, out_channels, stride)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    w = {name: value.detach().double() for name, value in block.named_parameters()}
    x = torch.randn(3, in_channels, 8, 8)

    activated = reference_bn_relu(x.double(), w["bn1.weight"], w["bn1.bias"])
    y = reference_conv(activated, w["conv1.weight"], stride)
    y = reference_conv(reference_bn_relu(y, w["bn2.weight"], w["bn2.bias"]), w["conv2.weight"], 1)
    changes_shape = in_channels != out_channels
    skip = reference_conv(activated, w["shortcut.weight"], stride) if changes_shape else x.double()

    torch.testing.assert_close(block(x).double(), y + skip, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.double()(x.double()), y + skip, rtol=1e-12, atol=1e-12)


def test_wideresnet_closes_with_activation_and_leaves_inner_groups_without() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("wideresnet28_2", in_channels=1, image_size=16)
    features = backbone(torch.randn(4, 1, 16, 16))
    assert features["group1"].min() < 0
    assert features["group2"].min() < 0
    assert features["group3"].min() == 0
