"""Bookkeeping of episodes and decisions.

Shape letters: N lanes, k timesteps of one target, K grid length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from repfusion_env.actions.choice import Choice
from repfusion_env.ranks import ALONE, Ranks


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

    def state_dict(self, ranks: Ranks = ALONE) -> dict[str, Any]:
        """Elapsed decisions per lane; ranks go through their episodes in step."""
        return {"elapsed": self._elapsed.tolist() * ranks.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._elapsed[:] = state["elapsed"][: len(self._elapsed)]


class Decisions:
    """Which timesteps and layers were chosen, counted on the device.

    Args:
        places: K.
        layers: Layers of the teacher.
        device: Where the choices are.
        keep_history: Keep the mean reward of every step, for rendering.
        ranks: Whose decisions are told of.
    """

    def __init__(
        self,
        places: int,
        layers: int,
        device: torch.device,
        *,
        keep_history: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._places, self._layers = places, layers
        self._device, self._keep_history = device, keep_history
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.total = self._zeros(self._places)
        self.layer_total = self._zeros(self._layers)
        self._since_drain = self._zeros(self._places)
        self._layers_since_drain = self._zeros(self._layers)
        self._timestep_sum = self._zeros()
        self._outside = self._zeros()
        self.history: list[Tensor] = []

    def add(self, choice: Choice, reward: Tensor) -> None:
        """Count the decisions of one step, with their rewards (N,)."""
        indices = choice.indices.reshape(-1)
        ones = torch.ones_like(indices)
        self.total.index_add_(0, indices, ones)
        self._since_drain.index_add_(0, indices, ones)
        self._timestep_sum += choice.timesteps.sum()
        if choice.layers is not None:
            ones = ones[: len(choice.layers)]
            self.layer_total.index_add_(0, choice.layers, ones)
            self._layers_since_drain.index_add_(0, choice.layers, ones)
        if self._keep_history:
            self.history.append(reward.mean())

    def note_outside(self, outside: Tensor) -> None:
        """Count actions outside the space without waiting for the device."""
        self._outside += outside.sum()

    def drain_outside(self) -> int:
        """Actions outside the space since the last call."""
        self._ranks.sum_([self._outside])
        count = int(self._outside)
        self._outside.zero_()
        return count

    def drain(self, grid: tuple[int, ...]) -> dict[str, Any]:
        """Counts, mean and entropy (nats) of the timesteps chosen since the last call.

        A timestep between two entries of the grid counts for the nearer one; the mean is exact.
        Where layers are chosen, their counts and entropy too.
        """
        self._ranks.sum_([self._since_drain, self._layers_since_drain, self._timestep_sum])
        counts, layers = self._since_drain.tolist(), self._layers_since_drain.tolist()
        timesteps = int(self._timestep_sum)
        for tensor in (self._since_drain, self._layers_since_drain, self._timestep_sum):
            tensor.zero_()
        total = sum(counts)
        if not total:
            return {}
        between = timesteps - sum(count * t for count, t in zip(counts, grid, strict=True))
        share = np.array(counts) / total
        found: dict[str, Any] = {
            "timestep/mean": float(share @ np.array(grid)) + between / total,
            "timestep/entropy": _entropy(share),
            "timestep/counts": counts,
        }
        if sum(layers):
            found["layer/entropy"] = _entropy(np.array(layers) / sum(layers))
            found["layer/counts"] = layers
        return found

    def state_dict(self) -> dict[str, Any]:
        """Counts of all ranks, for a resume."""
        counts = {
            "total": self.total,
            "since_drain": self._since_drain,
            "layer_total": self.layer_total,
            "layers_since_drain": self._layers_since_drain,
            "timestep_sum": self._timestep_sum,
        }
        if self._ranks.several:
            counts = {name: value.clone() for name, value in counts.items()}
            self._ranks.sum_(list(counts.values()))
        return counts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; rank 0 keeps it for all."""
        self.restart()
        if not self._ranks.main:
            return
        self.total.copy_(state["total"])
        self._since_drain.copy_(state["since_drain"])
        self.layer_total.copy_(state["layer_total"])
        self._layers_since_drain.copy_(state["layers_since_drain"])
        self._timestep_sum.copy_(state["timestep_sum"])

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)


def _entropy(share: np.ndarray) -> float:
    positive = share[share > 0]
    # Plus 0, or a single choice would have an entropy of -0.
    return float(-(positive * np.log(positive)).sum()) + 0.0
