"""Backbones that keep a finer map: late strides become dilations.

The networks of FCN and DeepLab do this (Chen et al., "Semantic Image Segmentation with Deep
Convolutional Nets and Fully Connected CRFs", arXiv:1412.7062, the "hole" algorithm): every layer
behind a stride that is taken out reads positions as far apart as before, so that the same weights,
pretrained ones too, answer the same question, only more often.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn

from students.backbone import Backbone, probe

# Large enough for every stride of the networks in use to show.
REFERENCE_SIZE = 256
# How far a layer's map may be from the image's side over its stride: unpadded layers cut edges off.
TOLERANCE = 0.2

WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


class _Seen(NamedTuple):
    module: Any  # one of WINDOWED, whose settings the library types as one or two numbers
    stride: int  # of its input


def dilate(backbone: Backbone, name: str, in_channels: int, output_stride: int) -> Backbone:
    """Bring every stage coarser than 1/``output_stride`` to that resolution, in place.

    Args:
        backbone: Any convolutional one; one that is fine enough stays as it is.
        name: What it is called in messages.
        in_channels: C of the images.
        output_stride: A power of 2.

    Returns:
        The same backbone.

    Raises:
        ValueError: The network does not run without its strides, or not at the resolution asked
            for.
    """
    try:
        for seen in _strided_layers(backbone, in_channels):
            _spread(seen, output_stride)
        maps: dict[str, Tensor] = probe(backbone, in_channels, REFERENCE_SIZE)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"Student '{name}' cannot be dilated to stride {output_stride}: {reason.rstrip('.')}."
        ) from error
    side, expected = maps[backbone.stages[-1]].shape[2], REFERENCE_SIZE / output_stride
    if side < (1 - TOLERANCE) * expected:
        raise ValueError(
            f"Student '{name}' cannot be dilated to stride {output_stride}: of an image of "
            f"{REFERENCE_SIZE} pixels its last map is still {side} wide."
        )
    return backbone


def _strided_layers(backbone: Backbone, in_channels: int) -> list[_Seen]:
    """All layers with a window, and at which stride of the image they work."""
    found: dict[nn.Module, _Seen] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        stride = 2 ** round(math.log2(REFERENCE_SIZE / args[0].shape[2]))
        found[module] = _Seen(module, stride)

    layers = [part for part in backbone.modules() if isinstance(part, WINDOWED)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        probe(backbone, in_channels, REFERENCE_SIZE)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _spread(seen: _Seen, output_stride: int) -> None:
    """Take out what stride is too much, and put distance between the positions that are read."""
    module = seen.module
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    rate = max(1, seen.stride // output_stride)
    kept = max(1, min(max(stride), output_stride // seen.stride))
    if rate == 1 and kept == max(stride):
        return
    module.stride = (kept, kept)
    even = kernel[0] % 2 == 0
    if kernel == (1, 1):
        return
    if not isinstance(module, nn.Conv2d):
        # Pooling stays among neighbours, as in DeepLab's VGG, which too has the next larger window
        # where an even one has no middle.
        if even:
            module.kernel_size, module.padding = kernel[0] + 1, kernel[0] // 2
        if isinstance(module, nn.AvgPool2d):
            module.count_include_pad = False
    elif even and kept == 1:
        module.padding, module.dilation = "same", (rate, rate)
    else:
        module.dilation = (rate, rate)
        if not isinstance(module.padding, str):
            pairs = zip(_pair(module.padding), kernel, strict=True)
            module.padding = tuple(p + (k - 1) // 2 * (rate - 1) for p, k in pairs)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
