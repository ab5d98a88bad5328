"""Small exchanges between the ranks of one machine: slots in shared memory, and a short spin.

A batch norm exchanges a few numbers, twice for each layer. A rank that sleeps until a socket wakes
it loses more time than its neighbour is late; one that looks again and again goes on at once.

Shape letters: W ranks.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repfusion_env.rank_memory import mapped
from repfusion_env.ranks import OtherRankError, Ranks

SLOT = 1 << 16  # bytes of one rank's part
LINE = 8  # int64 numbers between two counters, so that no two share a cache line
SPIN_SECONDS, NAP_SECONDS, LOOK_SECONDS = 2e-3, 1e-4, 1.0


def ordered_stores() -> bool:
    """Whether this processor lets others see writes in their order, which the counters rely on."""
    return platform.machine().lower() in ("x86_64", "amd64")


class SharedSlots:
    """Two slots for each rank, used in turns, and a counter for each.

    Args:
        ranks: All on this machine.
        process_ids: Theirs.

    Raises:
        OSError: The memory cannot be had; on every rank, whichever it is.
    """

    def __init__(self, ranks: Ranks, process_ids: Sequence[int]) -> None:
        self._ranks, self._process_ids = ranks, list(process_ids)
        counters = 8 * LINE * ranks.count
        whole = mapped(ranks, counters + 2 * SLOT * ranks.count)
        self._counts = whole[:counters].numpy().view(np.int64)[::LINE]
        self._slots = whole[counters:].view(2, ranks.count, SLOT)
        self._number = 0

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all ranks, (W * n, ...), of a contiguous tensor of :data:`SLOT` at most."""
        size = values.numel() * values.element_size()
        slots = self._slots[(self._number + 1) % 2]
        slots[self._ranks.index, :size].copy_(values.reshape(-1).view(torch.uint8))
        self.meet()
        found = values.new_empty((self._ranks.count * len(values), *values.shape[1:]))
        found.view(-1).view(torch.uint8).view(self._ranks.count, size).copy_(slots[:, :size])
        return found

    def meet(self) -> None:
        """Until all ranks are here.

        Raises:
            OtherRankError: One of them has ended.
        """
        self._number += 1
        # Whoever has counted has written its slot, and read all of the one before.
        self._counts[self._ranks.index] = self._number
        if self._counts.min() >= self._number:
            return
        started = looked = time.monotonic()
        while self._counts.min() < self._number:
            now = time.monotonic()
            if now - started > SPIN_SECONDS:
                time.sleep(NAP_SECONDS)
            if now - looked > LOOK_SECONDS:
                looked = now
                self._look()

    def _look(self) -> None:
        for index, process_id in enumerate(self._process_ids):
            # One that was here, and ended after that, has left nobody waiting.
            if _gone(process_id) and self._counts[index] < self._number:
                raise OtherRankError(f"rank {index} has ended")


def _gone(process_id: int) -> bool:
    """Whether a process of this machine has ended, be it that nobody has asked how yet."""
    try:
        os.kill(process_id, 0)
        state = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return state.split()[0] == "Z"
