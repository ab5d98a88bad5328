"""What callers hand to the lanes: arguments, actions, reset masks; refused in one sentence.

Shape letters: N lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from repfusion_env.config import ExperimentConfig
from repfusion_env.ranks import Ranks

RENDER_MODES = ("rgb_array",)
SPLITS = ("train", "heldout")


def check_arguments(render_mode: str | None, split: str, train_student: bool) -> None:
    """Refuse what an environment cannot be made with.

    Raises:
        ValueError: With one sentence.
    """
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode: '{render_mode}' given; allowed: None, 'rgb_array'")
    if split not in SPLITS:
        raise ValueError(f"split: '{split}' given; allowed: 'train', 'heldout'")
    if split == "heldout" and train_student:
        raise ValueError("split: held-out images are never trained on; give train_student=False")


def check_shared(
    num_envs: int | None, shared: ExperimentConfig, config: Any, overrides: Mapping[str, Any]
) -> None:
    """Refuse what an environment on a shared trainer cannot be made with.

    Args:
        num_envs: N, where it is given.
        shared: The trainer's configuration.
        config: Another one, which is one too many.
        overrides: Likewise.

    Raises:
        ValueError: With one sentence.
    """
    if config is not None or overrides:
        raise ValueError("trainer: a shared trainer brings its own configuration; give no other")
    if num_envs is not None and num_envs < 1:
        raise ValueError(f"num_envs: {num_envs} given; it must be greater than 0")
    if num_envs is not None and num_envs % shared.env.group_size:
        raise ValueError(
            f"num_envs: {num_envs} lanes cannot be divided into groups of {shared.env.group_size}"
        )


def refusal(given: str, lanes: int, space: spaces.Space) -> str:
    """The sentence about actions that are not of ``space``."""
    return f"actions: {given} given; allowed: {lanes} of {space}"


def action_tensor(actions: Any, lanes: int, space: spaces.Space) -> Tensor:
    """Actions as a tensor of the right kind and shape, on the device they came from.

    Args:
        actions: A tensor, an array or a list.
        lanes: N.
        space: One lane's space; ``Discrete`` gives int64 (N,), ``MultiDiscrete`` int64 (N, m),
            ``Box`` floats (N, ...).

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
    if tuple(given.shape) != (lanes, *(space.shape or ())) or not kind_fits:
        kind = str(given.dtype).removeprefix("torch.")
        raise ValueError(refusal(f"{kind} {tuple(given.shape)}", lanes, space))
    # torch compares no uint16, uint32 and uint64
    return given if continuous else given.long()


class Limits:
    """The lowest and highest actions of one lane's space.

    Args:
        space: ``Discrete``, ``MultiDiscrete`` or ``Box``.
        device: Where actions are clamped.
    """

    def __init__(self, space: spaces.Space, device: torch.device) -> None:
        if isinstance(space, spaces.Box):
            low, high = space.low, space.high
        elif isinstance(space, spaces.MultiDiscrete):
            low, high = space.start, space.start + space.nvec - 1
        elif isinstance(space, spaces.Discrete):
            low, high = np.asarray(space.start), np.asarray(space.start + space.n - 1)
        else:
            raise TypeError(f"{space} given; allowed: Discrete, MultiDiscrete, Box")
        self._bounds = torch.from_numpy(np.array(low)), torch.from_numpy(np.array(high))
        self._low, self._high = (bound.to(device) for bound in self._bounds)

    def outside(self, actions: Tensor) -> Tensor:
        """Which of the actions (N, ...) lie outside the space, (N,) bool, where they are."""
        low, high = self._bounds if actions.device.type == "cpu" else (self._low, self._high)
        inside = (actions >= low) & (actions <= high)  # NaN is neither
        return ~inside.reshape(len(actions), -1).all(1)

    def clamped(self, actions: Tensor) -> Tensor:
        """The nearest actions of the space, (N, ...), as a new tensor on the device; NaN is low."""
        low, high = self._low.to(actions.dtype), self._high.to(actions.dtype)
        if actions.is_floating_point():
            actions = torch.where(actions.isnan(), low, actions)
        return actions.clamp(low, high)


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


def check_reset(seed: Any, mask: np.ndarray, ranks: Ranks) -> None:
    """Refuse a reset that cannot be.

    Args:
        seed: What is to be an int, or None.
        mask: The lanes to reset, (N,) bool.
        ranks: Who goes on in step.

    Raises:
        TypeError: The seed is something else.
        ValueError: Only some lanes are to be reset where all must.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer)):
        raise TypeError(
            f"seed: {seed!r} given; all lanes share one student, so the seed is one int"
        )
    if mask.all():
        return
    if seed is not None:
        raise ValueError(
            "reset_mask: a seed restarts the student of all lanes; reset all lanes, or give no seed"
        )
    if ranks.several:
        raise ValueError(
            f"reset_mask: {ranks.count} ranks go through their episodes in step; reset all lanes"
        )
