"""Neighbouring lanes that hold the same image.

Shape letters: M images, G lanes of each.
"""

from __future__ import annotations

from torch import Tensor


def one_look(lanes: int, group: int, batch_size: int, ranks: int = 1) -> bool:
    """Whether the student sees an image once for all lanes of its group.

    Not where earlier decisions fill the batch up, which come in no groups, and not where one image
    would be all that a batch norm gets.

    Args:
        lanes: M * G of this process.
        group: G.
        batch_size: Of an update in this process.
        ranks: Processes with as many lanes each, whose images one batch norm gets.
    """
    return lanes >= batch_size and lanes % group == 0 and lanes * ranks > group


def spread(values: Tensor, group: int) -> Tensor:
    """Each of the rows (M, ...) ``group`` times in turn, (M * G, ...); gradients are added up."""
    if group == 1:
        return values
    # Not repeat_interleave, whose gradient is summed in no fixed order on CUDA.
    return values[:, None].expand(-1, group, *values.shape[1:]).flatten(0, 1)
