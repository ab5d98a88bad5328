"""A timestep of the grid and a layer of the teacher, together."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from gymnasium import spaces

from repfusion_env.actions.base import Arm, Kind
from repfusion_env.actions.layer import one_layer_configured, several_layers

if TYPE_CHECKING:
    from torch import Tensor

    from repfusion_env.actions.choice import Choice
    from repfusion_env.config import EnvConfig, ExperimentConfig
    from repfusion_env.timesteps import TimestepGrid


class TimestepAndLayer:
    """``MultiDiscrete([K, layers])``: the timestep's index, then the layer's."""

    kind: ClassVar[Kind] = "MultiDiscrete"
    noun: ClassVar[str] = "timestep, layer"
    exhaustive: ClassVar[bool] = True

    def __init__(self, grid: TimestepGrid, layers: tuple[str, ...], env: EnvConfig) -> None:
        several_layers("timestep_and_layer", layers)
        self.grid = grid
        self.layers = len(layers)
        self.space = spaces.MultiDiscrete([len(grid), len(layers)])
        self.arms = tuple(
            Arm(f"{t}, {name}", (index, layer))
            for index, t in enumerate(grid.timesteps)
            for layer, name in enumerate(layers)
        )

    @staticmethod
    def conflicts(config: ExperimentConfig) -> list[str]:
        """A single layer."""
        return one_layer_configured("timestep_and_layer", config)

    def choice(self, actions: Tensor) -> Choice:
        """Actions (N, 2)."""
        return self.grid.choice(actions[:, :1], actions[:, 1])

    def masks(self, valid: np.ndarray) -> np.ndarray:
        """(K + layers,) bool."""
        return np.concatenate((valid, np.ones(self.layers, bool)))
