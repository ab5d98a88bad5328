"""The feature pyramid: every stage of the student matched to the teacher at its own resolution.

Shape letters: N images, C,H,W map of a stage, F teacher width, D pyramid width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from students.projection import Projections

WIDTH = 128
BINS = (1, 2, 3, 6)


class FeaturePyramid(Projections):
    """The multi-scale feature regressor of DreamTeacher.

    Li et al., "DreamTeacher: Pretraining Image Backbones with Deep Generative Models", ICCV 2023,
    section 3: a feature pyramid (Lin et al., "Feature Pyramid Networks", CVPR 2017) on the
    student's stages, with pyramid pooling (Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017)
    on the deepest one. Each teacher layer is regressed from the level of nearest resolution. Their
    loss is ``losses: {hint: 1, attention: 10}`` with dense features. There is no batch norm, whose
    statistics would tie the lanes to one another.

    Args:
        stages: (C, H, W) of the student's stages, shallow to deep.
        layers: (F, H, W) of the teacher's layers.
        width: D.
        bins: Sides of the grids that pyramid pooling averages over; larger ones than the map are
            left out. None: no pyramid pooling.

    Attributes:
        levels: The stage (index) at which each teacher layer is matched.
    """

    all_stages = True

    def __init__(
        self,
        stages: Sequence[tuple[int, int, int]],
        layers: Sequence[tuple[int, int, int]],
        width: int = WIDTH,
        bins: Sequence[int] = BINS,
    ) -> None:
        super().__init__()
        sizes = [(height, wide) for _, height, wide in stages]
        self.levels = [nearest_stage(layer[1:], sizes) for layer in layers]
        self.sizes = [sizes[level] for level in self.levels]
        # Levels below the lowest one that is matched would be computed for nothing.
        self.lowest = min(self.levels)
        self.lateral = nn.ModuleList(
            nn.Conv2d(channels, width, 1) for channels, _, _ in stages[self.lowest :]
        )
        self.pooling = _PyramidPooling(width, [b for b in bins if b <= min(sizes[-1])])
        self.output = nn.ModuleList(nn.Conv2d(width, layer[0], 3, padding=1) for layer in layers)

    def forward(self, feature: Tensor, lower: Sequence[Tensor] = ()) -> list[Tensor]:
        """See `Projections.forward`; the feature is always a map.

        Raises:
            ValueError: The feature is pooled, or the stages are not all there.
        """
        maps = [*lower, feature][self.lowest :]
        if feature.ndim != 4 or len(maps) != len(self.lateral):
            raise ValueError(
                f"The pyramid takes the maps of all {self.lowest + len(self.lateral)} stages, got "
                f"{len(lower) + 1} and a last one of shape {tuple(feature.shape)}."
            )
        level = self.pooling(self.lateral[-1](maps[-1]))
        levels = [level]
        for lateral, stage in zip(reversed(self.lateral[:-1]), reversed(maps[:-1]), strict=True):  # type: ignore[arg-type,call-overload]
            above = functional.interpolate(level, stage.shape[2:], mode="nearest")
            level = lateral(stage) + above
            levels.insert(0, level)
        pairs = zip(self.output, self.levels, strict=True)
        return [output(levels[index - self.lowest]) for output, index in pairs]


class _PyramidPooling(nn.Module):
    """A map with its averages over coarser grids mixed in, (N, D, H, W) -> (N, D, H, W)."""

    def __init__(self, width: int, bins: Sequence[int]) -> None:
        super().__init__()
        self.bins = tuple(bins)
        part = max(1, width // max(1, len(bins)))
        self.reduce = nn.ModuleList(nn.Conv2d(width, part, 1) for _ in bins)
        self.merge = nn.Conv2d(width + part * len(bins), width, 1) if bins else None

    def forward(self, features: Tensor) -> Tensor:
        if self.merge is None:
            return features
        parts = [features]
        for side, reduce in zip(self.bins, self.reduce, strict=True):
            pooled = functional.relu(reduce(functional.adaptive_avg_pool2d(features, side)))
            size = features.shape[2:]
            parts.append(functional.interpolate(pooled, size, mode="bilinear", align_corners=False))
        merged: Tensor = self.merge(torch.cat(parts, dim=1))
        return merged


def nearest_stage(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> int:
    """Index of the size with the closest number of positions by ratio; of equals the deepest."""
    ratios = [abs(math.log(h * w / (size[0] * size[1]))) for h, w in sizes]
    return max(index for index, ratio in enumerate(ratios) if ratio <= min(ratios) + 1e-9)
