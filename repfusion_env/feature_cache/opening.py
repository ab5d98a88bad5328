"""Which caches an experiment reads, opened as they are needed.

Shape letters: N lanes, T slots of one target, F feature width, h,w feature positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from repfusion_env import registry
from repfusion_env.config import ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.feature_cache.cache import DTYPES, Counts, FeatureCache, Keys
from repfusion_env.feature_cache.files import GIB, DiskStore
from repfusion_env.feature_cache.identity import Identity
from repfusion_env.feature_cache.memory import MemoryStore, bytes_needed
from repfusion_env.ranks import ALONE, Ranks
from repfusion_env.teachers.base import Teacher
from repfusion_env.timesteps import TimestepGrid

# Training images, held-out images, and one more: seeds that are left behind free their memory.
MOST_OPEN = 3
# Pieces of this many images: every size would be a network of its own to compilers and convolution
# libraries, and small ones are rounded in other ways than large ones.
PIECE = 16

# From lanes (m,) and timesteps (m,) to records (m, sum of F h w) float32.
LaneFeatures = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Opened:
    """A cache, and the bank whose ids it means, which it keeps alive."""

    bank: ImageBank
    cache: FeatureCache


class FeatureCaches:
    """The caches of one teacher: one for each image bank and noise seed.

    Args:
        config: The experiment; ``cache.store`` is not ``off``.
        teacher: Whose features are kept.
        timesteps: That may be asked for; see :func:`reachable_timesteps`.
        shapes: (F, h, w) of each layer.
        train: The training bank, on the device; its images alone are seen in the mirror, and
            counted as training.
        in_memory: False: nothing is kept on the device, whatever ``cache.store`` says.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        teacher: Teacher,
        timesteps: Sequence[int],
        shapes: Sequence[tuple[int, int, int]],
        train: ImageBank,
        *,
        in_memory: bool = True,
    ) -> None:
        self._config, self._teacher, self._train = config, teacher, train
        self._dense, self._in_memory = config.distillation.dense, in_memory
        self.shapes = tuple(tuple(s) if self._dense else (s[0],) for s in shapes)
        self.timesteps, self._device = tuple(timesteps), train.device
        self._opened: OrderedDict[tuple[int, int], _Opened] = OrderedDict()
        self.training, self.others = Counts(), Counts()
        self._total, self._drained = Counts(), Counts()  # of all ranks

    def of(self, bank: ImageBank, noise_seed: int) -> FeatureCache:
        """The cache of a bank's images under a noise seed, opened where it is not yet.

        Raises:
            ValueError: What is found in its folder is damaged or another cache's.
        """
        key = (id(bank), noise_seed if self._config.teacher.input == "noised" else 0)
        if key not in self._opened:
            while len(self._opened) >= MOST_OPEN:
                self._opened.popitem(last=False)
            self._opened[key] = _Opened(bank, self._open(bank, noise_seed))
        self._opened.move_to_end(key)
        return self._opened[key].cache

    def identity(self, bank: ImageBank, noise_seed: int) -> Identity:
        """What the features of a bank's images under a noise seed depend on."""
        teacher, config = self._teacher, self._config
        noised = config.teacher.input == "noised"
        return Identity(
            teacher=teacher.fingerprint,
            layers=tuple(teacher.layers),
            shapes=self.shapes,
            num_timesteps=teacher.num_timesteps,
            input=config.teacher.input,
            noise_seed=noise_seed if noised else None,
            data=bank.fingerprint,
            images=len(bank),
            precision=config.cache.precision,
        )

    def parts(self, bank: ImageBank) -> list[tuple[int, bool]]:
        """(timestep, mirrored) that a run may ask for."""
        mirrors = (False, True) if self._mirrors(bank) else (False,)
        return [(timestep, mirrored) for timestep in self.timesteps for mirrored in mirrors]

    def read(
        self,
        bank: ImageBank,
        ids: Tensor,
        timesteps: Tensor,
        noise_seed: int,
        mirrored: Tensor | None,
        compute: LaneFeatures,
    ) -> list[list[Tensor]]:
        """Features of N lanes at T timesteps each.

        Args:
            bank: Where ``ids`` point.
            ids: (N,) int64.
            timesteps: (N, T) int64.
            noise_seed: Of the fixed noise.
            mirrored: (N,) bool; None: none is.
            compute: The teacher.

        Returns:
            T times the layers' features, float32 (N, F) or (N, F, h, w), not standardised.
        """
        lanes, slots = timesteps.shape
        seen = torch.zeros_like(ids) if mirrored is None else mirrored.long()
        keys = Keys(ids.repeat(slots), timesteps.t().reshape(-1), seen.repeat(slots))
        counts = self.training if bank is self._train else self.others

        def missing(places: Tensor) -> Tensor:
            return in_pieces(compute, places % lanes, keys.timesteps[places], lanes)

        found = self.of(bank, noise_seed).read(keys, missing, counts).float()
        return [self._layers(part) for part in found.split(lanes)]

    def metrics(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """What training found in its cache since the last call; asked of all ranks at once."""
        total, before = self._totals(ranks), self._drained
        self._total = self._drained = total
        asked, computed = total.asked - before.asked, total.computed - before.computed
        means = {"cache/hit_rate": 1.0 - computed / asked} if asked else {}
        for opened in reversed(self._opened.values()):
            if opened.bank is self._train:
                if opened.cache.memory is not None:
                    means["cache/filled"] = opened.cache.memory.filled
                if opened.cache.disk is not None:
                    means["cache/damaged"] = float(opened.cache.disk.damaged)
                break
        return means

    def summary(self) -> dict[str, int]:
        """Features looked up in training, and how many of them the teacher had to compute.

        Of all ranks, as of the last :meth:`metrics`; of one process, as of now.
        """
        return asdict(max(self._total, self.training, key=lambda counts: counts.asked))

    def state_dict(self, ranks: Ranks = ALONE) -> dict[str, dict[str, int]]:
        """The counts of all ranks, so that those of a resumed run are of the whole run."""
        return {"total": asdict(self._totals(ranks)), "drained": asdict(self._drained)}

    def load_state_dict(self, state: dict[str, dict[str, int]], ranks: Ranks = ALONE) -> None:
        """Restore what :meth:`state_dict` gave; rank 0 keeps it for all."""
        self._total, self._drained = Counts(**state["total"]), Counts(**state["drained"])
        self.training = Counts(**state["total"]) if ranks.main else Counts()

    def _totals(self, ranks: Ranks) -> Counts:
        if not ranks.several:
            return replace(self.training)
        told = [self.training.asked, self.training.computed]
        both = torch.tensor(told, dtype=torch.float64, device=self._device)
        ranks.sum_([both])
        asked, computed = both.tolist()
        return Counts(round(asked), round(computed))

    def _layers(self, records: Tensor) -> list[Tensor]:
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        return [
            part.reshape(len(records), *shape)
            for part, shape in zip(records.split(sizes, dim=1), self.shapes, strict=True)
        ]

    def _mirrors(self, bank: ImageBank) -> bool:
        return self._config.augmentation.flip and bank is self._train

    # What is opened inside inference mode is written to outside of it, too.
    @torch.inference_mode(False)
    def _open(self, bank: ImageBank, noise_seed: int) -> FeatureCache:
        settings, parts = self._config.cache, self.parts(bank)
        identity = self.identity(bank, noise_seed)
        needed = bytes_needed(len(parts), len(bank), identity.feature_bytes)
        fits = needed <= settings.memory_gib * GIB
        memory = disk = None
        if settings.store == "disk" or (settings.store == "auto" and not fits):
            disk = DiskStore(
                Path(settings.folder),
                identity,
                gib=settings.disk_gib,
                parts=len(parts),
                names={"teacher": self._config.teacher.model, "data": bank.name},
            )
        if self._in_memory and (fits or disk is None):
            memory = MemoryStore(
                parts,
                images=len(bank),
                num_timesteps=self._teacher.num_timesteps,
                width=identity.width,
                dtype=DTYPES[settings.precision],
                device=self._device,
                gib=settings.memory_gib,
            )
        return FeatureCache(identity, self._device, memory=memory, disk=disk)


def reachable_timesteps(
    config: ExperimentConfig, grid: TimestepGrid, num_timesteps: int
) -> tuple[int, ...]:
    """The timesteps that a run's actions and ``fusion.timesteps`` can lead to, in order."""
    action = config.env.action
    if action not in registry.ACTIONS:
        return tuple(range(num_timesteps))  # an action space of one's own may choose any
    chosen = set(grid.timesteps)
    if action == "continuous_timestep":
        chosen = set(range(min(chosen), max(chosen) + 1))
    return tuple(sorted(chosen | set(config.fusion.timesteps)))


def in_pieces(compute: LaneFeatures, lanes: Tensor, timesteps: Tensor, most: int) -> Tensor:
    """``compute`` for m lanes, in pieces of ``most`` and a last one filled up to a round size.

    The rounding of a network's arithmetic depends on the size of its batch. So what is missing from
    a cache is computed in the batches of a step without one, as nearly as may be.
    """
    records = []
    for start in range(0, len(lanes), most):
        some, at = lanes[start : start + most], timesteps[start : start + most]
        size = min(most, -(-len(some) // PIECE) * PIECE)
        padding = size - len(some)
        filled = torch.cat((some, some[-1:].expand(padding))) if padding else some
        times = torch.cat((at, at[-1:].expand(padding))) if padding else at
        records.append(compute(filled, times)[: len(some)])
    return torch.cat(records)
