"""What the values of a configuration must be together; each rule is one sentence.

Nothing heavy is imported, so that a configuration is refused in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping

from repfusion_env import (
    actions,
    cache_rules,
    contrastive_rules,
    data_rules,
    fusion_rules,
    loss_rules,
    registry,
    speed_rules,
)
from repfusion_env.config import ExperimentConfig, TimestepConfig
from students import registry as students

LIBRARIES = ("torchvision", "timm")
DATA_ON_DISK = (
    *("npz", "folder", "cifar10", "tiny_imagenet", "webdataset", "celebamask", "mask_folder"),
    *("voc_segmentation", "oxford_pet", "wflw", "pts", "coco", "voc"),
)
DATA_OF_SQUARES = frozenset({"wflw", "pts", "coco", "voc"})
DATA_WITH_SUBSETS = frozenset({"wflw", "pts"})

# Tasks of the project whose heads read maps.
DENSE_TASKS = ("segmentation", "landmarks", "detection")


def conflicts(config: ExperimentConfig) -> list[str]:
    """One sentence for each impossible value or combination, each headed by its dotted path."""
    return [
        *_unknown_names(config),
        *_observation_conflicts(config),
        *_distillation_conflicts(config),
        *_task_conflicts(config),
        *_grid_conflicts(config.timesteps),
        *_run_conflicts(config),
        *contrastive_rules.conflicts(config),
        *data_rules.conflicts(config),
        *cache_rules.conflicts(config),
        *speed_rules.conflicts(config),
    ]


def _unknown_names(config: ExperimentConfig) -> list[str]:
    found: list[str] = []

    def name(path: str, kind: str, value: str, table: Mapping[str, str]) -> None:
        sentence = registry.complaint(kind, value, table)
        if sentence:
            found.append(f"{path}: {sentence}")

    name("task", "task", config.task, registry.TASKS)
    name("data.name", "data set", config.data.name, registry.DATASETS)
    if config.teacher.family != "auto":
        name("teacher.family", "teacher family", config.teacher.family, registry.TEACHERS)
    name("env.action", "action", config.env.action, registry.ACTIONS)
    name("reward.kind", "reward", config.reward.kind, registry.REWARDS)
    projection = config.distillation.projection
    name("distillation.projection", "projection", projection, registry.PROJECTIONS)
    for loss in config.distillation.losses:
        name("distillation.losses", "loss", loss, registry.LOSSES)
    sentence = students.complaint(config.student.name)
    if sentence:
        found.append(f"student.name: {sentence[0].lower()}{sentence[1:].rstrip('.')}")
    return found


def _observation_conflicts(config: ExperimentConfig) -> list[str]:
    found: list[str] = []
    if "/" not in config.observation.source:
        source = config.observation.source
        sentence = registry.complaint("observation", source, registry.OBSERVATIONS)
        if sentence:
            found.append(f"observation.source: {sentence}")

    library, slash, _ = config.observation.source.partition("/")
    if slash and ":" not in config.observation.source and library not in LIBRARIES:
        found.append(
            f"observation.source: '{config.observation.source}' names no known library; "
            f"allowed: {', '.join(f'{known}/<name>' for known in LIBRARIES)}"
        )
    if config.observation.source == "pixels" and config.observation.student_state:
        found.append(
            "observation.student_state: it is appended to an embedding, so observation.source "
            "'pixels' has no place for it"
        )
    return found


def _distillation_conflicts(config: ExperimentConfig) -> list[str]:
    found: list[str] = []
    if not any(config.distillation.losses.values()):
        found.append("distillation.losses: at least one loss needs a weight above 0")
    if "attention" in config.distillation.losses and not config.distillation.dense:
        found.append(
            "distillation.losses: attention transfer compares maps, so it needs "
            "distillation.dense true"
        )
    found += fusion_rules.conflicts(config)
    found += loss_rules.option_conflicts(config.distillation.losses, config.distillation.options)
    alone = loss_rules.lonely(config.distillation.losses)
    if (
        alone
        and not config.distillation.dense
        and config.env.num_envs == 1
        and config.reward.kind == "student_lookahead"
    ):
        found.append(
            f"distillation.losses: on pooled features {' and '.join(alone)} compare a lane with "
            "the others, so with env.num_envs 1 the look-ahead has nothing to compare; give more "
            "lanes, another loss beside it, or distillation.dense true"
        )
    return found


def _task_conflicts(config: ExperimentConfig) -> list[str]:
    found: list[str] = []
    if config.task not in DENSE_TASKS:
        return found
    if not config.distillation.dense:
        found.append(
            f"distillation.dense: task '{config.task}' reads feature maps, so they are matched "
            "position by position; give distillation.dense true"
        )
    if config.data.labels == "clusters":
        found.append(
            f"data.labels: clusters are labels of whole images, which task '{config.task}' does "
            "not learn from; give data.labels given"
        )
    return found


def _run_conflicts(config: ExperimentConfig) -> list[str]:
    found: list[str] = []
    if config.data.name in DATA_ON_DISK and config.data.path is None:
        found.append(f"data.path: data.name '{config.data.name}' needs a path")
    data = config.data
    if data.name in DATA_OF_SQUARES and data.image_size is None:
        found.append(f"data.image_size: data.name '{data.name}' needs a side in pixels, such as 64")
    if data.subset is not None and data.name in registry.DATASETS.keys() - DATA_WITH_SUBSETS:
        found.append(
            f"data.subset: '{data.subset}' given, but data.name '{data.name}' has no subsets; "
            f"{' and '.join(sorted(DATA_WITH_SUBSETS))} have"
        )
    if config.data.labels == "clusters" and config.data.clusters < 2:
        found.append(
            f"data.clusters: {config.data.clusters} given; under data.labels clusters it must be "
            "2 or more, since one class has nothing to tell apart"
        )
    if config.timesteps.values is not None or config.timesteps.first <= config.timesteps.last:
        found += actions.conflicts(config)
    if config.env.num_envs % config.env.group_size:
        found.append(
            f"env.group_size: {config.env.num_envs} lanes cannot be divided into groups of "
            f"{config.env.group_size}"
        )
    if config.env.num_envs == 1 and config.optimizer.batch_size == 1:
        found.append(
            "optimizer.batch_size: one lane and a batch of 1 leave a single sample, which has no "
            "batch statistics to learn from; give 2 or more"
        )
    if config.reinforce.baseline == "group" and config.env.group_size < 2:
        found.append(
            "reinforce.baseline: 'group' needs several lanes on one image, so env.group_size "
            "must be 2 or more"
        )
    if config.optimizer.nesterov and (
        config.optimizer.name != "sgd" or config.optimizer.momentum == 0
    ):
        found.append("optimizer.nesterov: needs optimizer.name sgd with a momentum above 0")
    for path, device in (("device", config.device), ("sb3.device", config.sb3.device)):
        if not _is_device(device):
            found.append(f"{path}: '{device}' given; allowed: auto, cpu, cuda, cuda:<index>")
    return found


def _grid_conflicts(timesteps: TimestepConfig) -> list[str]:
    found = []
    if timesteps.values is None and timesteps.last < timesteps.first:
        found.append(
            f"timesteps.last: {timesteps.last} lies below timesteps.first {timesteps.first}"
        )
        return found
    grid = timesteps.grid()
    if not grid:
        found.append("timesteps.values: the grid is empty; at least one timestep is needed")
    duplicates = sorted({t for t in grid if grid.count(t) > 1})
    if duplicates and timesteps.values is not None:
        found.append(f"timesteps.values: {duplicates} stand more than once in the grid")
    elif duplicates:
        found.append(
            f"timesteps.count: {timesteps.count} {timesteps.spacing} timesteps between "
            f"{timesteps.first} and {timesteps.last} are not all different"
        )
    return found


def _is_device(name: str) -> bool:
    kind, _, index = name.partition(":")
    return name in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdigit())
