"""What ``train_control`` is told beside the configuration; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

from agents.command_line import OwnOption
from repfusion_env.config import ExperimentConfig
from repfusion_env.contrastive_rules import missing_packages
from repfusion_env.registry import did_you_mean
from repfusion_env.stage2.labels import label_count
from repfusion_env.stage2.settings import ANNOTATIONS

ENDLESS = 10**12
METHODS = {
    "simclr": "two views of each image are pulled together, labels are not used",
    "supervised": "the task's loss on labels, masks, points or boxes",
}


def method_problem(text: str) -> str | None:
    """What is wrong with a method, or None."""
    if text in METHODS:
        return None
    return f"'{text}' given; allowed: {', '.join(METHODS)}.{did_you_mean(text, list(METHODS))}"


def views_problem(annotation: str) -> str:
    """Why images with masks, points or boxes cannot be shown as views."""
    return (
        f"--augment: its views move an image and not its {annotation}; give "
        "--augmentation.flip, rotation, scale, translation or jitter instead"
    )


def labels_problem(text: str) -> str | None:
    """What is wrong with a number of labels, or None."""
    try:
        label_count(text, ENDLESS)  # how many images there are is not known yet
    except ValueError as error:
        return str(error).removeprefix("labels: ")
    return None


def switch_problem(text: str) -> str | None:
    """What is wrong with a yes or no, or None."""
    return None if text in ("true", "false") else f"'{text}' given; it must be true or false"


OPTIONS = {
    "method": OwnOption(
        "{" + ",".join(METHODS) + "}",
        "; ".join(f"{name}: {text}" for name, text in METHODS.items()),
        None,
        method_problem,
    ),
    "labels": OwnOption(
        "PART",
        "supervised: percentage or number of the training images whose labels (masks, points, "
        "boxes) are known, and which are shown",
        "100%",
        labels_problem,
    ),
    "augment": OwnOption(
        "BOOL",
        "supervised classification: show a random view of each image (see contrastive) instead of "
        "the image",
        "false",
        switch_problem,
    ),
}


def conflicts(config: ExperimentConfig, settings: Mapping[str, str]) -> list[str]:
    """What cannot be together, one sentence each; ``settings`` are values of :data:`OPTIONS`."""
    found = []
    method = settings.get("method")
    if method == "simclr" and settings["labels"] != OPTIONS["labels"].default:
        found.append("--labels: 'simclr' uses no labels; give it for --method supervised alone")
    if method == "simclr" and settings["augment"] == "true":
        found.append("--augment: 'simclr' has its views; give it for --method supervised alone")
    dense = ANNOTATIONS.get(config.task)
    if method == "supervised" and settings["augment"] == "true" and dense is not None:
        found.append(views_problem(dense))
    if method == "simclr" and max(config.env.num_envs, config.optimizer.batch_size) == 1:
        found.append("env.num_envs: 'simclr' tells images apart, so a step needs 2 or more")
    elif method == "simclr" and config.env.group_size >= max(
        config.env.num_envs, config.optimizer.batch_size
    ):
        found.append(
            f"env.group_size: {config.env.group_size} lanes of the same image are the whole step, "
            f"and 'simclr' tells images apart; allowed: less than env.num_envs "
            f"{config.env.num_envs}, or a larger optimizer.batch_size"
        )
    if method == "supervised" and config.data.labels == "clusters":
        found.append(
            "data.labels: 'clusters' are found by the teacher's features, and 'supervised' has no "
            "teacher; allowed: given"
        )
    views = method == "simclr" or settings.get("augment") == "true"
    sentence = missing_packages() if views and not config.contrastive.weight else None
    if sentence is not None:
        found.append(sentence)
    return found
