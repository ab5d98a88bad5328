"""One cache: what is looked up in memory, then on disk, and computed where it is in neither.

Shape letters: n keys, V numbers of one record, B bytes of one record's features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repfusion_env.feature_cache.files import DiskStore
from repfusion_env.feature_cache.identity import Identity
from repfusion_env.feature_cache.memory import MemoryStore
from repfusion_env.progress import watched

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# From positions among the keys, (m,) int64, to their records, (m, V) float32.
Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Keys:
    """What is looked up; all (n,) on the device.

    Attributes:
        images: int64 ids.
        timesteps: int64.
        mirrored: int64, 1 where the image is seen in the mirror.
    """

    images: Tensor
    timesteps: Tensor
    mirrored: Tensor

    def at(self, places: Tensor) -> Keys:
        """Some of them."""
        return Keys(self.images[places], self.timesteps[places], self.mirrored[places])

    def on_host(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As numpy arrays, in one transfer."""
        images, timesteps, mirrored = torch.stack(
            (self.images, self.timesteps, self.mirrored)
        ).cpu().numpy()  # fmt: skip
        return images, timesteps, mirrored


@dataclass
class Counts:
    """Of one kind of look-ups.

    Attributes:
        asked: Features looked up.
        computed: Images that went through the teacher for them.
    """

    asked: int = 0
    computed: int = 0


class FeatureCache:
    """The features of one identity.

    Args:
        identity: What they are.
        device: Where features are wanted.
        memory: Table on the device, if any.
        disk: Folder, if any; what it holds of the table's timesteps is loaded.

    Attributes:
        waiting_is_free: Whether the host may look at the device's memory at no cost.
    """

    def __init__(
        self,
        identity: Identity,
        device: torch.device,
        *,
        memory: MemoryStore | None = None,
        disk: DiskStore | None = None,
    ) -> None:
        self.identity, self.memory, self.disk = identity, memory, disk
        self._device, self._dtype = device, DTYPES[identity.precision]
        # Elsewhere a look at the device's memory stalls the step.
        self.waiting_is_free = device.type == "cpu"
        if memory is not None and disk is not None:
            self._load(memory, disk)

    @torch.no_grad()
    def read(self, keys: Keys, compute: Compute, counts: Counts) -> Tensor:
        """The records of n keys, as they are kept, (n, V).

        The host waits for the device unless everything is in memory.

        Args:
            keys: What is wanted.
            compute: Asked for what is in no store, each key once.
            counts: Are added to.

        Raises:
            ValueError: ``cache.precision`` cannot hold a feature.
        """
        counts.asked += len(keys.images)
        memory, rows = self.memory, None
        if memory is None:
            missing = torch.arange(len(keys.images), device=self._device)
            found = torch.empty(
                len(missing), self.identity.width, dtype=self._dtype, device=self._device
            )
        else:
            rows = memory.rows(keys.images, keys.timesteps, keys.mirrored)
            found = memory.take(rows)
            if memory.complete and not self.waiting_is_free:
                return found
            missing = memory.missing(rows, keys.images).nonzero().flatten()
            if not len(missing):
                return found
        fresh = self._beyond_memory(keys, missing, compute, counts)
        found[missing] = fresh
        if memory is not None and rows is not None:
            memory.put(rows[missing], keys.images[missing], fresh)
        return found

    def _beyond_memory(
        self, keys: Keys, missing: Tensor, compute: Compute, counts: Counts
    ) -> Tensor:
        """Records of the keys ``missing`` (m,), from the disk or computed, (m, V)."""
        images, timesteps, mirrored = keys.at(missing).on_host()
        fresh = torch.empty(
            len(images), self.identity.width, dtype=self._dtype, device=self._device
        )
        absent = np.arange(len(images))
        if self.disk is not None:
            there, data = self.disk.read(images, timesteps, mirrored)
            absent = np.flatnonzero(~there)
            if len(absent) < len(images):
                places = torch.from_numpy(np.flatnonzero(there)).to(self._device)
                fresh[places] = self._records(data[there])
        if not len(absent):
            return fresh
        # Lanes of a group ask for the same; each is computed once, in the order of asking.
        first: dict[tuple[int, int, int], int] = {}
        asked = zip(images[absent], timesteps[absent], mirrored[absent], strict=True)
        which = [first.setdefault((int(i), int(t), int(m)), len(first)) for i, t, m in asked]
        once = absent[np.unique(which, return_index=True)[1]]
        values = compute(missing[torch.from_numpy(once).to(self._device)])
        counts.computed += len(once)
        kept = values.to(self._dtype)
        sound = torch.isfinite(values).all(1)
        if bool((sound & ~torch.isfinite(kept).all(1)).any()):
            raise ValueError(
                f"cache.precision: {self.identity.precision} cannot hold features as large as "
                f"{float(values[sound].abs().max()):.3g}; give bf16 or fp32"
            )
        if self.disk is not None:
            data = kept.contiguous().view(torch.uint8).cpu().numpy()
            good = sound.cpu().numpy()
            rows = once[good]
            self.disk.write(images[rows], timesteps[rows], mirrored[rows], data[good])
        fresh[torch.from_numpy(absent).to(self._device)] = kept[
            torch.tensor(which, device=self._device)
        ]
        return fresh

    def _records(self, data: np.ndarray) -> Tensor:
        """Features (n, B) uint8 of the host as records (n, V) on the device."""
        bytes_ = torch.from_numpy(np.ascontiguousarray(data))
        if self._device.type == "cuda":
            bytes_ = bytes_.pin_memory()
        return bytes_.to(self._device, non_blocking=True).view(self._dtype)

    @torch.no_grad()
    def _load(self, memory: MemoryStore, disk: DiskStore) -> None:
        """Put into memory what the disk holds."""
        files = disk.files()
        slots = [range(disk.slots)] * len(files)
        total = disk.slots * len(files)
        pieces = watched(slots, total, description="feature cache", unit="slots")
        for (timestep, mirrored), _ in zip(files, pieces, strict=True):
            for part in disk.scan(timestep, mirrored):
                disk.damaged += len(part.damaged)
                if not len(part.images):
                    continue
                images = torch.from_numpy(part.images).to(self._device)
                at = torch.full_like(images, timestep)
                rows = memory.rows(images, at, torch.full_like(images, int(mirrored)))
                memory.put(rows, images, self._records(part.data))
