"""Teachers: frozen generative models whose features are distilled.

A family of teachers is one file with ``load(config, *, device) -> Teacher``, beside it
``describe(config) -> TeacherCard`` where that needs no weights, and one line in
:data:`repfusion_env.registry.TEACHERS`.
"""

from __future__ import annotations

import sys

import torch

from repfusion_env.config import ExperimentConfig, TeacherConfig
from repfusion_env.config_loading import ConfigError
from repfusion_env.registry import TEACHERS, look_up
from repfusion_env.teachers.base import Teacher, TeacherCard, TeacherError, unknown_layers

__all__ = [
    "Teacher",
    "TeacherCard",
    "TeacherError",
    "check_fit",
    "describe_teacher",
    "load_teacher",
]


def load_teacher(config: TeacherConfig, *, device: torch.device | str) -> Teacher:
    """Load the configured teacher, frozen, on ``device``.

    Raises:
        TeacherError: Files are missing, damaged, or belong to another kind of model.
        ValueError: The family is unknown.
        TypeError: A loader of the user's own does not return a teacher.
    """
    teacher = look_up("teacher family", config.family, TEACHERS)(config, device=device)
    if not isinstance(teacher, Teacher):
        raise TypeError(
            f"teacher family '{config.family}': its loader must return a Teacher "
            f"(repfusion_env.teachers.base), not {type(teacher).__name__}"
        )
    return teacher


def describe_teacher(config: TeacherConfig) -> TeacherCard:
    """What the configured teacher takes and offers, from its configuration files alone.

    A family without ``describe`` beside its loader is loaded on the CPU for it.

    Raises:
        TeacherError: The files are missing or belong to another kind of model.
        ValueError: The family is unknown.
    """
    load = look_up("teacher family", config.family, TEACHERS)
    describe = getattr(sys.modules.get(load.__module__), "describe", None)
    if describe is not None:
        card: TeacherCard = describe(config)
        return card
    teacher = load_teacher(config, device="cpu")
    return TeacherCard(
        teacher.channels, teacher.image_size, teacher.num_timesteps, tuple(teacher.layers)
    )


def check_fit(
    card: TeacherCard, config: ExperimentConfig, bank_shape: tuple[int, int, int]
) -> None:
    """Refuse an experiment that the teacher does not fit.

    Args:
        card: Of the configured teacher.
        config: Its grid, observation timestep and layers are checked.
        bank_shape: Of the bank's images, (C, H, W).

    Raises:
        ConfigError: With every problem found, one sentence each.
    """
    problems = []
    last = card.num_timesteps - 1
    allowed = f"the teacher's scheduler has the timesteps 0..{last}"
    outside = [timestep for timestep in config.timesteps.grid() if not 0 <= timestep <= last]
    if outside:
        where = "timesteps.values" if config.timesteps.values is not None else "timesteps.last"
        problems.append(f"{where}: the grid holds {outside[0]}, but {allowed}")
    if config.observation.source == "teacher" and not 0 <= config.observation.timestep <= last:
        problems.append(f"observation.timestep: {config.observation.timestep} given; {allowed}")
    problems += [
        f"teacher.layers: {sentence}"
        for sentence in unknown_layers(config.teacher.layers, card.layers_available)
    ]
    channels, height, width = bank_shape
    if channels != card.channels:
        problems.append(
            f"teacher.model: the images have {_channels(channels)}, the teacher takes "
            f"{card.channels}"
        )
    if height % card.side_divisor or width % card.side_divisor:
        problems.append(
            f"data.image_size: the images are {height}x{width}, but the teacher halves them until "
            f"each side must be a multiple of {card.side_divisor}; it was trained on "
            f"{card.image_size}x{card.image_size}"
        )
    if problems:
        raise ConfigError(problems)


def _channels(count: int) -> str:
    return f"{count} channel{'' if count == 1 else 's'}"
