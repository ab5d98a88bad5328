"""The default student for small images: three convolutional stages, 0.1 M parameters."""

from __future__ import annotations

from torch import nn

from students.backbone import Backbone, SequentialBackbone, conv_bn_relu, he_init

WIDTHS = (32, 64, 128)


def build_small_cnn(in_channels: int, image_size: int) -> Backbone:
    """Build the small CNN, at strides 1, 2 and 4, for images of about 16 to 64 pixels.

    Args:
        in_channels: C of the images.
        image_size: not used; the network is the same for every size.

    Returns:
        Backbone with stages "stage1" to "stage3" of widths 32, 64 and 128.
    """
    first, second, third = WIDTHS
    modules = {
        "stage1": conv_bn_relu(in_channels, first, kernel_size=3),
        "stage2": conv_bn_relu(first, second, kernel_size=3, stride=2),
        # The second layer of the deepest stage is 1x1: one more nonlinearity before the
        # projection for a ninth of the cost of a 3x3, which would hold most of the parameters.
        "stage3": nn.Sequential(
            conv_bn_relu(second, third, kernel_size=3, stride=2),
            conv_bn_relu(third, third, kernel_size=1),
        ),
    }
    channels = {"stage1": first, "stage2": second, "stage3": third}
    backbone = SequentialBackbone(modules, channels)
    he_init(backbone)
    return backbone
