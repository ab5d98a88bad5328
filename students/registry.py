"""Student backbones by name.

Adding a student takes one file with its builder and one line in `BACKBONES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from students.backbone import Backbone

# A builder takes (in_channels, image_size); those of `WITH_WEIGHTS` also whether to load weights.
# They are named, not imported, so that a student's name can be checked before torch is loaded.
BACKBONES: dict[str, str | Callable[[int, int], Backbone]] = {
    "small_cnn": "students.small_cnn:build_small_cnn",
    "small_pyramid": "students.small_pyramid:build_small_pyramid",
    "resnet18": "students.resnet18:build_resnet18",
    "mobilenetv2": "students.mobilenetv2:build_mobilenetv2",
    "wideresnet28_2": "students.wideresnet:build_wideresnet28_2",
    "bisenet_resnet18": "students.bisenet:build_bisenet_resnet18",
    "bisenet_resnet50": "students.bisenet:build_bisenet_resnet50",
}

# Students of this project that are built around a library's network, whose weights they can load.
WITH_WEIGHTS = ("bisenet_resnet18", "bisenet_resnet50")

# Builders take (name without prefix, in_channels, image_size, pretrained).
_LIBRARIES = {
    "torchvision": "students.from_torchvision:build_torchvision",
    "timm": "students.from_timm:build_timm",
}


# Behind a name: late strides become dilations, so that the last map keeps so much of the image.
_STRIDE = "+stride"
STRIDES = (1, 2, 4, 8, 16)


def split_stride(name: str) -> tuple[str, int | None]:
    """``"<network>+stride8"`` as the network's name and the stride; None where it has none.

    Raises:
        ValueError: The stride is none of `STRIDES`.
    """
    network, found, stride = name.partition(_STRIDE)
    if not found:
        return name, None
    allowed = [str(known) for known in STRIDES]
    if stride not in allowed:
        raise ValueError(
            f"Student '{name}': the stride '{stride}' is none of {', '.join(allowed)}, "
            "as in 'torchvision/resnet50+stride8'."
        )
    return network, int(stride)


def complaint(name: str) -> str | None:
    """The sentence that refuses ``name``, or None where it may be looked up; imports nothing."""
    try:
        name, _ = split_stride(name)
    except ValueError as error:
        return str(error)
    if name in BACKBONES or ":" in name or name.partition("/")[0] in _LIBRARIES:
        return None
    return _unknown(name, list(BACKBONES))


def available_backbones(library: str | None = None) -> list[str]:
    """List the names that `build_backbone` takes.

    Args:
        library: None for the project's own students, "torchvision" or "timm" for the networks of
            that library (of which some give no feature maps and are refused when built).

    Returns:
        Names, those of a library with its prefix.

    Raises:
        ValueError: unknown library.
    """
    if library is None:
        return list(BACKBONES)
    if library not in _LIBRARIES:
        raise ValueError(f"Unknown library '{library}'; known: {', '.join(_LIBRARIES)}.")
    names = _load(f"students.from_{library}:{library}_names")()
    return [f"{library}/{name}" for name in names]


def build_backbone(
    name: str, *, in_channels: int, image_size: int, pretrained: bool = False
) -> Backbone:
    """Build a student backbone.

    Weights are drawn from torch's global generator: the same `torch.manual_seed` gives the same
    backbone.

    Args:
        name: a key of `BACKBONES`, "torchvision/<name>" or "timm/<name>" for a network of one of
            these libraries, or "module:function" for a builder of your own that takes
            (in_channels, image_size). With "+stride8" behind it (or another of `STRIDES`) late
            strides become dilations, and every coarser map has 1/8 of the image's side.
        in_channels: C of the images.
        image_size: H and W of the images, which are square.
        pretrained: whether to load the library's weights; only with "torchvision/", "timm/" and
            the names in `WITH_WEIGHTS`.

    Returns:
        The backbone, in training mode.

    Raises:
        ValueError: unknown name, no pretrained weights for it, or an image size or number of
            channels that it cannot take.
    """
    from students.backbone import check_image_size

    for argument, value in (("in_channels", in_channels), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}.")
    full_name = name
    name, output_stride = split_stride(name)
    library, _, short_name = name.partition("/")
    # A name of timm may end in a tag of weights: "timm/resnet18.a1_in1k".
    untagged = name.partition(".")[0] if library == "timm" else name
    if name in BACKBONES or ":" in name:
        if pretrained and name not in WITH_WEIGHTS:
            own = ", ".join(f"'{known}'" for known in WITH_WEIGHTS)
            raise ValueError(
                f"Student '{name}' has no pretrained weights; "
                f"only 'torchvision/<name>', 'timm/<name>', {own} have them."
            )
        builder = BACKBONES.get(name, name)
        build = _load(builder) if isinstance(builder, str) else builder
        backbone = build(in_channels, image_size, *([True] if pretrained else []))
    elif library in _LIBRARIES and untagged in available_backbones(library):
        backbone = _load(_LIBRARIES[library])(short_name, in_channels, image_size, pretrained)
    else:
        libraries = (None, *_LIBRARIES)
        candidates = [known for library in libraries for known in available_backbones(library)]
        raise ValueError(_unknown(name, candidates))
    if output_stride is not None:
        from students.dilation import dilate

        dilate(backbone, full_name, in_channels, output_stride)
    check_image_size(backbone, full_name, in_channels, image_size)
    return backbone


def _load(path: str) -> Any:
    """What ``"module:attribute"`` names."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if path in BACKBONES.values() or path in _LIBRARIES.values():
            raise
        raise ValueError(f"Student '{path}' cannot be imported: {error}.") from error


def _unknown(name: str, candidates: list[str]) -> str:
    closest = get_close_matches(name, candidates, n=1)
    hint = f"; did you mean '{closest[0]}'?" if closest else "."
    own = ", ".join(f"'{own}'" for own in BACKBONES)
    return (
        f"Unknown student '{name}'{hint} Known: {own}, 'torchvision/<name>', 'timm/<name>', or "
        "your own as 'module:function'."
    )
