"""Bookkeeping of episodes and decisions.

Shape letters: N lanes, K grid length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Episodes:
    """Where each lane is in its episode. Lives on the host, so that asking costs no transfer.

    Args:
        lanes: N.
        length: Decisions per episode.
    """

    def __init__(self, lanes: int, length: int) -> None:
        self.length = length
        self._elapsed = np.zeros(lanes, np.int64)

    def restart(self, mask: np.ndarray) -> None:
        """Begin a new episode in the lanes of ``mask`` (N,) bool."""
        self._elapsed[mask] = 0

    def advance(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count one decision; finished lanes begin anew.

        Returns:
            finished, terminated, truncated, each (N,) bool. A one-step episode terminates, since
            the next image is nothing to bootstrap over; a longer one is cut off.
        """
        self._elapsed += 1
        finished = self._elapsed >= self.length
        self._elapsed[finished] = 0
        nobody = np.zeros_like(finished)
        if self.length == 1:
            return finished, finished.copy(), nobody
        return finished, nobody, finished.copy()

    def state_dict(self) -> dict[str, Any]:
        """Elapsed decisions per lane."""
        return {"elapsed": self._elapsed.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._elapsed[:] = state["elapsed"]


class Decisions:
    """Which timesteps were chosen, counted on the device.

    Args:
        choices: K.
        device: Where the indices are.
        keep_history: Keep the mean reward of every step, for rendering.
    """

    def __init__(self, choices: int, device: torch.device, *, keep_history: bool) -> None:
        self._choices, self._device, self._keep_history = choices, device, keep_history
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.total = torch.zeros(self._choices, dtype=torch.int64, device=self._device)
        self._since_drain = self.total.clone()
        self._outside = torch.zeros((), dtype=torch.int64, device=self._device)
        self.history: list[Tensor] = []

    def add(self, indices: Tensor, timesteps: Tensor, reward: Tensor) -> None:
        """Count the decisions of one step, each (N,)."""
        ones = torch.ones_like(indices)
        self.total.index_add_(0, indices, ones)
        self._since_drain.index_add_(0, indices, ones)
        if self._keep_history:
            self.history.append(reward.mean())

    def note_outside(self, outside: Tensor) -> None:
        """Count actions outside the space without waiting for the device."""
        self._outside += outside.sum()

    def drain_outside(self) -> int:
        """Actions outside the space since the last call."""
        count = int(self._outside)
        self._outside.zero_()
        return count

    def drain(self, timesteps: tuple[int, ...]) -> dict[str, Any]:
        """Counts, mean and entropy (nats) of the timesteps chosen since the last call."""
        counts = self._since_drain.tolist()
        self._since_drain.zero_()
        total = sum(counts)
        if not total:
            return {}
        share = np.array(counts) / total
        positive = share[share > 0]
        return {
            "timestep/mean": float(share @ np.array(timesteps)),
            "timestep/entropy": float(-(positive * np.log(positive)).sum()),
            "timestep/counts": counts,
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts, for a resume."""
        return {"total": self.total, "since_drain": self._since_drain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.restart()
        self.total.copy_(state["total"])
        self._since_drain.copy_(state["since_drain"])
