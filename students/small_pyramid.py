"""A small student for dense tasks: a fine last map that has seen the whole image.

Shape letters: N images, C,H,W image.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from students.backbone import Backbone, conv_bn_relu, he_init

WIDTHS = (32, 64, 128, 128)
MERGED = 128
STAGES = tuple(f"stage{number}" for number in range(1, len(WIDTHS) + 1))


class SmallPyramid(Backbone):
    """Four strided stages, and from the deepest one back up to a quarter of the resolution.

    The way back up is that of Feature Pyramid Networks (Lin et al., CVPR 2017): each map is added,
    by a 1x1 convolution, to the enlarged one above it. The last stage, ``merged``, thus has the
    grid of ``stage2`` and sees as far as ``stage4``; 0.8 M parameters.

    Args:
        in_channels: C.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(dict(zip((*STAGES, "merged"), (*WIDTHS, MERGED), strict=True)))
        before = in_channels
        for name, width in zip(STAGES, WIDTHS, strict=True):
            # The second convolution is left out where the map is largest and costs most.
            rest = [] if name == STAGES[0] else [conv_bn_relu(width, width, stride=1)]
            self.add_module(name, nn.Sequential(conv_bn_relu(before, width, stride=2), *rest))
            before = width
        self.lateral = nn.ModuleList(nn.Conv2d(width, MERGED, 1) for width in WIDTHS[1:])
        self.merged = conv_bn_relu(MERGED, MERGED, stride=1)
        he_init(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        maps: dict[str, Tensor] = {}
        x = images
        for name in STAGES:
            x = self.get_submodule(name)(x)
            maps[name] = x
        above = cast("Tensor", self.lateral[-1](x))
        for lateral, name in zip(reversed(self.lateral[:-1]), reversed(STAGES[1:-1]), strict=True):  # type: ignore[arg-type,call-overload]
            stage = maps[name]
            above = lateral(stage) + functional.interpolate(above, stage.shape[2:], mode="nearest")
        maps["merged"] = self.merged(above)
        return maps


def build_small_pyramid(in_channels: int, image_size: int) -> Backbone:
    """Build the small pyramid, for images of about 32 to 128 pixels.

    Args:
        in_channels: C of the images.
        image_size: not used; the network is the same for every size.

    Returns:
        Backbone with stages "stage1" to "stage4" at strides 2, 4, 8 and 16 of widths 32, 64, 128
        and 128, and "merged" at stride 4 of width 128.
    """
    return SmallPyramid(in_channels)
