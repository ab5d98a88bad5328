"""What the actions of a step mean to the trainer.

Shape letters: N lanes, k timesteps of one target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """What the actions of N lanes chose.

    Attributes:
        timesteps: (N, k) int64, the timesteps whose features make one target; k is 1 but for sets.
        indices: (N, k) int64, the grid entries that they are or lie nearest to.
        layers: (N,) int64 into the teacher's layers, the one that is distilled; None: all of them.
    """

    timesteps: Tensor
    indices: Tensor
    layers: Tensor | None = None
