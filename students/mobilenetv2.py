"""MobileNetV2, with fewer strides for small images."""

from __future__ import annotations

from torch import nn

from students.backbone import Backbone, SequentialBackbone, he_init

# The five stages are the runs of blocks at one resolution: (width, first block, end block), with
# block 0 the stem and block 18 the closing 1x1 convolution.
STAGES = {
    "stage1": (16, 0, 2),
    "stage2": (24, 2, 4),
    "stage3": (32, 4, 7),
    "stage4": (96, 7, 14),
    "stage5": (1280, 14, 19),
}

SMALL_IMAGE = 64


def build_mobilenetv2(in_channels: int, image_size: int) -> Backbone:
    """Build MobileNetV2 (arXiv:1801.04381), width multiplier 1.

    Args:
        in_channels: C of the images.
        image_size: H and W; up to 64 pixels the total stride is 8, above it the published 32.

    Returns:
        Backbone with stages "stage1" to "stage5" of widths 16, 24, 32, 96 and 1280.
    """
    from torchvision.models import MobileNetV2

    # A total stride of 32 leaves a 32-pixel image one single position, and most of the network
    # would run on maps of 2x2 and less. The customary cure on CIFAR removes the two earliest
    # strides, the stem's and the first stage's: late strides stay, where the widths make full
    # resolution dear.
    small = image_size <= SMALL_IMAGE
    expansion_width_blocks_stride = [
        [1, 16, 1, 1],
        [6, 24, 2, 1 if small else 2],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    blocks = MobileNetV2(inverted_residual_setting=expansion_width_blocks_stride).features
    blocks[0][0] = he_init(
        nn.Conv2d(in_channels, 32, kernel_size=3, stride=1 if small else 2, padding=1, bias=False)
    )
    modules = {stage: blocks[first:end] for stage, (_, first, end) in STAGES.items()}
    return SequentialBackbone(modules, {stage: width for stage, (width, _, _) in STAGES.items()})
