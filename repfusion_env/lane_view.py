"""What one lane's last decision looked like, gathered for drawing.

Shape letters: N lanes, k timesteps of one target, C,H,W image, c,h,w what the teacher sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from repfusion_env.actions.choice import Choice
from repfusion_env.data.bank import ImageBank
from repfusion_env.episodes import Decisions
from repfusion_env.trainer import DistillationTrainer, StepResult

# Root mean square of latents drawn as colors: bright, and few beyond [-1, 1].
LATENT_STRENGTH = 0.5


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
    noise of the decision, so that nothing has to be kept when nobody looks. They are those of the
    image as it is in the bank, whatever ``augmentation`` made of it for the step.

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
    from repfusion_env.prediction_figure import comparable
    from repfusion_env.rendering import TILE_SIDE, Frame, draw_frame, image_colors

    parts, task = trainer.parts, trainer.task
    layers = tuple(parts.teacher.layers)
    frame = Frame(
        grid=trainer.grid_timesteps,
        layers=layers if layered else (),
        counts=decisions.total.cpu().numpy(),
        layer_counts=decisions.layer_total.cpu().numpy(),
        dense=task.annotation != "labels",
        score_name=task.score,
    )
    at = slice(lane, lane + 1)
    if last is None:
        return draw_frame(replace(frame, image=bank.pixels(shown[at])[0].cpu().numpy()))
    choice, ids = last.choice, last.ids[at]
    timesteps = choice.timesteps[lane]  # (k,)
    looks = ids.expand(len(timesteps))
    visits = last.visits[at].expand(len(timesteps))
    clean = parts.features.clean(bank, ids)
    inputs = parts.features.inputs(bank, looks, timesteps, visits, noise_seed)
    maps = parts.teacher.features(inputs, timesteps)
    layer = None if choice.layers is None else int(choice.layers[lane])
    image = bank.pixels(ids)[0].cpu().numpy()
    outputs, answers = trainer.outputs(bank.pixels(ids)), task.targets(bank, ids)
    with torch.no_grad():
        said = comparable(task, task.predict(outputs), answers)[0].cpu()
    if frame.dense:
        colors = image_colors(image)
        frame = replace(
            frame,
            truth=task.draw(colors, answers[0].cpu(), TILE_SIDE),
            answer=task.draw(colors, said, TILE_SIDE),
            score=float(task.correct(outputs, answers)[0]),
        )
    else:
        label, prediction = bank.classes[int(answers[0])], bank.classes[int(said)]
        frame = replace(frame, label=label, prediction=prediction)
    latents = " latents" if clean.shape[1] not in (1, 3) else ""
    history = torch.stack(decisions.history).cpu().numpy() if decisions.history else np.zeros(0)
    return draw_frame(
        replace(
            frame,
            image=image,
            noised=as_pictures(inputs.cpu().numpy(), clean[0].cpu().numpy(), image),
            seen=("noised" if parts.features.noised else "clean") + latents,
            feature=maps[layers[-1 if layer is None else layer]].cpu().numpy(),
            chosen=tuple(choice.indices[lane].tolist()),
            layer=layer,
            rewards=history,
            timesteps=tuple(timesteps.tolist()),
            reward=float(last.result.reward[lane]),
            decisions=int(decisions.total.sum()) // len(timesteps),
        )
    )


def as_pictures(inputs: np.ndarray, clean: np.ndarray, image: np.ndarray) -> np.ndarray:
    """What a teacher sees, as pictures for the eye.

    Latents are no colors: they are shown along the three directions in which the clean ones vary
    most, so that the picture tells what noise leaves of the image. Noise processes count in units
    of their own (sigma may be 80): nothing is drawn stronger than the image itself.

    Args:
        inputs: What the network sees at each timestep, (k, c, h, w).
        clean: The same without noise, (c, h, w).
        image: In [-1, 1], (C, H, W).

    Returns:
        float64 (k, 1, h, w) or (k, 3, h, w), mostly in [-1, 1].
    """
    inputs, clean = (np.nan_to_num(np.asarray(part, np.float64)) for part in (inputs, clean))
    strength = _strength(image)
    if len(clean) not in (1, 3):
        clean, inputs = (x - x.mean((-2, -1), keepdims=True) for x in (clean, inputs))
        positions = clean.reshape(len(clean), -1)  # (c, hw)
        directions = np.linalg.svd(positions, full_matrices=False)[0][:, :3]
        colors = np.pad(directions, ((0, 0), (0, 3 - directions.shape[1])))  # (c, 3)
        # An eigenvector has no sign of its own: its largest entry is made positive.
        colors *= np.where(colors.max(0) < -colors.min(0), -1.0, 1.0)
        clean, inputs = (np.einsum("...chw,cd->...dhw", x, colors) for x in (clean, inputs))
        strength = LATENT_STRENGTH
    limit = _strength(clean)
    return np.stack([one * strength / (max(limit, _strength(one)) or 1.0) for one in inputs])


def _strength(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))
