"""The timestep grid on the device, and what an action means on it.

Shape letters: N lanes, K grid length.
"""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from repfusion_env.config import EnvConfig


class TimestepGrid:
    """The timesteps an agent may choose from.

    Args:
        timesteps: The grid, length K, in the order of the actions.
        device: Where actions arrive.
    """

    def __init__(self, timesteps: tuple[int, ...], device: torch.device) -> None:
        self.timesteps = timesteps
        self.tensor = torch.tensor(timesteps, dtype=torch.int64, device=device)  # (K,)

    def __len__(self) -> int:
        return len(self.timesteps)

    def space(self, env: EnvConfig) -> spaces.Space:
        """``Discrete(K)``, or ``Box(0, 1, (1,))`` for the continuous variant."""
        if env.action == "continuous":
            return spaces.Box(0.0, 1.0, (1,), np.float32)
        return spaces.Discrete(len(self))

    def indices(self, actions: Tensor) -> Tensor:
        """Grid indices (N,) of discrete actions (N,) or continuous ones (N, 1); clamped.

        A continuous action ``a`` in [0, 1] takes the index nearest to ``a * (K - 1)``.
        """
        if actions.is_floating_point():
            # Half rounds up: torch.round would send every second midpoint down (half to even).
            actions = (actions.reshape(-1) * (len(self) - 1) + 0.5).floor().nan_to_num(0.0).long()
        return actions.reshape(-1).long().clamp(0, len(self) - 1)

    def outside(self, actions: Tensor) -> Tensor:
        """Which of the N actions lie outside the space, (N,) bool, on the actions' device."""
        if actions.is_floating_point():
            flat = actions.reshape(-1)
            return ~((flat >= 0.0) & (flat <= 1.0))
        return (actions < 0) | (actions >= len(self))
