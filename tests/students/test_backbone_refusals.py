"""What `build_backbone` refuses, and in which words; what a new registry line does."""

import subprocess
import sys

import pytest

from students import BACKBONES, Backbone, available_backbones, build_backbone
from students.registry import WITH_WEIGHTS
from students.small_cnn import build_small_cnn


def refusal(name: str, in_channels: int = 1, image_size: int = 32, pretrained: bool = False) -> str:
    with pytest.raises(ValueError) as caught:
        build_backbone(name, in_channels=in_channels, image_size=image_size, pretrained=pretrained)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_misspelt_student_is_answered_with_the_closest_and_all_known_names() -> None:
    assert refusal("resnt18") == (
        "Unknown student 'resnt18'; did you mean 'resnet18'? Known: 'small_cnn', "
        "'small_pyramid', 'resnet18', "
        "'mobilenetv2', 'wideresnet28_2', 'bisenet_resnet18', 'bisenet_resnet50', "
        "'torchvision/<name>', 'timm/<name>', or your own as 'module:function'."
    )


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("resnet34", "timm/resnet34"),
        ("torchvision/resnt34", "torchvision/resnet34"),
        ("torchvison/resnet34", "torchvision/resnet34"),
        ("timm/resnt50", "timm/resnet50"),
        ("mobilenet_v2", "mobilenetv2"),
    ],
)
def test_wrong_library_name_is_answered_with_the_closest(name: str, closest: str) -> None:
    assert refusal(name).startswith(f"Unknown student '{name}'; did you mean '{closest}'? Known:")


@pytest.mark.parametrize("name", ["", "/", "torchvision/", "timm/", "qqq", "small_cnn/x"])
def test_meaningless_name_is_refused(name: str) -> None:
    assert refusal(name).startswith(f"Unknown student '{name}'")


@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in WITH_WEIGHTS])
def test_own_students_have_no_pretrained_weights(name: str) -> None:
    assert refusal(name, pretrained=True) == (
        f"Student '{name}' has no pretrained weights; only 'torchvision/<name>', 'timm/<name>', "
        "'bisenet_resnet18', 'bisenet_resnet50' have them."
    )


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("resnet18", 4),
        ("mobilenetv2", 4),
        ("wideresnet28_2", 1),
        ("small_cnn", 1),
        ("torchvision/resnet18", 16),
        ("torchvision/alexnet", 32),
        ("timm/test_vit", 17),
        ("timm/test_resnet", 8),
    ],
)
def test_image_too_small_for_the_strides_is_refused(name: str, image_size: int) -> None:
    message = refusal(name, image_size=image_size)
    assert name in message
    assert f"{image_size}x{image_size} images" in message


def test_refusal_of_a_small_image_names_the_layer() -> None:
    assert "the map is only 1x1 before 'layer4.0.conv1', which has stride 2" in refusal(
        "resnet18", image_size=4
    )


def test_smallest_image_that_fits_is_accepted() -> None:
    assert build_backbone("resnet18", in_channels=1, image_size=8).feature_channels == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0."),
        ({"image_size": -3}, "image_size must be at least 1, got -3."),
    ],
)
def test_impossible_numbers_are_refused(arguments: dict[str, int], message: str) -> None:
    assert refusal("small_cnn", **arguments) == message


def test_unknown_library_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown library 'keras'; known: torchvision, timm"):
        available_backbones("keras")


def test_a_registry_line_is_all_a_new_student_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "pebble_net", BACKBONES["small_cnn"])
    assert "pebble_net" in available_backbones()
    assert isinstance(build_backbone("pebble_net", in_channels=1, image_size=16), Backbone)
    assert "did you mean 'pebble_net'?" in refusal("peble_net")


def test_a_student_that_states_wrong_widths_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lying(in_channels: int, image_size: int) -> Backbone:
        backbone = build_small_cnn(in_channels, image_size)
        backbone.channels["stage2"] = 65
        return backbone

    monkeypatch.setitem(BACKBONES, "small_cnn", lying)
    assert "'stage2': 65" in refusal("small_cnn")


def test_import_loads_neither_model_library_nor_environment() -> None:
    code = (
        "import sys, students; "
        "heavy = {'torch', 'torchvision', 'timm', 'gymnasium', 'repfusion_env'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_builder_of_ones_own_needs_no_registry_line() -> None:
    own = build_backbone("students.small_cnn:build_small_cnn", in_channels=1, image_size=16)
    known = build_backbone("small_cnn", in_channels=1, image_size=16)
    assert own.channels == known.channels
    assert "cannot be imported" in refusal("students.small_cnn:build_big_cnn")
