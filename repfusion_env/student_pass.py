"""One training forward of a student on a batch: its losses, and what the reward asks for later.

Shape letters: B samples, M images of them, F teacher width of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from repfusion_env.contrastive import Contrastive
from repfusion_env.fusion import Targets, probe_input
from repfusion_env.measuring import moved_features, on_student_grid, projected
from repfusion_env.rank_losses import shared_losses
from repfusion_env.step_batch import Batch
from repfusion_env.student import task_input

if TYPE_CHECKING:
    from repfusion_env.trainer import DistillationTrainer


@dataclass(frozen=True)
class StudentPass:
    """What one training forward gave.

    Attributes:
        total: What the update lowers, ().
        maps: The student's, shallow to deep, M rows.
        matched: Projected student features per layer, B rows.
        teacher: Targets per layer at the resolution at which they are matched, B rows.
        distilled: Distillation loss (B,).
        task_losses: (B,).
        outputs: Of the task head, of M images.
        probe_losses: (B,) of the head on the teacher's feature; None where nobody asks.
        skipped: () bool, whether its update was; None before it, or where there was none.
    """

    total: Tensor
    maps: list[Tensor]
    matched: list[Tensor]
    teacher: list[Tensor]
    distilled: Tensor
    task_losses: Tensor
    outputs: Any
    probe_losses: Tensor | None
    skipped: Tensor | None = None

    def after(self, skipped: Tensor | None) -> StudentPass:
        """The same without gradients, once the update has used them."""
        probe = self.probe_losses
        return replace(
            self,
            total=self.total.detach(),
            maps=[values.detach() for values in self.maps],
            matched=[values.detach() for values in self.matched],
            distilled=self.distilled.detach(),
            task_losses=self.task_losses.detach(),
            probe_losses=None if probe is None else probe.detach(),
            skipped=skipped,
        )


def student_pass(
    trainer: DistillationTrainer, batch: Batch, *, several: bool, told: bool
) -> StudentPass:
    """Forward and losses of the student in its present mode.

    Args:
        trainer: Whose student it is.
        batch: What it sees.
        several: Whether there is more than one sample on all ranks.
        told: Whether the metrics hear of losses that a :class:`StudentPass` has not.
    """
    student, task = trainer.student, trainer.task
    maps = student.features(batch.images)
    pooled = maps[-1].mean((2, 3))
    features = moved_features(student, maps, pooled, trainer.dense)
    matched = [batch.spread(p) for p in projected(student, features, maps, trainer.dense)]
    teacher = on_student_grid(student, batch.targets.features)
    weights = batch.targets.weights
    distilled = shared_losses(trainer.ranks, trainer.loss, matched, teacher, weights, batch.ids)
    weight = trainer.config.distillation.task_weight
    read = task_input(task, maps)
    outputs = student.head(*(read if weight else [part.detach() for part in read]))
    task_losses = task.losses(outputs, batch.answers)
    # Every image stands for equally many samples: their mean is the samples'.
    total = distilled.mean() + (weight or 1.0) * task_losses.mean()
    probe_losses = None
    if trainer.rule.probe or trainer.fusion.logits is not None:
        answers = batch.spread(batch.answers)
        probe_losses = task.losses(probe_outputs(trainer, student, batch.targets), answers)
        total = total + probe_losses.mean()
    if trainer.loss_learns:
        total = total + trainer.loss.auxiliary(teacher)
    if trainer.contrastive is not None and several:
        loss = _contrast(trainer, trainer.contrastive, batch)
        if told:
            trainer.metrics.add("student/contrastive_loss", loss)
        total = total + trainer.config.contrastive.weight * loss
    return StudentPass(
        total,
        maps,
        matched,
        teacher,
        distilled,
        batch.spread(task_losses),
        outputs,
        probe_losses,
    )


def probe_outputs(trainer: DistillationTrainer, student: Any, targets: Targets) -> Any:
    """What the head on the teacher's feature says."""
    return student.probe(probe_input(targets, pooled=trainer.task.reads == "pooled"))


def _contrast(trainer: DistillationTrainer, contrastive: Contrastive, batch: Batch) -> Tensor:
    # Lanes of one image have views of their own.
    loss: Tensor = contrastive(
        lambda views: trainer.student.features(views)[-1].mean((2, 3)),
        batch.spread(batch.images),
        batch.ids,
        trainer.ranks,
    )
    return loss
