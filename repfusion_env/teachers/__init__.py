"""Teachers: frozen generative models whose features are distilled.

A family of teachers is one file with ``load(config, *, device) -> Teacher``, beside it
``describe(config) -> TeacherCard`` where that needs no weights, and one line in
:data:`repfusion_env.registry.TEACHERS`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from repfusion_env.config import ExperimentConfig, TeacherConfig
from repfusion_env.config_loading import ConfigError
from repfusion_env.registry import TEACHERS, WrongPartError, look_up
from repfusion_env.teachers.base import Teacher, TeacherCard, TeacherError, unknown_layers
from repfusion_env.teachers.detect import family_of
from repfusion_env.teachers.module import describe_module, wrap_module

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

    A loader of the user's own may return a plain ``nn.Module``; see
    :mod:`repfusion_env.teachers.module`.

    Raises:
        TeacherError: Files are missing, damaged, or belong to another kind of model.
        ValueError: The family is unknown.
        TypeError: A loader of the user's own cannot be called as one, or returns no teacher.
    """
    family = family_of(config)
    loaded = _loader(family)(config, device=device)
    if isinstance(loaded, nn.Module) and not isinstance(loaded, Teacher):
        return wrap_module(loaded, config, device=device)
    return _checked(loaded, family)


def describe_teacher(config: TeacherConfig) -> TeacherCard:
    """What the configured teacher takes and offers, from its configuration files alone.

    A family without ``describe`` beside its loader is loaded on the CPU for it.

    Raises:
        TeacherError: The files are missing or belong to another kind of model.
        ValueError: The family is unknown.
        TypeError: See :func:`load_teacher`.
    """
    family = family_of(config)
    load = _loader(family)
    describe = getattr(sys.modules.get(load.__module__), "describe", None)
    if describe is not None:
        card: TeacherCard = describe(config)
        return card
    loaded = load(config, device="cpu")
    if isinstance(loaded, nn.Module) and not isinstance(loaded, Teacher):
        return describe_module(loaded, config)
    teacher = _checked(loaded, family)
    return TeacherCard(
        teacher.channels,
        teacher.image_size,
        teacher.num_timesteps,
        tuple(teacher.layers),
        default_layers=tuple(teacher.layers),
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
    problems += [
        f"fusion.timesteps: {timestep} given; {allowed}"
        for timestep in config.fusion.timesteps
        if timestep > last
    ]
    if config.observation.source == "teacher" and not 0 <= config.observation.timestep <= last:
        problems.append(f"observation.timestep: {config.observation.timestep} given; {allowed}")
    layers = config.teacher.layers or card.default_layers
    if not layers:
        names = ", ".join(map(repr, card.layers_available[:12]))
        problems.append(
            "teacher.layers: this teacher has no layer of its own choice; name one, such as "
            f"{names or '(it has none)'}"
        )
    problems += [
        f"teacher.layers: {sentence}" for sentence in unknown_layers(layers, card.layers_available)
    ]
    channels, height, width = bank_shape
    if channels != card.channels:
        problems.append(
            f"teacher.model: the images have {_channels(channels)}, the teacher takes "
            f"{card.channels}{_remedy(channels, card.channels)}"
        )
    where, seen = "data.image_size: the images are", f"{height}x{width}"
    if config.teacher.image_size is not None:
        height = width = config.teacher.image_size
        where, seen = "teacher.image_size: the teacher is shown", f"{height}x{width}"
    trained = f"{card.image_size}x{card.image_size}"
    if card.fixed_size and (height, width) != (card.image_size, card.image_size):
        problems.append(
            f"{where} {seen}, but the teacher takes {trained} alone; teacher.image_size "
            f"{card.image_size} shows them to it so"
        )
    elif height % card.side_divisor or width % card.side_divisor:
        problems.append(
            f"{where} {seen}, but the teacher halves them until "
            f"each side must be a multiple of {card.side_divisor}; it was trained on {trained}"
        )
    if problems:
        raise ConfigError(problems)


def _loader(family: str) -> Callable[..., Any]:
    load: Callable[..., Any] = look_up("teacher family", family, TEACHERS)
    if family in TEACHERS:
        return load
    try:
        if isinstance(load, nn.Module):
            raise TypeError("it is a module itself")
        inspect.signature(load).bind(TeacherConfig(), device="cpu")
    except TypeError as error:
        raise WrongPartError(
            f"teacher family '{family}': it is called as load(config, device=...) and returns the "
            f"teacher, which this cannot be ({error})"
        ) from error
    except ValueError:
        pass  # written in C, without a signature to read
    return load


def _remedy(have: int, wanted: int) -> str:
    return f"; data.channels {wanted} converts them" if {have, wanted} == {1, 3} else ""


def _checked(loaded: object, family: str) -> Teacher:
    if not isinstance(loaded, Teacher):
        raise WrongPartError(
            f"teacher family '{family}': its loader must return a Teacher "
            f"(repfusion_env.teachers.base) or an nn.Module, not {type(loaded).__name__}"
        )
    return loaded


def _channels(count: int) -> str:
    return f"{count} channel{'' if count == 1 else 's'}"
