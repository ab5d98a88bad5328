"""The timestep grid on the device.

Shape letters: N lanes, k timesteps of one target, K grid length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repfusion_env.actions.choice import Choice


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

    def choice(self, indices: Tensor, layers: Tensor | None = None) -> Choice:
        """The grid's entries at ``indices`` (N, k), of all layers or each lane's own (N,)."""
        return Choice(self.tensor[indices], indices, layers)
