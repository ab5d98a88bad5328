"""BiSeNetV1, the two-path segmentation network, as a backbone.

Shape letters: N images, C,H,W image, D context width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from students.backbone import Backbone, conv_bn_relu, he_init

if TYPE_CHECKING:
    from torchvision.models import ResNet


class Widths(NamedTuple):
    """Channels of BiSeNetV1's parts.

    Attributes:
        stem: Of the spatial path's three strided layers.
        spatial: Of the spatial path's output.
        context: D.
        fused: Of the fused map.
    """

    stem: int
    spatial: int
    context: int
    fused: int


# As in the implementations in use; those of ResNet-50 are four times wider, as its stages are.
WIDTHS = {"resnet18": Widths(64, 128, 128, 256), "resnet50": Widths(256, 512, 512, 1024)}


class AttentionRefinement(nn.Module):
    """The attention refinement module: a 3x3 layer whose channels are weighted by their averages.

    Args:
        in_channels: Width of the ResNet's map.
        out_channels: D.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layer = conv_bn_relu(in_channels, out_channels, kernel_size=3)
        self.weights = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, D, H, W)."""
        refined: Tensor = self.layer(x)
        return refined * self.weights(refined)


class FeatureFusion(nn.Module):
    """The feature fusion module: both paths mixed, channels amplified by their averages.

    Args:
        in_channels: Widths of both paths together.
        out_channels: Width of the fused map.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mix = conv_bn_relu(in_channels, out_channels, kernel_size=1)
        self.weights = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(out_channels, out_channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        """Fuse (N, C_s, H, W) and (N, D, H, W) to (N, out_channels, H, W)."""
        fused: Tensor = self.mix(torch.cat([spatial, context], dim=1))
        return fused + fused * self.weights(fused)


class BiSeNetV1(Backbone):
    """The bilateral segmentation network (Yu et al., ECCV 2018, arXiv:1808.00897).

    A shallow path keeps what is small, a ResNet sees what is around it, and one map at 1/8 of the
    image's side is made of both.

    Args:
        context: A ResNet of torchvision.
        in_channels: C.
        widths: Channels of the parts.

    Stages: ``layer3`` (1/16) and ``layer4`` (1/32) of the ResNet, ``spatial`` (1/8),
    ``context16`` (1/16) and ``context8`` (1/8), which the paper's auxiliary heads supervise, and
    ``fused`` (1/8).
    """

    def __init__(self, context: ResNet, in_channels: int, widths: Widths) -> None:
        layer3, layer4 = _width(context.layer3), _width(context.layer4)
        super().__init__(
            {
                "layer3": layer3,
                "layer4": layer4,
                "spatial": widths.spatial,
                "context16": widths.context,
                "context8": widths.context,
                "fused": widths.fused,
            }
        )
        self.spatial_path = nn.Sequential(
            conv_bn_relu(in_channels, widths.stem, kernel_size=7, stride=2),
            conv_bn_relu(widths.stem, widths.stem, kernel_size=3, stride=2),
            conv_bn_relu(widths.stem, widths.stem, kernel_size=3, stride=2),
            conv_bn_relu(widths.stem, widths.spatial, kernel_size=1),
        )
        self.around = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv_bn_relu(layer4, widths.context, kernel_size=1)
        )
        self.refine16 = AttentionRefinement(layer3, widths.context)
        self.refine32 = AttentionRefinement(layer4, widths.context)
        self.smooth16 = conv_bn_relu(widths.context, widths.context, kernel_size=3)
        self.smooth8 = conv_bn_relu(widths.context, widths.context, kernel_size=3)
        self.fusion = FeatureFusion(widths.spatial + widths.context, widths.fused)
        he_init(self)
        # Behind the initialisation: this one has its own, or weights that were loaded.
        self.context_path = nn.Sequential(
            nn.Sequential(context.conv1, context.bn1, context.relu, context.maxpool),
            nn.Sequential(context.layer1, context.layer2),
            context.layer3,
            context.layer4,
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        stem, eighth, sixteenth, last = self.context_path
        layer3 = sixteenth(eighth(stem(images)))
        layer4 = last(layer3)
        spatial = self.spatial_path(images)
        context32 = self.refine32(layer4) + self.around(layer4)
        context16 = self.smooth16(_resized(context32, layer3))
        context8 = self.smooth8(_resized(self.refine16(layer3) + context16, spatial))
        return {
            "layer3": layer3,
            "layer4": layer4,
            "spatial": spatial,
            "context16": context16,
            "context8": context8,
            "fused": self.fusion(spatial, context8),
        }


def build_bisenet_resnet18(
    in_channels: int, image_size: int, pretrained: bool = False
) -> BiSeNetV1:
    """Build BiSeNetV1 on ResNet-18: 13 M parameters, a fused map 256 wide at 1/8.

    Args:
        in_channels: C of the images.
        image_size: not used; the network is the same for every size, 64 pixels and more make sense.
        pretrained: whether the ResNet starts from torchvision's ImageNet weights.
    """
    return _build("resnet18", in_channels, pretrained)


def build_bisenet_resnet50(
    in_channels: int, image_size: int, pretrained: bool = False
) -> BiSeNetV1:
    """Build BiSeNetV1 on ResNet-50, every part four times wider: a fused map 1024 wide at 1/8.

    Args:
        in_channels: C of the images.
        image_size: not used; the network is the same for every size, 64 pixels and more make sense.
        pretrained: whether the ResNet starts from torchvision's ImageNet weights.
    """
    return _build("resnet50", in_channels, pretrained)


def _build(name: str, in_channels: int, pretrained: bool) -> BiSeNetV1:
    from torchvision.models import get_model

    from students.from_torchvision import replace_first_convolution

    context = get_model(name, weights="DEFAULT" if pretrained else None)
    if in_channels != 3:
        replace_first_convolution(context, in_channels, pretrained)
    return BiSeNetV1(context, in_channels, WIDTHS[name])


def _resized(features: Tensor, like: Tensor) -> Tensor:
    size = like.shape[2:]
    return functional.interpolate(features, size, mode="bilinear", align_corners=False)


def _width(layer: nn.Module) -> int:
    """Channels of what a ResNet's layer gives: those of its last batch norm."""
    return [part.num_features for part in layer.modules() if isinstance(part, nn.BatchNorm2d)][-1]
