"""The order in which lanes see images.

Shape letters: N lanes, M images of the bank, G lanes of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repfusion_env.noise import derive_seed


class ImageStream:
    """Endless image ids: shuffled epoch by epoch, or always in the bank's order.

    Each epoch's order is a pure function of (seed, epoch), so the state is three numbers.

    Args:
        length: M.
        device: Where the ids are wanted.
        shuffle: False for evaluation.
    """

    def __init__(self, length: int, device: torch.device, *, shuffle: bool) -> None:
        self._length, self._device, self._shuffle = length, device, shuffle
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Start over at the first image of the first epoch."""
        self._go_to(seed, epoch=0, cursor=0)

    def take(self, count: int) -> Tensor:
        """The next ``count`` ids, int64 (count,), across the ends of epochs where need be."""
        pieces: list[Tensor] = []
        while count > 0:
            piece = self._order[self._cursor : self._cursor + count]
            pieces.append(piece)
            count -= len(piece)
            self._cursor += len(piece)
            if self._cursor >= self._length:
                self._go_to(self._seed, self._epoch + 1, 0)
        return torch.cat(pieces)

    def state_dict(self) -> dict[str, Any]:
        """Seed, epoch and cursor."""
        return {"seed": self._seed, "epoch": self._epoch, "cursor": self._cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._go_to(state["seed"], state["epoch"], state["cursor"])

    def _go_to(self, seed: int, epoch: int, cursor: int) -> None:
        self._seed, self._epoch, self._cursor = seed, epoch, cursor
        if self._shuffle:
            generator = torch.Generator().manual_seed(derive_seed(seed, "stream", epoch))
            order = torch.randperm(self._length, generator=generator)
        else:
            order = torch.arange(self._length)
        self._order = order.to(self._device)
