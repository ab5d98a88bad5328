"""What lanes hand back beside observations and rewards: infos of tensors.

Shape letters: N lanes, k timesteps of a set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from repfusion_env.actions.choice import Choice
from repfusion_env.trainer import StepResult


def flags(mask: np.ndarray, device: torch.device) -> Tensor:
    """A mask (N,) bool of the host on ``device``, for which the host does not wait.

    Lanes mostly end together, and a constant is made where it is wanted.
    """
    if mask.all() or not mask.any():
        return torch.full(mask.shape, bool(mask[0]), device=device)
    values = torch.from_numpy(mask)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def step_info(ids: Tensor, choice: Choice, result: StepResult) -> dict[str, Any]:
    """Of the decisions just made, tensors (N,) of their own; the timesteps of a set are (N, k)."""
    timesteps = choice.timesteps
    info = {
        "image_id": ids,
        "timestep": timesteps[:, 0] if timesteps.shape[1] == 1 else timesteps,
        "distillation_loss": result.distillation_loss,
        "task_loss_before": result.task_loss_before,
        "correct": result.correct,
    }
    if choice.layers is not None:
        info["layer"] = choice.layers
    if result.task_loss_after is not None:
        info["task_loss_after"] = result.task_loss_after
    return {key: value.clone() for key, value in info.items()}


def add_final(info: dict[str, Any], observations: Tensor, done: Tensor) -> None:
    """Add what Gymnasium's same-step autoreset asks for of the lanes of ``done`` (N,) bool.

    Args:
        info: Of :func:`step_info`.
        observations: Where the episodes ended, (N, ...).
        done: Which have.
    """
    final = {key: value.clone() for key, value in info.items()}
    info["final_info"] = final | {f"_{key}": done.clone() for key in final}
    info["_final_info"] = done
    info["final_obs"] = observations
    info["_final_obs"] = done.clone()
