"""What is measured of a student against its targets: losses per lane, and what rewards ask for.

Shape letters: N lanes, B samples, S student width, F teacher width, h,w positions, L teacher
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repfusion_env.config import RewardConfig
from repfusion_env.features import resized
from repfusion_env.fusion import Targets
from repfusion_env.losses import DistillationLoss, FeatureShape
from repfusion_env.rewards import Measurement
from repfusion_env.student import Student, task_input
from repfusion_env.tasks import Task


@dataclass(frozen=True)
class StepResult:
    """What one step did, per lane; tensors (N,) on the trainer's device.

    Attributes:
        reward: By the configured rule; always finite.
        distillation_loss: Before the update.
        task_loss_before: Of the training forward; in inference mode under ``student_gain``.
        task_loss_after: After the update, in inference mode; None where the reward needs none.
        correct: How much of the sample the student solved in the training forward: bool, or float32
            in [0, 1].
    """

    reward: Tensor
    distillation_loss: Tensor
    task_loss_before: Tensor
    task_loss_after: Tensor | None
    correct: Tensor


def moved_features(
    student: Student, maps: Sequence[Tensor], pooled: Tensor, dense: bool
) -> list[Tensor]:
    """What is matched, and what a look-ahead moves: maps (B, S, h, w), or one average (B, S)."""
    if dense or student.projections.all_stages:
        return [maps[index] for index in student.projections.moved]
    return [pooled]


def put_back(student: Student, moved: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
    """All maps, with those that moved in their places."""
    found = list(maps)
    for index, feature in zip(student.projections.moved, moved, strict=True):
        found[index] = feature
    return found


def projected(
    student: Student, moved: Sequence[Tensor], maps: Sequence[Tensor], dense: bool
) -> list[Tensor]:
    """The student's feature at each teacher layer, (B, F), or dense (B, F, h, w)."""
    together = put_back(student, moved, maps)
    found: list[Tensor] = student.projections(together[-1], together[:-1])
    return [p.mean((2, 3)) if p.ndim == 4 and not dense else p for p in found]


def on_student_grid(student: Student, teacher: Sequence[Tensor]) -> list[Tensor]:
    """Dense targets at the resolution at which they are matched; pooled ones as they are."""
    sizes = student.projections.sizes
    return [resized(z, size) if z.ndim == 4 else z for z, size in zip(teacher, sizes, strict=True)]


def loss_shapes(
    student: Student, widths: Sequence[int], dense: bool, images: int
) -> list[FeatureShape]:
    """What the loss compares at each teacher layer.

    Args:
        student: Whose projections it is for.
        widths: F of each layer.
        dense: Whether maps are matched.
        images: Of the training bank.
    """
    return [
        FeatureShape(width, dense, size if dense else (1, 1), images)
        for width, size in zip(widths, student.projections.sizes, strict=True)
    ]


def layer_losses(
    loss: DistillationLoss,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor | None,
    ids: Tensor | None,
) -> Tensor:
    """Distillation loss per sample, (B,): the layers' mean, or their sum by ``weights``.

    Args:
        loss: The configured one.
        student: Projected student features per layer.
        teacher: Targets per layer, of the same shapes.
        weights: (B, L) or (L,), of sum 1; None: the mean.
        ids: (B,) images of the training bank, or None for others.
    """
    pairs = enumerate(zip(student, teacher, strict=True))
    losses = [loss.layer(index, p, z, ids=ids) for index, (p, z) in pairs]
    if weights is None:
        return torch.stack(losses).mean(0)
    stacked = torch.stack(losses, dim=1)  # (B, L)
    # A layer that was not chosen counts for nothing even where it is not finite.
    return torch.where(weights > 0, stacked * weights, 0.0).sum(1)


@dataclass(frozen=True)
class Measuring:
    """Gathers what a reward rule asks for.

    Attributes:
        task: Whose head judges moved features.
        loss: The configured distillation loss.
        config: Of the reward.
        dense: Whether maps are matched.
    """

    task: Task
    loss: DistillationLoss
    config: RewardConfig
    dense: bool

    def __call__(
        self,
        student: Student,
        maps: Sequence[Tensor] | None,
        teacher: list[Tensor],
        targets: Targets,
        answers: Tensor,
        ids: Tensor | None,
        *,
        loss_before: Tensor,
        loss_after: Tensor | None,
        probe_loss: Tensor | None,
        others: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> Measurement:
        """One step's outcome for N lanes.

        Args:
            student: As it is after the update.
            maps: Its maps in inference mode, shallow to deep; None where no rule needs them.
            teacher: Targets per layer, at the resolution at which they are matched.
            targets: Weights and chosen layers.
            answers: The task's targets, N rows.
            ids: (N,) images of the training bank; None for others.
            loss_before: See :class:`Measurement`, as the next two.
            loss_after: (N,) or None.
            probe_loss: (N,) or None.
            others: See :class:`Measurement`.
        """
        kept = [] if maps is None else list(maps)
        features = None
        if kept:
            features = moved_features(student, kept, kept[-1].mean((2, 3)), self.dense)

        def task_losses(moved: list[Tensor]) -> Tensor:
            together = put_back(student, moved, kept)
            return self.task.losses(student.head(*task_input(self.task, together)), answers)

        return Measurement(
            student=features,
            teacher=teacher,
            project=lambda moved: projected(student, moved, kept, self.dense),
            jacobians=student.projections.jacobians(),
            sources=student.projections.sources,
            loss=self.loss,
            task_losses=task_losses,
            loss_before=loss_before,
            loss_after=loss_after,
            probe_loss=probe_loss,
            config=self.config,
            ids=ids,
            weights=targets.weights,
            chosen=targets.chosen,
            others=others,
        )


def finite_reward(reward: Tensor, loss: Tensor) -> Tensor:
    """Rewards with NaN replaced by what doing nothing is worth; the step is counted as bad."""
    reward = torch.where(torch.isfinite(reward), reward, -loss)
    return torch.nan_to_num(reward, nan=-10.0, posinf=10.0, neginf=-10.0)
