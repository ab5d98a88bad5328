"""A backbone with the head of its task, what it is trained for, and how it is judged.

Shape letters: M images of a bank, B images of a batch, C,H,W image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repfusion_env.augmentation import Augmentation
from repfusion_env.config import AugmentationConfig, ExperimentConfig
from repfusion_env.data import ImageBank
from repfusion_env.stage2.settings import (
    AUGMENTATION,
    FinetuneConfig,
    check_targets,
    with_head,
)
from repfusion_env.student import head_shapes, stage_shapes, task_input
from repfusion_env.tasks import Task
from repfusion_env.tasks.build import build_task
from repfusion_env.tasks.classification import ClassificationTask
from students import Backbone

EVALUATION_BATCH = 256
# Of dense tasks, whose answers are as large as their images: so many pixels at once.
EVALUATION_PIXELS = 2**18


class TaskStudent(nn.Module):
    """A backbone and the head of a task, with new random weights.

    Attributes:
        backbone: As given.
        head: The task's, on what it reads of the backbone's maps.
        task: Whose head it is.
    """

    def __init__(self, backbone: Backbone, task: Task, shape: tuple[int, int, int]) -> None:
        """See the class.

        Args:
            backbone: Any student.
            task: The task.
            shape: (C, H, W) of its images.
        """
        super().__init__()
        self.backbone, self.task = backbone, task
        self.head = task.head(head_shapes(task, stage_shapes(backbone, shape)))

    def forward(self, images: Tensor) -> Any:
        """What the head says of images (B, C, H, W) in [-1, 1]; for the task's methods."""
        found = self.backbone(images)
        stages = self.backbone.stages if self.task.reads == "stages" else self.backbone.stages[-1:]
        maps = [found[stage].float() for stage in stages]
        return self.head(*task_input(self.task, maps))


def stage2_task(
    experiment: ExperimentConfig | None, train: ImageBank, config: FinetuneConfig
) -> Task:
    """The task of a run as fine-tuning is to learn it.

    Args:
        experiment: The run's configuration; None: classification.
        train: Training images.
        config: ``head`` replaces the run's, and what it changes of an image the targets must be
            able to follow.

    Raises:
        ValueError: The bank lacks what is to be predicted, the task has no such head, or the
            targets cannot follow.
    """
    task = build_task(with_head(experiment or ExperimentConfig(), config.head), train)
    classifies = isinstance(task, ClassificationTask)
    check_targets(config, task.annotation, cross_entropy=classifies)
    return task


def joint_augmentation(config: FinetuneConfig, bank: ImageBank, task: Task) -> Augmentation | None:
    """What changes images together with their targets; None where nothing does.

    Images with a class are mirrored by :func:`repfusion_env.stage2.augmentation.augment`.
    """
    values = {name: getattr(config, name) for name in AUGMENTATION}
    if task.annotation == "labels":
        values["flip"] = False
    if not any(values.values()):
        return None
    return Augmentation(AugmentationConfig(**values), bank, task.annotation)


def task_loss(
    task: Task,
    outputs: Any,
    targets: Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The task's loss over a batch, a number.

    Args:
        task: The task.
        outputs: Of its head.
        targets: Its targets; of classification also parts of all classes, as mixing gives them.
        reduction: ``mean`` or ``sum``.
        label_smoothing: Of classification.
    """
    if isinstance(task, ClassificationTask):
        return F.cross_entropy(
            outputs.float(), targets, reduction=reduction, label_smoothing=label_smoothing
        )
    losses = task.losses(outputs, targets)
    return losses.mean() if reduction == "mean" else losses.sum()


@torch.inference_mode()
def evaluate(model: TaskStudent, bank: ImageBank) -> tuple[float, dict[str, float]]:
    """Mean task loss, and the task's metric, of ``model`` on all images of ``bank``."""
    task, training = model.task, model.training
    batch = EVALUATION_BATCH
    if task.annotation != "labels":
        batch = max(1, min(batch, EVALUATION_PIXELS // (bank.shape[1] * bank.shape[2])))
    model.eval()
    metric = task.metric()
    loss = torch.zeros((), dtype=torch.float64, device=bank.device)
    for ids in torch.arange(len(bank), device=bank.device).split(batch):
        outputs, targets = model(bank.pixels(ids)), task.targets(bank, ids)
        loss += task_loss(task, outputs, targets, reduction="sum")
        metric.update(outputs, targets)
    model.train(training)
    return float(loss) / len(bank), metric.compute()
