"""A cache in the device's memory: one preallocated table.

Shape letters: n keys, R slots of one (timestep, mirrored), V numbers of one record, P such pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GIB = 1 << 30


def bytes_needed(parts: int, images: int, record_bytes: int) -> int:
    """Of a table that holds every record: features, and an image id for each."""
    return parts * images * (record_bytes + 8)


class MemoryStore:
    """Records of the timesteps that are expected, on a device.

    Args:
        parts: The P pairs (timestep, mirrored) that it has room for.
        images: Of the bank.
        num_timesteps: Of the teacher.
        width: V.
        dtype: How features are kept.
        device: Where.
        gib: Most that it takes. Where that is too little, image i shares slot ``i % R`` with
            others, and the newest stays.

    Raises:
        ValueError: ``gib`` is too little for one record of each pair, or the device has less.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, bool]],
        *,
        images: int,
        num_timesteps: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        gib: float,
    ) -> None:
        record = bytes_needed(len(parts), 1, width * dtype.itemsize)
        self.slots = min(images, int(gib * GIB) // record)
        if self.slots < 1:
            raise ValueError(
                f"cache.memory_gib: {gib:g} GiB given, but one image takes {record:,} bytes; give "
                f"{record / GIB:.2g} or more"
            )
        self.whole = self.slots == images
        self._rows = len(parts) * self.slots
        try:
            # One row more than there are records: of what has no place here, NaN, so that a mistake
            # is no feature.
            self._values = torch.empty(self._rows + 1, width, dtype=dtype, device=device)
            self._images = torch.full((self._rows + 1,), -1, dtype=torch.int64, device=device)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"cache.memory_gib: the device has no {record * self.slots / GIB:.2g} GiB left for "
                "the cache; give less, or cache.store disk"
            ) from error
        self._values[-1] = torch.nan
        regions = torch.full((2 * num_timesteps,), -1, dtype=torch.int64)
        for place, (timestep, mirrored) in enumerate(parts):
            regions[2 * timestep + mirrored] = place
        self._regions = regions.to(device)
        self._filled = np.zeros(self._rows, bool)
        self.count = 0

    @property
    def complete(self) -> bool:
        """Whether every record that can be asked for is here; known to the host."""
        return self.whole and self.count == self._rows

    @property
    def filled(self) -> float:
        """Part of the slots that hold a record."""
        return self.count / self._rows

    def rows(self, images: Tensor, timesteps: Tensor, mirrored: Tensor) -> Tensor:
        """Where keys (n,) are kept, (n,) int64; no host synchronisation."""
        region = self._regions[2 * timesteps + mirrored]
        return torch.where(region < 0, self._rows, region * self.slots + images % self.slots)

    def missing(self, rows: Tensor, images: Tensor) -> Tensor:
        """(n,) bool, the keys that are not here."""
        return (self._images[rows] != images) | (rows == self._rows)

    def take(self, rows: Tensor) -> Tensor:
        """Records (n, V); of what is missing, anything."""
        return self._values.index_select(0, rows)

    def put(self, rows: Tensor, images: Tensor, values: Tensor) -> None:
        """Keep records (n, V); for a slot given twice, the last stays."""
        places = rows.cpu().numpy()
        # The last of each slot, since the order of writes within one call is nobody's.
        _, last = np.unique(places[::-1], return_index=True)
        kept = np.sort(len(places) - 1 - last)
        kept = kept[places[kept] < self._rows]
        if not len(kept):
            return
        self.count += int((~self._filled[places[kept]]).sum())
        self._filled[places[kept]] = True
        chosen = torch.from_numpy(kept).to(rows.device)
        where = rows[chosen]
        self._values[where] = values[chosen].to(self._values.dtype)
        self._images[where] = images[chosen]
