"""What one lane's last decision looked like, gathered for drawing.

Shape letters: N lanes, k timesteps of one target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from repfusion_env.actions.base import Choice
from repfusion_env.data.bank import ImageBank
from repfusion_env.episodes import Decisions
from repfusion_env.trainer import DistillationTrainer, StepResult


@dataclass(frozen=True)
class LaneView:
    """The last step of all lanes; tensors (N,)."""

    ids: Tensor
    choice: Choice
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
    layered: bool,
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
        layered: Whether actions choose a layer.
    """
    from repfusion_env.rendering import Frame, draw_frame

    parts = trainer.parts
    layers = tuple(parts.teacher.layers)
    frame = Frame(
        grid=trainer.grid_timesteps,
        layers=layers if layered else (),
        counts=decisions.total.cpu().numpy(),
        layer_counts=decisions.layer_total.cpu().numpy(),
    )
    at = slice(lane, lane + 1)
    if last is None:
        return draw_frame(replace(frame, image=bank.pixels(shown[at])[0].cpu().numpy()))
    choice, ids = last.choice, last.ids[at]
    timesteps = choice.timesteps[lane]  # (k,)
    looks = ids.expand(len(timesteps))
    visits = last.visits[at].expand(len(timesteps))
    inputs = parts.features.inputs(bank, looks, timesteps, visits, noise_seed)
    maps = parts.teacher.features(inputs, timesteps)
    layer = None if choice.layers is None else int(choice.layers[lane])
    with torch.no_grad():
        _, pooled = trainer.embed(bank.pixels(ids))
        prediction = int(trainer.student.head(pooled).argmax(1))
    history = torch.stack(decisions.history).cpu().numpy() if decisions.history else np.zeros(0)
    return draw_frame(
        replace(
            frame,
            image=bank.pixels(ids)[0].cpu().numpy(),
            noised=inputs.cpu().numpy(),
            feature=maps[layers[-1 if layer is None else layer]].cpu().numpy(),
            chosen=tuple(choice.indices[lane].tolist()),
            layer=layer,
            rewards=history,
            timesteps=tuple(timesteps.tolist()),
            reward=float(last.result.reward[lane]),
            label=bank.classes[int(bank.labels[ids])],
            prediction=bank.classes[prediction],
            decisions=int(decisions.total.sum()) // len(timesteps),
        )
    )
