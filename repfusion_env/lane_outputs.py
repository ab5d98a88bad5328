"""What lanes hand back beside observations and rewards: infos of tensors.

Shape letters: N lanes, k timesteps of a set.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from repfusion_env.actions.choice import Choice
from repfusion_env.trainer import StepResult


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
