"""What callers hand to the lanes: actions and reset masks, refused in one sentence where wrong.

Shape letters: N lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor


def refusal(given: str, lanes: int, space: spaces.Space) -> str:
    """The sentence about actions that are not of ``space``."""
    return f"actions: {given} given; allowed: {lanes} of {space}"


def action_tensor(actions: Any, lanes: int, space: spaces.Space) -> Tensor:
    """Actions as a tensor of the right kind and shape, on the device they came from.

    Args:
        actions: A tensor, an array or a list.
        lanes: N.
        space: One lane's space; ``Discrete`` gives int64 (N,), ``Box`` floats (N, 1).

    Raises:
        ValueError: Another kind or shape.
    """
    if isinstance(actions, Tensor):
        given = actions
    else:
        try:
            given = torch.as_tensor(np.asarray(actions))
        except (TypeError, ValueError):
            raise ValueError(refusal(repr(actions), lanes, space)) from None
    continuous = isinstance(space, spaces.Box)
    is_number = given.dtype != torch.bool and not given.is_complex()
    kind_fits = is_number and given.is_floating_point() == continuous
    if tuple(given.shape) != ((lanes, 1) if continuous else (lanes,)) or not kind_fits:
        kind = str(given.dtype).removeprefix("torch.")
        raise ValueError(refusal(f"{kind} {tuple(given.shape)}", lanes, space))
    # torch compares no uint16, uint32 and uint64
    return given if continuous else given.long()


def reset_mask(options: dict[str, Any] | None, lanes: int, group_size: int) -> np.ndarray:
    """The lanes to reset, (N,) bool; all of them without ``options["reset_mask"]``.

    Raises:
        ValueError: The mask has another kind or shape, is empty, or splits a group.
    """
    if not options or options.get("reset_mask") is None:
        return np.ones(lanes, bool)
    given = options["reset_mask"]
    mask = given.cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if mask.dtype != bool or mask.shape != (lanes,) or not mask.any():
        raise ValueError(
            f"reset_mask: {mask.dtype} {mask.shape} with {np.count_nonzero(mask)} lanes set given; "
            f"it must be bool ({lanes},) with at least one lane set"
        )
    groups = mask.reshape(-1, group_size)
    if (groups.any(1) != groups.all(1)).any():
        raise ValueError(
            f"reset_mask: lanes of one group of {group_size} hold the same image and can only be "
            "reset together"
        )
    return mask
