"""A teacher's maps of a few images, and the vector of any pixel in them.

The vectors of all pixels would be as long as all maps enlarged to the image. Maps are kept at their
own size instead, and a pixel is interpolated when it is asked for.

Shape letters: N images, H,W image, F features of maps of one size h,w, D all features, B pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from repfusion_env.noise import keyed_noise
from repfusion_env.teachers.base import Teacher

# Images in one forward of the teacher.
CHUNK = 16


@dataclass(frozen=True)
class Reader:
    """Reads a teacher as the paper does: at several timesteps, with the same noise for all images.

    Args:
        teacher: With the layers that are read.
        timesteps: Each adds its maps.
        noised: Whether the teacher sees noised images, or the image itself with the timestep.
        seed: Of the noise.
    """

    teacher: Teacher
    timesteps: tuple[int, ...]
    noised: bool
    seed: int

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Maps of images (N, C, H, W) in [-1, 1]: one (N, F, h, w) for each size that there is.

        Those of one size lie side by side, in the order of timesteps and then layers; sizes follow
        each other as they first occur.
        """
        pieces = [self._read(part) for part in images.split(CHUNK)]
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _read(self, images: Tensor) -> list[Tensor]:
        clean = self.teacher.encode(images)
        channels, height, width = clean.shape[1:]
        one = torch.zeros(1, dtype=torch.int64, device=clean.device)
        noise = keyed_noise((channels, height, width), self.seed, one, one, one).expand_as(clean)
        found: dict[tuple[int, int], list[Tensor]] = {}
        for timestep in self.timesteps:
            at = one.new_full((len(images),), timestep)
            inputs = self.teacher.add_noise(clean, noise, at) if self.noised else clean
            maps = self.teacher.features(inputs, at)
            for layer in self.teacher.layers:
                size = maps[layer].shape[2], maps[layer].shape[3]
                found.setdefault(size, []).append(maps[layer])
        return [torch.cat(same, dim=1) for same in found.values()]


@dataclass(frozen=True, eq=False)
class PixelVectors:
    """The vectors of all pixels of N images, as bilinear interpolation of their maps gives them.

    Args:
        maps: (N, F, h, w) of each size.
        size: (H, W) of the images.

    Attributes:
        width: D.
    """

    maps: Sequence[Tensor]
    size: tuple[int, int]
    _tables: list[tuple[Tensor, Tensor, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tables", [_table(found, self.size) for found in self.maps])

    @property
    def width(self) -> int:
        return sum(found.shape[1] for found in self.maps)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Vectors (B, D) of the pixels (B,), numbered over all images row by row.

        As of ``interpolate(maps, (H, W), mode="bilinear", align_corners=False)``.
        """
        area = self.size[0] * self.size[1]
        image, inside = pixels // area, pixels % area
        parts = []
        for maps, (values, neighbours, weights) in zip(self.maps, self._tables, strict=True):
            places = neighbours[inside] + (image * (maps.shape[2] * maps.shape[3]))[:, None]
            share = weights[inside]
            parts.append(
                functional.embedding_bag(places, values, mode="sum", per_sample_weights=share)
            )
        return torch.cat(parts, dim=1)


def _table(maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N h w, F), and for each of the H W pixels its four neighbours and their weights."""
    rows, columns = (
        _along(length, new, maps.device) for length, new in zip(maps.shape[2:], size, strict=True)
    )
    neighbours, weights = [], []
    for row, row_weight in rows:
        for column, column_weight in columns:
            neighbours.append((row[:, None] * maps.shape[3] + column).flatten())
            weights.append((row_weight[:, None] * column_weight).flatten())
    values = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).contiguous()
    return values, torch.stack(neighbours, dim=1), torch.stack(weights, dim=1)


def _along(length: int, new: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The neighbour before and the one behind, each (new,) with its weight, along one axis."""
    places = ((torch.arange(new, device=device) + 0.5) * (length / new) - 0.5).clamp_min(0.0)
    before = places.floor().long().clamp_max(length - 1)
    share = (places - before).clamp(0.0, 1.0)
    return [(before, 1.0 - share), ((before + 1).clamp_max(length - 1), share)]
