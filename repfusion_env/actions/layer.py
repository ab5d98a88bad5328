"""A layer of the teacher, at the grid's one timestep."""

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


class Layer:
    """``Discrete(layers)``: the teacher's layer that is distilled, in the order of its layers."""

    kind: ClassVar[Kind] = "Discrete"
    noun: ClassVar[str] = "layer"
    exhaustive: ClassVar[bool] = True

    def __init__(self, grid: TimestepGrid, layers: tuple[str, ...], env: EnvConfig) -> None:
        several_layers("layer", layers)
        self.grid = grid
        self.space = spaces.Discrete(len(layers))
        self.arms = tuple(Arm(name, index) for index, name in enumerate(layers))

    @staticmethod
    def conflicts(config: ExperimentConfig) -> list[str]:
        """A grid of several timesteps, or a single layer."""
        found = one_layer_configured("layer", config)
        places = len(config.timesteps.grid())
        if places > 1:
            found.append(
                f"env.action: 'layer' chooses among layers at one timestep, but the grid has "
                f"{places}; give one in timesteps.values, or use env.action timestep_and_layer"
            )
        return found

    def choice(self, actions: Tensor) -> Choice:
        """Actions (N,)."""
        return self.grid.choice(actions.new_zeros((len(actions), 1)), actions)

    def masks(self, valid: np.ndarray) -> np.ndarray:
        """(layers,) bool, all open."""
        return np.ones(len(self.arms), bool)


def several_layers(name: str, layers: tuple[str, ...]) -> None:
    """Refuse to choose among layers where there is one.

    Raises:
        ValueError: With one sentence.
    """
    if len(layers) < 2:
        raise ValueError(_one_layer(name, layers))


def one_layer_configured(name: str, config: ExperimentConfig) -> list[str]:
    """The same sentence where the configuration alone shows it."""
    layers = config.teacher.layers
    return [_one_layer(name, layers)] if len(layers) == 1 else []


def _one_layer(name: str, layers: tuple[str, ...]) -> str:
    return (
        f"env.action: '{name}' chooses among the teacher's layers, but there is one, "
        f"'{layers[0]}'; name several in teacher.layers, or use env.action discrete"
    )
