"""A number that stands for a timestep of the grid, for algorithms that know no other actions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from gymnasium import spaces

from repfusion_env.actions.base import Arm, Kind

if TYPE_CHECKING:
    from torch import Tensor

    from repfusion_env.actions.choice import Choice
    from repfusion_env.config import EnvConfig
    from repfusion_env.timesteps import TimestepGrid


class NearestTimestep:
    """``Box(0, 1, (1,))``: the grid index nearest to ``a * (K - 1)``; halves go up."""

    kind: ClassVar[Kind] = "Box"
    noun: ClassVar[str] = "timestep"
    exhaustive: ClassVar[bool] = True

    def __init__(self, grid: TimestepGrid, layers: tuple[str, ...], env: EnvConfig) -> None:
        self.grid = grid
        self.space = spaces.Box(0.0, 1.0, (1,), np.float32)
        last = max(len(grid) - 1, 1)
        self.arms = tuple(Arm(str(t), index / last) for index, t in enumerate(grid.timesteps))

    def choice(self, actions: Tensor) -> Choice:
        """Actions (N, 1)."""
        # Half rounds up: torch.round would send every second midpoint down (half to even).
        return self.grid.choice((actions * (len(self.grid) - 1) + 0.5).floor().long())

    def masks(self, valid: np.ndarray) -> np.ndarray:
        """(K,) bool."""
        return valid
