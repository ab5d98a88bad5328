"""Several timesteps of the grid, whose features are fused into one target."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from gymnasium import spaces

from repfusion_env.actions.base import Arm, Kind

if TYPE_CHECKING:
    from torch import Tensor

    from repfusion_env.actions.choice import Choice
    from repfusion_env.config import EnvConfig, ExperimentConfig
    from repfusion_env.timesteps import TimestepGrid


class TimestepSet:
    """``MultiDiscrete([K] * env.set_size)``: indices into the grid; one may be chosen repeatedly.

    The arms are the K sets of one timestep alone.
    """

    kind: ClassVar[Kind] = "MultiDiscrete"
    noun: ClassVar[str] = "timestep"
    exhaustive: ClassVar[bool] = False

    def __init__(self, grid: TimestepGrid, layers: tuple[str, ...], env: EnvConfig) -> None:
        self.grid = grid
        self.size = env.set_size
        self.space = spaces.MultiDiscrete([len(grid)] * self.size)
        self.arms = tuple(
            Arm(str(t), (index,) * self.size) for index, t in enumerate(grid.timesteps)
        )

    @staticmethod
    def conflicts(config: ExperimentConfig) -> list[str]:
        """A set larger than the grid."""
        size, places = config.env.set_size, len(config.timesteps.grid())
        if size <= places:
            return []
        return [
            f"env.set_size: a set of {size} timesteps is larger than the grid, which has {places}"
        ]

    def choice(self, actions: Tensor) -> Choice:
        """Actions (N, k)."""
        return self.grid.choice(actions)

    def masks(self, valid: np.ndarray) -> np.ndarray:
        """(k * K,) bool."""
        return np.tile(valid, self.size)
