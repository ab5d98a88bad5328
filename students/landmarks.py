"""Heads that turn maps into heatmaps: where in the image each of P points is.

All of them are called as ``head(*maps)``, shallow to deep, and give logits (N, P, h, w) whose
softmax over the positions is where the point may be. They work with a single map too.

The norms of their hidden layers are group norms (arXiv:1803.08494) where the papers have batch
norms: what a head says of one image must not depend on the images beside it, because a reward is
paid for one lane's timestep alone.

Shape letters: N images, C,H,W map of a stage, P points, h,w heatmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

Shape = tuple[int, int, int]
Size = tuple[int, int]

GROUPS = 32


class LinearHeatmaps(nn.Module):
    """One linear layer at every position of the last map; heatmaps have that map's size.

    Args:
        shapes: (C, H, W) of the maps; the last one counts.
        points: P.
        hidden: Above 0 three layers of this width at every position, with ReLU between them, as the
            published method's head has (arXiv:2308.10916).
    """

    def __init__(self, shapes: Sequence[Shape], points: int, hidden: int = 0) -> None:
        super().__init__()
        channels = shapes[-1][0]
        if hidden:
            self.layers: nn.Module = nn.Sequential(
                nn.Conv2d(channels, hidden, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(hidden, hidden, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(hidden, points, 1),
            )
        else:
            self.layers = nn.Conv2d(channels, points, 1)

    def forward(self, *maps: Tensor) -> Tensor:
        """(N, C, H, W) to heatmaps (N, P, H, W)."""
        heatmaps: Tensor = self.layers(maps[-1])
        return heatmaps


class DeconvHeatmaps(nn.Module):
    """Transposed convolutions on the last map, each of which doubles it.

    Xiao, Wu and Wei, "Simple Baselines for Human Pose Estimation and Tracking", ECCV 2018
    (arXiv:1804.06208), who have three of them, 4x4 and 256 wide, behind ResNets. Here there are as
    many as bring the map closest to ``size`` without passing it; a map that needs none gets a 3x3
    convolution in their place.

    Args:
        shapes: (C, H, W) of the maps; the last one counts.
        points: P.
        width: Channels of the hidden layers.
        size: (h, w) that the heatmaps should have.
    """

    def __init__(self, shapes: Sequence[Shape], points: int, width: int, size: Size) -> None:
        super().__init__()
        channels, height, wide = shapes[-1]
        doublings = max(0, math.floor(math.log2(min(size[0] / height, size[1] / wide))))
        layers: list[nn.Module] = []
        for _ in range(doublings):
            layers += [nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1, bias=False)]
            layers += [_norm(width), nn.ReLU(inplace=True)]
            channels = width
        if not layers:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
            layers += [_norm(width), nn.ReLU(inplace=True)]
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Conv2d(width, points, 1)

    def forward(self, *maps: Tensor) -> Tensor:
        """(N, C, H, W) to heatmaps (N, P, h, w)."""
        heatmaps: Tensor = self.output(self.hidden(maps[-1]))
        return heatmaps


class HighResolutionHeatmaps(nn.Module):
    """All stages brought to one resolution, mixed at every position, then read linearly.

    The head of HRNetV2: Sun et al., "High-Resolution Representations for Labeling Pixels and
    Regions" (arXiv:1904.04514), which concatenates the upsampled maps before a 1x1 convolution. A
    1x1 convolution and bilinear resizing commute, so that each map is convolved at its own
    resolution and the results are added: the same function at a fraction of the cost.

    Args:
        shapes: (C, H, W) of the maps.
        points: P.
        width: Channels of the hidden layer; the paper has as many as all maps together.
        size: (h, w) that the heatmaps have at most; they are no larger than the largest map.
    """

    def __init__(self, shapes: Sequence[Shape], points: int, width: int, size: Size) -> None:
        super().__init__()
        self.size = (
            min(size[0], max(height for _, height, _ in shapes)),
            min(size[1], max(wide for _, _, wide in shapes)),
        )
        self.mix = nn.ModuleList(
            nn.Conv2d(channels, width, 1, bias=False) for channels, _, _ in shapes
        )
        self.norm = _norm(width)
        self.output = nn.Conv2d(width, points, 1)

    def forward(self, *maps: Tensor) -> Tensor:
        """One (N, C, H, W) per stage to heatmaps (N, P, h, w)."""
        pairs = zip(self.mix, maps, strict=True)
        parts = [_resized(mix(features), self.size) for mix, features in pairs]
        heatmaps: Tensor = self.output(functional.relu(self.norm(sum(parts))))
        return heatmaps


def linear_heatmaps(shapes: Sequence[Shape], points: int, width: int, size: Size) -> LinearHeatmaps:
    """:class:`LinearHeatmaps`, which have neither a width nor a size to choose."""
    return LinearHeatmaps(shapes, points)


HEADS: dict[str, Callable[[Sequence[Shape], int, int, Size], nn.Module]] = {
    "linear": linear_heatmaps,
    "deconv": DeconvHeatmaps,
    "hrnet": HighResolutionHeatmaps,
}


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(GROUPS, width), width)


def _resized(features: Tensor, size: Size) -> Tensor:
    """Bilinear where the map is smaller than ``size``, the average of what falls together else."""
    height, wide = features.shape[2:]
    if (height, wide) == size:
        return features
    if height > size[0] or wide > size[1]:
        features = functional.adaptive_avg_pool2d(
            features, (min(height, size[0]), min(wide, size[1]))
        )
    return functional.interpolate(features, size, mode="bilinear", align_corners=False)
