"""The teacher's features of (image, timestep) pairs, standardised.

Shape letters: N images, C,H,W image, F feature width, h,w feature positions, K grid length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from repfusion_env.config import ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.noise import derive_seed, keyed_noise
from repfusion_env.progress import watched
from repfusion_env.teachers.base import Teacher
from repfusion_env.timesteps import TimestepGrid

CHUNK = 256


def chunks(ids: Tensor, size: int = CHUNK) -> Iterator[Tensor]:
    """``ids`` in pieces small enough for one forward."""
    yield from ids.split(size)


class TeacherFeatures:
    """Standardised teacher features of (image, timestep) pairs.

    Features are standardised per channel, so that a loss weighs channels and layers alike, and by
    default at each timestep for itself. With one mean over the whole grid a feature tells its
    timestep, whatever the image: a policy that recognises the image can then choose the timestep as
    a code word for the label, and be rewarded for it (measured in ``docs/environment.md``).

    Args:
        teacher: The frozen teacher.
        config: Input mode, noise mode and whether features are dense.
        grid: Where the statistics are measured, beside ``fusion.timesteps``. Between two of these
            timesteps mean and deviation are interpolated linearly; beyond the last they stay.
        bank: Training images for the statistics.

    Attributes:
        shapes: (F, h, w) of each layer for the images of ``bank``.
    """

    def __init__(
        self, teacher: Teacher, config: ExperimentConfig, grid: TimestepGrid, bank: ImageBank
    ) -> None:
        self.teacher = teacher
        self.noised = config.teacher.input == "noised"
        self.fixed_noise = config.teacher.noise == "fixed"
        self.dense = config.distillation.dense
        self.per_timestep = config.teacher.standardize == "timestep"
        self.shapes: list[tuple[int, int, int]] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []
        points = tuple(dict.fromkeys((*grid.timesteps, *config.fusion.timesteps)))
        measured = self._measure(
            torch.tensor(points, device=grid.tensor.device), bank, config.teacher.standardize_images
        )
        if self.per_timestep:
            # One row for every timestep there is, so that a step only looks its rows up.
            count = teacher.num_timesteps
            measured = [
                (_between(m, points, count), _between(d, points, count)) for m, d in measured
            ]
        self._statistics = measured

    @property
    def widths(self) -> list[int]:
        """Feature width F of each layer."""
        return [shape[0] for shape in self.shapes]

    def clean(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """What noise is added to: the images as the teacher encodes them, (N, ...)."""
        return self.teacher.encode(bank.pixels(ids))

    def inputs(
        self, bank: ImageBank, ids: Tensor, timesteps: Tensor, visits: Tensor, noise_seed: int
    ) -> Tensor:
        """What the network sees: encoded images, with ``input: noised`` after add_noise."""
        return self._noised(self.clean(bank, ids), ids, timesteps, visits, noise_seed)

    def _noised(
        self, clean: Tensor, ids: Tensor, timesteps: Tensor, visits: Tensor, noise_seed: int
    ) -> Tensor:
        if not self.noised:
            return clean
        visits = torch.zeros_like(visits) if self.fixed_noise else visits
        channels, height, width = clean.shape[1:]
        noise = keyed_noise((channels, height, width), noise_seed, ids, timesteps, visits)
        return self.teacher.add_noise(clean, noise, timesteps)

    def __call__(
        self, bank: ImageBank, ids: Tensor, timesteps: Tensor, visits: Tensor, noise_seed: int
    ) -> list[Tensor]:
        """Features per layer, ``(N, F)`` or, dense, ``(N, F, h, w)``; no gradient, no sync.

        Args:
            bank: Where ``ids`` point.
            ids: ``(N,)`` image ids.
            timesteps: ``(N,)`` timesteps, any that the teacher has.
            visits: ``(N,)`` keys of fresh noise; see :func:`repfusion_env.noise.keyed_noise`.
            noise_seed: Seed of the noise.
        """
        return self.at(self.clean(bank, ids), ids, timesteps, visits, noise_seed)

    def at(
        self, clean: Tensor, ids: Tensor, timesteps: Tensor, visits: Tensor, noise_seed: int
    ) -> list[Tensor]:
        """Features of what :meth:`clean` gave, so that several timesteps encode an image once."""
        inputs = self._noised(clean, ids, timesteps, visits, noise_seed)
        maps = self.teacher.features(inputs, timesteps)
        features = [maps[layer] for layer in self.teacher.layers]
        if not self.shapes:
            self.shapes = [(f.shape[1], f.shape[2], f.shape[3]) for f in features]
        if not self.dense:
            features = [feature.mean((2, 3)) for feature in features]
        if not self._statistics:
            return features
        rows = timesteps if self.per_timestep else torch.zeros_like(timesteps)
        shape = (len(ids), -1, 1, 1) if self.dense else (len(ids), -1)
        return [
            (feature - mean[rows].view(shape)) / deviation[rows].view(shape)
            for feature, (mean, deviation) in zip(features, self._statistics, strict=True)
        ]

    def _measure(self, points: Tensor, bank: ImageBank, count: int) -> list[tuple[Tensor, Tensor]]:
        """Mean and deviation of each layer, (1, F) over all points or (points, F) for each."""
        generator = torch.Generator().manual_seed(derive_seed(0, "standardize"))
        ids = torch.randperm(len(bank), generator=generator)[:count].to(points.device)
        if self.per_timestep:
            passes = [torch.full_like(ids, int(timestep)) for timestep in points]
        else:
            passes = [points.repeat(len(ids) // len(points) + 1)[: len(ids)]]
        total = len(passes) * len(ids)
        rows = [
            self._moments(bank, ids, timesteps)
            for timesteps in watched(passes, total, description="standardize", unit="features")
        ]
        statistics = []
        for layer in range(len(rows[0])):
            count_, total, squares = torch.stack([row[layer] for row in rows], dim=1)  # (K, F) each
            mean = total / count_
            deviation = (squares / count_ - mean.square()).clamp_min(0).sqrt()
            # A channel that never varies must not be blown up to unit variance.
            deviation = deviation.clamp_min(1e-6 + 1e-3 * float(deviation.mean()))
            statistics.append((mean.float(), deviation.float()))
        return statistics

    def _moments(self, bank: ImageBank, ids: Tensor, timesteps: Tensor) -> list[Tensor]:
        """Count, sum and sum of squares per channel of each layer, (3, F) float64."""
        seed = derive_seed(0, "standardize noise")
        sums: list[Tensor] = []
        for part in chunks(torch.arange(len(ids), device=ids.device)):
            visits = torch.zeros_like(part)
            for index, feature in enumerate(self(bank, ids[part], timesteps[part], visits, seed)):
                values = feature.double().transpose(0, 1).flatten(1)  # (F, n)
                count = torch.full_like(values[:, 0], values.shape[1])
                moments = torch.stack((count, values.sum(1), values.square().sum(1)))
                if index == len(sums):
                    sums.append(moments)
                else:
                    sums[index] = sums[index] + moments
        return sums


def _between(rows: Tensor, points: tuple[int, ...], count: int) -> Tensor:
    """Rows (points, F) interpolated linearly to every timestep, (count, F)."""
    order = sorted(range(len(points)), key=lambda index: points[index])
    places = torch.tensor([points[index] for index in order], device=rows.device)
    values = rows[torch.tensor(order, device=rows.device)]
    wanted = torch.arange(count, device=rows.device).clamp(int(places[0]), int(places[-1]))
    below = (torch.searchsorted(places, wanted, right=True) - 1).clamp(0, len(points) - 1)
    above = (below + 1).clamp_max(len(points) - 1)
    width = (places[above] - places[below]).clamp_min(1)
    share = ((wanted - places[below]) / width)[:, None]
    return torch.lerp(values[below], values[above], share.to(values.dtype))


def pooled_layers(features: list[Tensor]) -> Tensor:
    """All layers side by side, (B, sum of F)."""
    return torch.cat([z.mean((2, 3)) if z.ndim == 4 else z for z in features], dim=1)


def resized(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, F, h, w) on another grid: averaged where it shrinks, interpolated where it grows."""
    if feature.shape[2:] == size:
        return feature
    if feature.shape[2] >= size[0] and feature.shape[3] >= size[1]:
        return functional.adaptive_avg_pool2d(feature, size)
    return functional.interpolate(feature, size, mode="bilinear", align_corners=False)
