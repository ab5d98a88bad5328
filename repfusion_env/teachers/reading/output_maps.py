"""From what modules of any kind of network return to maps (N, F, h, w).

Shape letters: N lanes, H,W image, L tokens, F feature width, h,w feature positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MapReader:
    """Maps of a network whose modules return maps, maps with their channels last, or tokens.

    What is none of these is told by its proportions: a map has those of the image.

    Attributes:
        prefix: Tokens before those of the image: class, registers, distillation.
        patch: Height and width in pixels of one token's patch; None where they differ by depth.
        channels_last: Whether a map that could be read either way has its channels last.
    """

    prefix: int = 0
    patch: tuple[int, int] | None = None
    channels_last: bool = False

    def __call__(self, output: Any, input_shape: Sequence[int]) -> Tensor | None:
        """The map in ``output``, or None where it is none.

        Args:
            output: Of a module.
            input_shape: (C, H, W) of what the network sees.
        """
        if not isinstance(output, Tensor):
            return None
        if output.ndim == 3:
            return self._tokens(output, input_shape)
        if output.ndim != 4:
            return None
        first = _proportional((output.shape[2], output.shape[3]), input_shape)
        last = _proportional((output.shape[1], output.shape[2]), input_shape)
        if first and not (last and self.channels_last):
            return output
        return output.permute(0, 3, 1, 2) if last else None

    def _tokens(self, output: Tensor, input_shape: Sequence[int]) -> Tensor | None:
        counts = [output.shape[1] - self.prefix, output.shape[1]]
        if self.patch is not None:
            patches = (input_shape[1] // self.patch[0]) * (input_shape[2] // self.patch[1])
            counts.sort(key=lambda count: count != patches)
        for count in counts:
            found = tokens_as_map(output[:, output.shape[1] - count :], input_shape)
            if found is not None:
                return found
        return None


def tokens_as_map(tokens: Tensor, input_shape: Sequence[int]) -> Tensor | None:
    """Tokens (N, L, F) as a map of the image's proportions, or None where L makes no such grid."""
    count = tokens.shape[1]
    height = round((count * input_shape[1] / input_shape[2]) ** 0.5)
    if not height or count % height or not _proportional((height, count // height), input_shape):
        return None
    return tokens.transpose(1, 2).unflatten(2, (height, count // height))


def _proportional(grid: tuple[int, int], input_shape: Sequence[int]) -> bool:
    """Whether h:w is H:W, but for the rounding of one side."""
    height, width = input_shape[1], input_shape[2]
    return abs(grid[0] * width - grid[1] * height) < max(height, width)
