"""What an action chooses: one file per action space, one line each in ``registry.ACTIONS``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repfusion_env import registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from repfusion_env.actions.base import ActionSpace, Kind
    from repfusion_env.config import ExperimentConfig
    from repfusion_env.timesteps import TimestepGrid


def build_actions(
    config: ExperimentConfig, grid: TimestepGrid, layers: tuple[str, ...]
) -> ActionSpace:
    """The configured action space.

    Args:
        config: Its ``env`` section names it.
        grid: The timesteps that it chooses from.
        layers: The teacher's layers.

    Raises:
        ValueError: It does not fit grid or layers, or is not of the kind that it says.
    """
    import numpy as np
    from gymnasium import spaces

    actions: ActionSpace = _look_up(config.env.action)(grid, layers, config.env)
    if actions.kind not in ("Discrete", "MultiDiscrete", "Box") or not isinstance(
        actions.space, getattr(spaces, actions.kind)
    ):
        raise ValueError(
            f"env.action: the space of '{config.env.action}' is {actions.space}, but its kind is "
            f"'{actions.kind}'; allowed: Discrete, MultiDiscrete, Box"
        )
    if np.any(getattr(actions.space, "start", 0)):  # a Box has none
        raise ValueError(
            f"env.action: the space of '{config.env.action}' is {actions.space}; agents count from "
            "0, so it must start there"
        )
    return actions


def arm_actions(actions: ActionSpace, device: torch.device) -> Tensor:
    """The action of every arm, (A, ...), as an environment takes them."""
    import torch

    kind = torch.float32 if actions.kind == "Box" else torch.int64
    given = torch.tensor([arm.action for arm in actions.arms], dtype=kind, device=device)
    return given.reshape(len(actions.arms), *(actions.space.shape or ()))


def action_kind(name: str) -> Kind:
    """Class of the space that ``env.action: name`` gives; loads nothing but that part."""
    kind: Kind = _look_up(name).kind
    return kind


def names_of_kinds(kinds: tuple[str, ...]) -> list[str]:
    """The registered action spaces whose class is one of ``kinds``."""
    return [name for name in registry.ACTIONS if action_kind(name) in kinds]


def conflicts(config: ExperimentConfig) -> list[str]:
    """What a registered action space cannot be under ``config``, one sentence each."""
    if config.env.action not in registry.ACTIONS:
        return []  # unknown, which is said elsewhere, or one's own, which is imported when made
    find = getattr(_look_up(config.env.action), "conflicts", None)
    return [] if find is None else list(find(config))


def _look_up(name: str) -> Any:
    return registry.look_up("action", name, registry.ACTIONS)
