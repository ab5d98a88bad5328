"""The configured task."""

from __future__ import annotations

from repfusion_env import registry
from repfusion_env.augmentation import make_augmentation
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


def check_task(config: ExperimentConfig, train: ImageBank, heldout: ImageBank) -> None:
    """Refuse banks that lack what the task is to predict, before a teacher is loaded.

    Raises:
        ConfigError: The images are to be mirrored, and what their targets become is not known.
        ValueError: With one sentence.
    """
    task = build_task(config, train)
    if task.annotation == "labels" and config.data.labels == "given":
        require_labels(train, "the task")
    # Mirroring may be refused, too.
    make_augmentation(config, train, task.annotation)
    check_heldout(config, heldout)


def check_heldout(config: ExperimentConfig, heldout: ImageBank, images: int | None = None) -> None:
    """Refuse held-out images that cannot be measured: a whole run would end without a number.

    Args:
        config: Names the task.
        heldout: All of them.
        images: The first so many are measured; None: all.

    Raises:
        ValueError: With one sentence.
    """
    measured = min(images or len(heldout), len(heldout))
    try:
        build_task(config, heldout.head(measured))
    except ValueError as error:
        first = f"first {measured:,} " if measured < len(heldout) else ""
        raise ValueError(
            f"{error}; meant are the {first}held-out images, on which the metric is measured"
        ) from error
