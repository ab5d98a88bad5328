"""The order in which lanes see images.

Shape letters: N lanes, M images of the bank, G lanes of a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from repfusion_env.data.bank import ImageBank
from repfusion_env.noise import derive_seed
from repfusion_env.ranks import ALONE, Ranks


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
        self._orders: dict[tuple[int, int], Tensor] = {}
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

    def peek(self, count: int) -> np.ndarray:
        """The ids that :meth:`take` would give, int64 (count,) on the host; nothing moves."""
        pieces: list[np.ndarray] = []
        epoch, cursor = self._epoch, self._cursor
        while count > 0:
            piece = self._host(self._seed, epoch).numpy()[cursor : cursor + count]
            pieces.append(piece)
            count -= len(piece)
            epoch, cursor = epoch + 1, 0
        return np.concatenate(pieces)

    def state_dict(self) -> dict[str, Any]:
        """Seed, epoch and cursor."""
        return {"seed": self._seed, "epoch": self._epoch, "cursor": self._cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._go_to(state["seed"], state["epoch"], state["cursor"])

    def _go_to(self, seed: int, epoch: int, cursor: int) -> None:
        self._seed, self._epoch, self._cursor = seed, epoch, cursor
        self._order = self._host(seed, epoch).to(self._device)

    def _host(self, seed: int, epoch: int) -> Tensor:
        """The order of an epoch, (M,) on the host; the last two asked for are kept."""
        key = (seed, epoch)
        if key not in self._orders:
            if len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            if self._shuffle:
                generator = torch.Generator().manual_seed(derive_seed(seed, "stream", epoch))
                self._orders[key] = torch.randperm(self._length, generator=generator)
            else:
                self._orders[key] = torch.arange(self._length)
        return self._orders[key]


def next_images(
    stream: ImageStream, bank: ImageBank, lanes: int, group: int, ranks: Ranks = ALONE
) -> Tensor:
    """The images that lanes see next; a streamed bank decodes those of the next steps meanwhile.

    Args:
        stream: Moves on.
        bank: Of its images.
        lanes: N, of all ranks.
        group: G, neighbouring lanes with the same image.
        ranks: Which lanes are this process's.

    Returns:
        int64 (N,), or of several ranks this one's part.
    """
    count = lanes // group
    shown = stream.peek(count) if bank.streamed else None
    ids = ranks.share(stream.take(count).repeat_interleave(group))
    if shown is not None:
        later = stream.peek(count * bank.ahead).reshape(-1, count)
        bank.stage(ids, _share(shown, ranks), [_share(part, ranks) for part in later])
    return ids


def _share(host: np.ndarray, ranks: Ranks) -> np.ndarray:
    return ranks.share(torch.from_numpy(host)).numpy() if ranks.several else host
