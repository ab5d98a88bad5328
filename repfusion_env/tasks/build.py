"""The configured task."""

from __future__ import annotations

from repfusion_env import registry
from repfusion_env.config import ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.pseudo_labels import require_labels
from repfusion_env.tasks import Task


def build_task(config: ExperimentConfig, bank: ImageBank) -> Task:
    """The task ``config.task`` over the images of ``bank``.

    Raises:
        ValueError: There is no such task, or the bank lacks what it is to predict.
    """
    task: Task = registry.look_up("task", config.task, registry.TASKS)(config, bank)
    return task


def check_task(config: ExperimentConfig, bank: ImageBank) -> None:
    """Refuse a bank that lacks what the task is to predict, before a teacher is loaded.

    Raises:
        ValueError: With one sentence.
    """
    task = build_task(config, bank)
    if task.annotation == "labels" and config.data.labels == "given":
        require_labels(bank, "the task")
