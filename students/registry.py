"""Student backbones by name.

Adding a student takes one file with its builder and one line in `BACKBONES`.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from students.backbone import Backbone, check_image_size
from students.from_timm import build_timm, timm_names
from students.from_torchvision import build_torchvision, torchvision_names
from students.mobilenetv2 import build_mobilenetv2
from students.resnet18 import build_resnet18
from students.small_cnn import build_small_cnn
from students.wideresnet import build_wideresnet28_2

# Builders take (in_channels, image_size).
BACKBONES: dict[str, Callable[[int, int], Backbone]] = {
    "small_cnn": build_small_cnn,
    "resnet18": build_resnet18,
    "mobilenetv2": build_mobilenetv2,
    "wideresnet28_2": build_wideresnet28_2,
}

# Builders take (name without prefix, in_channels, image_size, pretrained).
_LIBRARIES: dict[str, Callable[[str, int, int, bool], Backbone]] = {
    "torchvision": build_torchvision,
    "timm": build_timm,
}


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
    names = torchvision_names() if library == "torchvision" else timm_names()
    return [f"{library}/{name}" for name in names]


def build_backbone(
    name: str, *, in_channels: int, image_size: int, pretrained: bool = False
) -> Backbone:
    """Build a student backbone.

    Weights are drawn from torch's global generator: the same `torch.manual_seed` gives the same
    backbone.

    Args:
        name: a key of `BACKBONES`, or "torchvision/<name>" or "timm/<name>" for a network of one
            of these libraries.
        in_channels: C of the images.
        image_size: H and W of the images, which are square.
        pretrained: whether to load the library's weights; only with "torchvision/" and "timm/".

    Returns:
        The backbone, in training mode.

    Raises:
        ValueError: unknown name, no pretrained weights for it, or an image size or number of
            channels that it cannot take.
    """
    for argument, value in (("in_channels", in_channels), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}.")
    library, _, short_name = name.partition("/")
    # A name of timm may end in a tag of weights: "timm/resnet18.a1_in1k".
    untagged = name.partition(".")[0] if library == "timm" else name
    if name in BACKBONES:
        if pretrained:
            raise ValueError(
                f"Student '{name}' has no pretrained weights; "
                "only 'torchvision/<name>' and 'timm/<name>' have them."
            )
        backbone = BACKBONES[name](in_channels, image_size)
    elif library in _LIBRARIES and untagged in available_backbones(library):
        backbone = _LIBRARIES[library](short_name, in_channels, image_size, pretrained)
    else:
        raise ValueError(_unknown(name))
    check_image_size(backbone, name, in_channels, image_size)
    return backbone


def _unknown(name: str) -> str:
    libraries = (None, *_LIBRARIES)
    candidates = [known for library in libraries for known in available_backbones(library)]
    closest = get_close_matches(name, candidates, n=1)
    hint = f"; did you mean '{closest[0]}'?" if closest else "."
    own = ", ".join(f"'{own}'" for own in BACKBONES)
    return f"Unknown student '{name}'{hint} Known: {own}, or 'torchvision/<name>', 'timm/<name>'."
