"""Strides that become dilations: against the libraries' own dilated networks."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from students import BACKBONES, build_backbone, load_backbone
from students.backbone import SequentialBackbone
from students.dilation import dilate
from students.registry import complaint


def features(name: str, side: int, in_channels: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = build_backbone(name, in_channels=in_channels, image_size=side).eval()
    with torch.no_grad():
        maps: dict[str, Tensor] = network(image(side, in_channels))
    return maps


def image(side: int, in_channels: int = 3) -> Tensor:
    return torch.randn(1, in_channels, side, side, generator=torch.Generator().manual_seed(1))


def test_bottleneck_resnets_are_those_of_torchvisions_fcn_and_deeplabv3() -> None:
    from torchvision.models.resnet import Bottleneck, ResNet

    def build(dilated: bool) -> ResNet:
        torch.manual_seed(0)
        replaced = [False, dilated, dilated]
        return ResNet(
            Bottleneck, [1, 1, 2, 2], width_per_group=8, replace_stride_with_dilation=replaced
        ).eval()

    theirs, strided = build(dilated=True), build(dilated=False)
    paths = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    mine = SequentialBackbone(
        {path: strided.get_submodule(path) for path in paths},
        {"layer2": 512, "layer3": 1024, "layer4": 2048},
    )
    assert mine(image(64))["layer4"].shape[2] == 2
    dilate(mine, "own", 3, 8)
    x = image(64)
    for path in paths[:6]:
        x = theirs.get_submodule(path)(x)
    for name in ("layer3", "layer4"):
        x = theirs.get_submodule(name)(x)
        assert x.shape[2] == 8
        torch.testing.assert_close(mine(image(64))[name], x)


def test_timm_networks_are_as_their_library_dilates_them() -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("resnet18", features_only=True, output_stride=8).eval()
    with torch.no_grad():
        expected = network(image(64))
    for stage, mine in zip(expected, features("timm/resnet18+stride8", 64).values(), strict=True):
        torch.testing.assert_close(mine, stage)


def test_a_layer_answers_the_same_question_only_more_often() -> None:
    # Where the strided network has a position, every layer of the dilated one reads the same
    # pixels, and the same zeros beyond the border.
    coarse, fine = features("small_cnn", 16, 1), features("small_cnn+stride1", 16, 1)
    for name, step in (("stage2", 2), ("stage3", 4)):
        assert fine[name].shape[2] == 16
        there = fine[name][:, :, ::step, ::step]
        torch.testing.assert_close(there, coarse[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1)])
def test_pooling_stays_among_neighbours_and_keeps_the_map(pool: nn.Module) -> None:
    layers = {
        "wide": nn.Conv2d(1, 2, 3, padding=1),
        "pool": pool,
        "deep": nn.Conv2d(2, 2, 3, padding=1),
    }
    network = dilate(SequentialBackbone(layers, {"deep": 2}), "own", 1, 1)
    maps = network(image(16, 1))["deep"]
    assert maps.shape[2:] == (16, 16)
    assert pool.kernel_size == 3 and layers["deep"].dilation == (2, 2)
    # An average beside the border is of what is there.
    pooled = pool(torch.ones(1, 2, 4, 4))
    assert torch.equal(pooled, torch.ones(1, 2, 4, 4))


@pytest.mark.parametrize(
    ("name", "side", "sides"),
    [
        ("small_cnn+stride2", 32, [32, 16, 16]),
        ("small_cnn+stride16", 32, [32, 16, 8]),  # finer already
        ("torchvision/mobilenet_v3_small+stride8", 64, [32, 16, 8, 8, 8]),
        ("torchvision/squeezenet1_1+stride8", 64, [31, 15, 7, 5]),  # unpadded, so it loses edges
        ("timm/test_convnext+stride4", 64, [16, 16, 16, 16]),
    ],
)
def test_no_stage_is_coarser_than_asked_for(name: str, side: int, sides: list[int]) -> None:
    found = features(name, side)
    assert [stage.shape[2] for stage in found.values()] == sides
    assert all(torch.isfinite(stage).all() for stage in found.values())


def test_small_images_fit_once_the_strides_are_gone() -> None:
    with pytest.raises(ValueError, match="cannot take 8x8 images"):
        build_backbone("torchvision/mobilenet_v3_small", in_channels=3, image_size=8)
    found = features("torchvision/mobilenet_v3_small+stride4", 8)
    assert next(reversed(found.values())).shape[2] == 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "small_cnn+stride3",
            "Student 'small_cnn+stride3': the stride '3' is none of 1, 2, 4, 8, 16, as in "
            "'torchvision/resnet50+stride8'.",
        ),
        ("resnt18+stride8", "Unknown student 'resnt18'; did you mean 'resnet18'?"),
    ],
)
def test_wrong_names_are_refused_before_anything_loads(name: str, sentence: str) -> None:
    found = complaint(name)
    assert found is not None and found.startswith(sentence)
    with pytest.raises(ValueError) as caught:
        build_backbone(name, in_channels=3, image_size=32)
    assert str(caught.value).startswith(sentence)


def test_a_network_that_needs_its_strides_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"'timm/test_vit\+stride8' cannot be dilated to stride 8"):
        build_backbone("timm/test_vit+stride8", in_channels=3, image_size=160)


def test_a_network_of_a_single_image_size_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tiled(SequentialBackbone):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            if images.shape[2] != 32:
                raise AssertionError("Input height doesn't match the model.")
            return super().forward(images)

    def build(in_channels: int, image_size: int) -> SequentialBackbone:
        return Tiled({"only": nn.Conv2d(in_channels, 4, 3, 2, 1)}, {"only": 4})

    monkeypatch.setitem(BACKBONES, "tiled", build)
    build_backbone("tiled", in_channels=3, image_size=32)
    with pytest.raises(ValueError) as caught:
        build_backbone("tiled+stride1", in_channels=3, image_size=32)
    assert str(caught.value) == (
        "Student 'tiled+stride1' cannot be dilated to stride 1: Input height doesn't match the "
        "model."
    )


def test_an_exported_student_is_dilated_when_it_is_loaded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = build_backbone("small_cnn+stride1", in_channels=1, image_size=16).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"student": "small_cnn+stride1", "in_channels": 1, "image_size": 16})
    )
    loaded = load_backbone(tmp_path)
    with torch.no_grad():
        expected, found = network(image(16, 1)), loaded(image(16, 1))
    assert found["stage3"].shape[2] == 16
    assert torch.equal(found["stage3"], expected["stage3"])


def test_a_dilated_student_learns() -> None:
    torch.manual_seed(0)
    network = build_backbone("small_cnn+stride2", in_channels=1, image_size=16)
    network(torch.randn(2, 1, 16, 16))["stage3"].square().mean().backward()
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert all(part.weight.grad is not None and part.weight.grad.any() for part in convolutions)
