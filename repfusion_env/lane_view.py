"""What one lane's last decision looked like, gathered for drawing.

Shape letters: N lanes, C,H,W image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repfusion_env.data.bank import ImageBank
from repfusion_env.episodes import Decisions
from repfusion_env.trainer import DistillationTrainer, StepResult


@dataclass(frozen=True)
class LaneView:
    """The last step of all lanes, tensors (N,)."""

    ids: Tensor
    indices: Tensor
    timesteps: Tensor
    visits: Tensor
    result: StepResult


def draw_lane(
    trainer: DistillationTrainer,
    bank: ImageBank,
    shown: Tensor,
    last: LaneView | None,
    decisions: Decisions,
    noise_seed: int,
    lane: int,
) -> np.ndarray:
    """One frame, uint8 (height, width, 3).

    The noised image and the teacher's feature map are computed anew for this lane, with the very
    noise of the decision, so that nothing has to be kept when nobody looks.

    Args:
        trainer: Teacher and grid.
        bank: Where ids point.
        shown: (N,) images now shown, drawn before the first decision.
        last: The last step, or None before the first.
        decisions: Choices so far.
        noise_seed: Seed of the noise of the last step.
        lane: Which lane.
    """
    from repfusion_env.rendering import Frame, draw_frame

    grid, parts = trainer.grid_timesteps, trainer.parts
    counts = decisions.total.cpu().numpy()
    at = slice(lane, lane + 1)
    if last is None:
        image = bank.pixels(shown[at])[0].cpu().numpy()
        return draw_frame(Frame(image=image, grid=grid, counts=counts))
    ids, timesteps = last.ids[at], last.timesteps[at]
    inputs = parts.features.inputs(bank, ids, timesteps, last.visits[at], noise_seed)
    maps = parts.teacher.features(inputs, timesteps)
    with torch.no_grad():
        _, pooled = trainer.embed(bank.pixels(ids))
        prediction = int(trainer.student.head(pooled).argmax(1))
    history = torch.stack(decisions.history).cpu().numpy() if decisions.history else np.zeros(0)
    return draw_frame(
        Frame(
            image=bank.pixels(ids)[0].cpu().numpy(),
            noised=inputs[0].cpu().numpy(),
            feature=maps[parts.teacher.layers[-1]][0].cpu().numpy(),
            grid=grid,
            counts=counts,
            chosen=int(last.indices[lane]),
            rewards=history,
            timestep=int(timesteps[0]),
            reward=float(last.result.reward[lane]),
            label=bank.classes[int(bank.labels[ids])],
            prediction=bank.classes[prediction],
            decisions=int(counts.sum()),
        )
    )
