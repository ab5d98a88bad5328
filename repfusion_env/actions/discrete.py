"""A timestep of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gymnasium import spaces

from repfusion_env.actions.base import Arm, Kind

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from repfusion_env.actions.choice import Choice
    from repfusion_env.config import EnvConfig
    from repfusion_env.timesteps import TimestepGrid


class DiscreteTimestep:
    """``Discrete(K)``: an index into the grid, in its order."""

    kind: ClassVar[Kind] = "Discrete"
    noun: ClassVar[str] = "timestep"
    exhaustive: ClassVar[bool] = True

    def __init__(self, grid: TimestepGrid, layers: tuple[str, ...], env: EnvConfig) -> None:
        self.grid = grid
        self.space = spaces.Discrete(len(grid))
        self.arms = tuple(Arm(str(t), index) for index, t in enumerate(grid.timesteps))

    def choice(self, actions: Tensor) -> Choice:
        """Actions (N,)."""
        return self.grid.choice(actions[:, None])

    def masks(self, valid: np.ndarray) -> np.ndarray:
        """(K,) bool."""
        return valid
