"""Policies that learn nothing: one timestep, any timestep, or one that moves through the run.

Shape letters: N lanes, A arms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Fixed(nn.Module):
    """Always the same arm, also where the action masks close it: it was asked for by name.

    Args:
        arm: Index of the arm.
    """

    arm: Tensor

    def __init__(self, arm: int) -> None:
        super().__init__()
        self.register_buffer("arm", torch.tensor(arm))

    def act(self, observations: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """See :class:`agents.bandits.Policy`."""
        return self.greedy(observations)

    def learn(self, observations: Tensor, actions: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def greedy(self, observations: Tensor) -> Tensor:
        """The arm, (N,) int64."""
        return self.arm.expand(len(observations))


class Uniform(nn.Module):
    """Each open arm with the same probability.

    Args:
        valid: (A,) bool, the open arms.
        seed: Of the choices by which it is judged.
    """

    valid: Tensor

    def __init__(self, valid: Tensor, seed: int) -> None:
        super().__init__()
        self.register_buffer("valid", valid)
        self.seed = seed

    def act(self, observations: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """See :class:`agents.bandits.Policy`."""
        weights = self.valid.float()
        return torch.multinomial(weights, len(observations), replacement=True, generator=generator)

    def learn(self, observations: Tensor, actions: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def greedy(self, observations: Tensor) -> Tensor:
        """Draws (N,) too, but the same ones each time, and none that training would miss."""
        generator = torch.Generator(self.valid.device).manual_seed(self.seed)
        return self.act(observations, 0.0, generator)


class Annealed(nn.Module):
    """The open arm whose timestep is nearest to a line through the run, the same for all lanes.

    Args:
        timesteps: (A,) of each arm.
        valid: (A,) bool, the open arms.
        start: Timestep at the beginning.
        end: Timestep at the end.
    """

    timesteps: Tensor
    valid: Tensor
    arm: Tensor

    def __init__(self, timesteps: Tensor, valid: Tensor, start: int, end: int) -> None:
        super().__init__()
        self.register_buffer("timesteps", timesteps.double())
        self.register_buffer("valid", valid)
        self.start, self.end = start, end
        self.register_buffer("arm", self.nearest(0.0))

    def nearest(self, progress: float) -> Tensor:
        """Index of the arm at ``progress`` in [0, 1]; of two equally near ones the first."""
        wanted = self.start + (self.end - self.start) * progress
        distances = (self.timesteps - wanted).abs()
        return distances.masked_fill(~self.valid, torch.inf).argmin()

    def act(self, observations: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """See :class:`agents.bandits.Policy`."""
        self.arm.copy_(self.nearest(progress))
        return self.greedy(observations)

    def learn(self, observations: Tensor, actions: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def greedy(self, observations: Tensor) -> Tensor:
        """Where the schedule stands, (N,) int64."""
        return self.arm.expand(len(observations))
