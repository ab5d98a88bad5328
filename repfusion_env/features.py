"""The teacher's features of (image, timestep) pairs, standardised.

Shape letters: N images, C,H,W image, F feature width, h,w feature positions, K grid length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from repfusion_env.config import ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.feature_cache.opening import FeatureCaches, reachable_timesteps
from repfusion_env.feature_cache.setup import embedding_caches, statistics_caches
from repfusion_env.groups import spread
from repfusion_env.noise import derive_seed, keyed_noise
from repfusion_env.progress import watched
from repfusion_env.teachers.base import Teacher
from repfusion_env.timesteps import TimestepGrid

CHUNK = 256


def training_noise_seed(config: ExperimentConfig, seed: int) -> int:
    """Seed of the teacher's noise on training images of a run with ``seed``."""
    return derive_seed(_noise_seed(config, seed), "noise")


def heldout_noise_seed(config: ExperimentConfig) -> int:
    """Seed of the noise where nothing is trained; the same however the student was seeded."""
    return derive_seed(_noise_seed(config, config.seed), "held-out noise")


def _noise_seed(config: ExperimentConfig, seed: int) -> int:
    return seed if config.teacher.noise_seed is None else config.teacher.noise_seed


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
        caches: What is kept of them; None under ``cache.store: off``.
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
        self._setup: FeatureCaches | None = None
        self._embedding: FeatureCaches | None = None
        points = tuple(dict.fromkeys((*grid.timesteps, *config.fusion.timesteps)))
        reachable = reachable_timesteps(config, grid, teacher.num_timesteps)
        if config.cache.store != "off":
            self._look_at_one(bank)
            self._setup = statistics_caches(config, teacher, points, reachable, self.shapes, bank)
            self._embedding = embedding_caches(config, teacher, self.shapes, bank)
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
        self.caches: FeatureCaches | None = None
        if config.cache.store != "off":
            self.caches = FeatureCaches(config, teacher, reachable, self.shapes, bank)

    @property
    def widths(self) -> list[int]:
        """Feature width F of each layer."""
        return [shape[0] for shape in self.shapes]

    @property
    def setup_computed(self) -> tuple[int | None, int | None]:
        """Images that went through the teacher for the statistics, and for embeddings of training.

        None where the cache does not keep these, so that all of them did.
        """
        statistics, embedding = (
            None if caches is None else caches.training.computed
            for caches in (self._setup, self._embedding)
        )
        return statistics, embedding

    def embedded(self, bank: ImageBank, ids: Tensor, timestep: int) -> Tensor:
        """Pooled features of clean images, all layers side by side, (N, sum of F).

        Args:
            bank: Where ``ids`` point.
            ids: ``(N,)`` image ids.
            timestep: ``observation.timestep``.
        """

        def compute(lanes: Tensor, at: Tensor) -> Tensor:
            maps = self.teacher.features(self.teacher.encode(bank.pixels(ids)[lanes]), at)
            return torch.cat([maps[layer].mean((2, 3)) for layer in self.teacher.layers], dim=1)

        at = torch.full_like(ids, timestep)
        if self._embedding is None:
            return compute(torch.arange(len(ids), device=ids.device), at)
        (layers,) = self._embedding.read(bank, ids, at[:, None], 0, None, compute)
        return torch.cat(layers, dim=1)

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
        raw = self._raw(clean, ids, timesteps, visits, noise_seed)
        return self._standardized(raw, timesteps)

    def each(
        self,
        bank: ImageBank,
        ids: Tensor,
        timesteps: Tensor,
        visits: Tensor,
        noise_seed: int,
        images: Tensor | None = None,
        group: int = 1,
    ) -> Iterator[list[Tensor]]:
        """As a call, for several timesteps of each image in turn; out of the cache, if any.

        Args:
            bank: Where ``ids`` point.
            ids: ``(N,)`` image ids.
            timesteps: ``(N, T)`` timesteps.
            visits: ``(N,)`` keys of fresh noise.
            noise_seed: Seed of the noise.
            images: ``(N / group, C, H, W)`` in [-1, 1], what augmentation made of the images; None:
                as they are in the bank. Out of the cache, some may be mirrored, and no more.
            group: So many neighbours in ``ids`` are the same image, which is encoded once.

        Yields:
            The features per layer, T times.
        """
        if self.caches is not None:
            shown = None if images is None else spread(images, group)
            found = self.reader(self.caches, bank, ids, noise_seed, shown)(timesteps)
            for raw, at in zip(found, timesteps.unbind(1), strict=True):
                yield self._standardized(raw, at)
            return
        alone = self.clean(bank, ids[::group]) if images is None else self.teacher.encode(images)
        clean = spread(alone, group)
        for at in timesteps.unbind(1):
            yield self.at(clean, ids, at, visits, noise_seed)

    def reader(
        self,
        caches: FeatureCaches,
        bank: ImageBank,
        ids: Tensor,
        noise_seed: int,
        images: Tensor | None = None,
    ) -> Callable[[Tensor], list[list[Tensor]]]:
        """Looks up N images out of a cache, at (N, T) timesteps a call; each is encoded once.

        Args:
            caches: Where their features are kept.
            bank: Where ``ids`` point.
            ids: ``(N,)`` image ids.
            noise_seed: Seed of the noise.
            images: ``(N, C, H, W)`` in [-1, 1], the images, of which some may be mirrored; None: as
                they are in the bank.

        Returns:
            What gives T times the layers' features, not standardised.
        """
        mirrored = None
        if images is not None:
            mirrored = (images != bank.pixels(ids)).flatten(1).any(1)
        encoded: list[Tensor] = []  # of all images, and which of them it holds yet

        def clean(lanes: Tensor) -> Tensor:
            if encoded and bool(encoded[1][lanes].all()):
                return encoded[0][lanes]
            found = self.teacher.encode((bank.pixels(ids) if images is None else images)[lanes])
            if not encoded:
                encoded.append(found.new_empty(len(ids), *found.shape[1:]))
                encoded.append(torch.zeros_like(ids, dtype=torch.bool))
            encoded[0][lanes], encoded[1][lanes] = found, True
            return found

        def compute(lanes: Tensor, at: Tensor) -> Tensor:
            raw = self._raw(clean(lanes), ids[lanes], at, torch.zeros_like(lanes), noise_seed)
            return torch.cat([feature.flatten(1) for feature in raw], dim=1)

        return lambda timesteps: caches.read(bank, ids, timesteps, noise_seed, mirrored, compute)

    def _raw(
        self, clean: Tensor, ids: Tensor, timesteps: Tensor, visits: Tensor, noise_seed: int
    ) -> list[Tensor]:
        """Features as the teacher gives them, pooled or dense, per layer."""
        inputs = self._noised(clean, ids, timesteps, visits, noise_seed)
        maps = self.teacher.features(inputs, timesteps)
        features = [maps[layer] for layer in self.teacher.layers]
        if not self.shapes:
            self.shapes = [(f.shape[1], f.shape[2], f.shape[3]) for f in features]
        if not self.dense:
            features = [feature.mean((2, 3)) for feature in features]
        return features

    def _standardized(self, features: list[Tensor], timesteps: Tensor) -> list[Tensor]:
        if not self._statistics:
            return features
        rows = timesteps if self.per_timestep else torch.zeros_like(timesteps)
        shape = (len(rows), -1, 1, 1) if self.dense else (len(rows), -1)
        return [
            (feature - mean[rows].view(shape)) / deviation[rows].view(shape)
            for feature, (mean, deviation) in zip(features, self._statistics, strict=True)
        ]

    def _look_at_one(self, bank: ImageBank) -> None:
        """Learn the features' shapes."""
        ids = torch.zeros(1, dtype=torch.int64, device=bank.device)
        self._raw(self.clean(bank, ids), ids, ids, ids, 0)

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
            some, at = ids[part], timesteps[part]
            if self._setup is None:
                found = self(bank, some, at, visits, seed)
            else:
                (found,) = self.reader(self._setup, bank, some, seed)(at[:, None])
            for index, feature in enumerate(found):
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
