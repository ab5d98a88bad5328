"""WideResNet-28-2, the pre-activation wide residual network (arXiv:1605.07146)."""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor, nn

from students.backbone import Backbone, SequentialBackbone, he_init

DEPTH = 28
WIDEN_FACTOR = 2


class WideBlock(nn.Module):
    """Pre-activation residual block "B(3,3)": batch norm, ReLU, 3x3 convolution, twice.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input: the first
    batch norm and ReLU then serve both branches.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        stride: stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        activated = functional.relu(self.bn1(x), inplace=True)
        y = functional.relu(self.bn2(self.conv1(activated)), inplace=True)
        residual: Tensor = self.conv2(y)
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def build_wideresnet28_2(in_channels: int, image_size: int) -> Backbone:
    """Build WRN-28-2: 1.5 M parameters, total stride 4.

    Args:
        in_channels: C of the images.
        image_size: not used; the network is the same for every size.

    Returns:
        Backbone with stages "group1" to "group3" of widths 32, 64 and 128. The first two are
        residual sums without activation; the last one ends in the network's closing batch norm
        and ReLU.
    """
    blocks = (DEPTH - 4) // 6  # two convolutions a block, three groups, and four other layers
    widths = [16 * WIDEN_FACTOR, 32 * WIDEN_FACTOR, 64 * WIDEN_FACTOR]
    modules = {
        "stem": nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
        "group1": _group(16, widths[0], blocks, stride=1),
        "group2": _group(widths[0], widths[1], blocks, stride=2),
        "group3": nn.Sequential(
            *_group(widths[1], widths[2], blocks, stride=2),
            nn.BatchNorm2d(widths[2]),
            nn.ReLU(inplace=True),
        ),
    }
    channels = {f"group{i}": width for i, width in enumerate(widths, start=1)}
    backbone = SequentialBackbone(modules, channels)
    he_init(backbone)
    return backbone


def _group(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = WideBlock(in_channels, out_channels, stride)
    rest = [WideBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
