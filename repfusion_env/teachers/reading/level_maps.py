"""Maps from the outputs of UNets and VAEs, whose attention sees one level's positions as tokens.

Shape letters: N lanes, H,W what the network sees, F feature width, h,w feature positions, T tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

Grid = tuple[int, int]


def level_map(output: Any, input_shape: tuple[int, ...], *, levels: int) -> Tensor | None:
    """A module's output as a map (N, F, h, w), or None where it is none.

    Args:
        output: A map, a tuple that holds one alone (as diffusers' transformers return), or image
            tokens (N, T, F), row by row.
        input_shape: (C, H, W) of what the network sees.
        levels: How often it halves that, at most.
    """
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4:
        return output
    if output.ndim != 3:
        return None
    grid = grid_of(output.shape[1], (input_shape[1], input_shape[2]), levels)
    return None if grid is None else output.transpose(1, 2).unflatten(2, grid)


def grid_of(tokens: int, size: Grid, levels: int) -> Grid | None:
    """The (h, w) of the one level with so many positions; None where there is none, or two.

    Sides that are odd are rounded up or down, as the network's convolutions are padded. Both are
    looked at, so that nothing is guessed.
    """
    reached = {size}
    found = set()
    for _ in range(levels + 1):
        found |= {(height, width) for height, width in reached if height * width == tokens}
        reached = {
            (max((height + up) // 2, 1), max((width + up) // 2, 1))
            for height, width in reached
            for up in (0, 1)
        }
    return found.pop() if len(found) == 1 else None
