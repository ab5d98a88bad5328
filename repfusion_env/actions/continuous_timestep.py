"""Any timestep between the grid's lowest and highest, not only the grid's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from gymnasium import spaces

from repfusion_env.actions.base import Arm, Kind
from repfusion_env.actions.choice import Choice

if TYPE_CHECKING:
    from torch import Tensor

    from repfusion_env.config import EnvConfig
    from repfusion_env.timesteps import TimestepGrid


class ContinuousTimestep:
    """``Box(0, 1, (1,))``: ``a * (K - 1)`` read between the entries of the sorted grid.

    With sorted entries ``g`` and ``a * (K - 1) = i + f`` it is ``g_i + f (g_{i+1} - g_i)``, rounded
    to whole timesteps, halves up. So equal parts of [0, 1] lie between neighbouring entries, and a
    grid that is finer at low noise makes the action finer there.
    """

    kind: ClassVar[Kind] = "Box"
    noun: ClassVar[str] = "timestep"
    exhaustive: ClassVar[bool] = False

    def __init__(self, grid: TimestepGrid, layers: tuple[str, ...], env: EnvConfig) -> None:
        self.space = spaces.Box(0.0, 1.0, (1,), np.float32)
        last = max(len(grid) - 1, 1)
        order = np.argsort(grid.timesteps)
        place = np.empty(len(grid), np.int64)
        place[order] = np.arange(len(grid))
        self.arms = tuple(
            Arm(str(t), float(place[index]) / last) for index, t in enumerate(grid.timesteps)
        )
        self._sorted = grid.tensor.sort().values  # (K,)
        self._first = min(grid.timesteps)
        # Between two entries the nearer one; of two equally near ones the lower.
        reachable = np.arange(self._first, max(grid.timesteps) + 1)
        distances = np.abs(reachable[:, None] - np.array(grid.timesteps)[order])
        nearest = order[distances.argmin(axis=1)]
        self._nearest = grid.tensor.new_tensor(nearest.tolist())

    def choice(self, actions: Tensor) -> Choice:
        """Actions (N, 1)."""
        # float32 has too few digits for a place among a thousand entries and the part after it.
        place = actions.double() * (len(self._sorted) - 1)
        below = place.floor().long().clamp(max=max(len(self._sorted) - 2, 0))
        above = (below + 1).clamp(max=len(self._sorted) - 1)
        low, high = self._sorted[below], self._sorted[above]
        timesteps = (low + (place - below) * (high - low) + 0.5).floor().long()
        return Choice(timesteps, self._nearest[timesteps - self._first])

    def masks(self, valid: np.ndarray) -> np.ndarray:
        """(K,) bool, of the grid's entries."""
        return valid
