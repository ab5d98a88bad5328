"""What an action space is.

Modules of this package import no torch, so that a command can refuse an agent that does not fit an
action space before anything heavy loads.

Shape letters: N lanes, K grid length, A entries of the masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from gymnasium import spaces
    from torch import Tensor

    from repfusion_env.actions.choice import Choice
    from repfusion_env.config import EnvConfig
    from repfusion_env.timesteps import TimestepGrid

Kind = Literal["Discrete", "MultiDiscrete", "Box"]


@dataclass(frozen=True)
class Arm:
    """A fixed action: what always does the same, and a learned policy is compared with.

    Attributes:
        label: What it is called in tables and summaries; different for each arm.
        action: One lane's action.
    """

    label: str
    action: int | float | tuple[int, ...]


class ActionSpace(Protocol):
    """One lane's actions and their meaning.

    Made as ``Kind(grid, layers, env)``: the timestep grid, the teacher's layers, and the section
    ``env`` of the configuration. One that stands in ``registry.ACTIONS`` may have a static
    ``conflicts(config) -> list[str]``: what the configuration alone shows cannot be.

    Attributes:
        kind: Class of :attr:`space`, by which agents know whether they can act on it.
        noun: What one arm's label names, for tables and figures: "timestep", "layer", ...
        exhaustive: Whether :attr:`arms` are all that can be chosen. Random actions are then worth
            the mean of the arms, and need no draws.
        space: One lane's space.
        arms: The fixed actions.
    """

    kind: ClassVar[Kind]
    noun: ClassVar[str]
    exhaustive: ClassVar[bool]
    space: spaces.Space
    arms: tuple[Arm, ...]

    def __init__(self, grid: TimestepGrid, layers: tuple[str, ...], env: EnvConfig) -> None: ...

    def choice(self, actions: Tensor) -> Choice:
        """What the actions (N, ...) mean; they lie within the space. Never waits for the device."""
        ...

    def masks(self, valid: np.ndarray) -> np.ndarray:
        """Which actions are open, (A,) bool.

        Args:
            valid: (K,) bool, the timesteps that are.

        Returns:
            One entry per action of ``Discrete``; of ``MultiDiscrete`` the entries of one component
            after the other; of ``Box``, which knows no masks, ``valid``.
        """
        ...
