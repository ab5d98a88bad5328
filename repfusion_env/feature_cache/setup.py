"""What is looked at before training, kept so that runs need not all compute it.

The statistics of the features, and the embedding of every image that the agent sees, take as many
teacher forwards as a short run. They depend on nothing that training changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repfusion_env.config import AugmentationConfig, ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.feature_cache.opening import FeatureCaches
from repfusion_env.teachers.base import Teacher

Shapes = Sequence[tuple[int, int, int]]


def statistics_caches(
    config: ExperimentConfig,
    teacher: Teacher,
    points: Sequence[int],
    reachable: Sequence[int],
    shapes: Shapes,
    bank: ImageBank,
) -> FeatureCaches | None:
    """Of the images from which mean and deviation are measured; None but on disk.

    Args:
        config: The experiment.
        teacher: Whose features they are.
        points: Timesteps at which they are measured.
        reachable: Timesteps of training, these among them.
        shapes: (F, h, w) of each layer.
        bank: The training images.
    """
    if config.cache.store != "disk":
        return None
    if config.teacher.input == "clean":
        # The folder is that of the training's features, and of the agent's looks where these are
        # pooled too. Who opens it first shares its room out: among all that will be asked for.
        points = sorted({*reachable, config.observation.timestep})
        return FeatureCaches(config, teacher, points, shapes, bank, in_memory=False)
    plain = replace(config, augmentation=AugmentationConfig())
    return FeatureCaches(plain, teacher, points, shapes, bank, in_memory=False)


def embedding_caches(
    config: ExperimentConfig, teacher: Teacher, shapes: Shapes, bank: ImageBank
) -> FeatureCaches | None:
    """Of the clean images at ``observation.timestep``, pooled; None where each is asked for once.

    That is but on disk, and but for a streamed bank, of which the observer keeps no table.
    """
    store = config.cache.store
    if store == "off" or not (store == "disk" or bank.streamed):
        return None
    clean = replace(
        config,
        teacher=replace(config.teacher, input="clean"),
        distillation=replace(config.distillation, dense=False),
        augmentation=AugmentationConfig(),
    )
    at = (config.observation.timestep,)
    return FeatureCaches(clean, teacher, at, shapes, bank, in_memory=bank.streamed)
