"""Normalizing flows read at their steps: Glow (Kingma & Dhariwal, 2018).

A model is a folder with ``config.json`` (``{"_class_name": "Glow", "channels": 3, "image_size": 32,
"levels": 3, "steps": 32, "hidden": 512, "bits": 8}``) and ``model.safetensors``, as
:func:`repfusion_env.teachers.networks.glow.save_flow` writes it. Layers: ``levels.1.3`` is the
output of the fourth step of the second level, ``levels.1.3.coupling.5`` its coupling network.

A flow keeps all of the image at every depth; what changes is how it is laid out. It knows no
timesteps: the action's timestep is a noise level on the pixels
(:func:`repfusion_env.teachers.reading.noise_process.noise_levels`; 0 is all but clean), or, under
``env.action layer``, its place is taken by the depth of the flow.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError
from repfusion_env.teachers.files.model_files import ModelFiles, find_model
from repfusion_env.teachers.files.network_folder import read_settings
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.networks.glow import Glow, GlowSettings
from repfusion_env.teachers.reading.family import known_trace, no_options
from repfusion_env.teachers.reading.network import NetworkTeacher, Plan, load_network
from repfusion_env.teachers.reading.noise_process import noise_levels
from repfusion_env.teachers.reading.tracing import Trace, plain_map


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load a flow, frozen, as far as the layers need it.

    Raises:
        TeacherError: Files are missing or damaged, weights and configuration do not fit together,
            or it has no such layer.
    """
    files, settings = _open(config)
    plan = _plan(files.model, settings)
    found = known_trace(plan, ["Glow", asdict(settings)])
    return load_network(
        plan,
        lambda _shapes: WeightFiles(files.model, files.weights()),
        noise_levels(),
        config,
        _card(settings, found),
        found,
        description=json.dumps(["Glow", asdict(settings)]),
    ).to(device)


def describe(config: TeacherConfig) -> TeacherCard:
    """Read the configuration and build the flow without memory for its weights.

    Raises:
        TeacherError: See :func:`load`.
    """
    files, settings = _open(config)
    return _card(settings, known_trace(_plan(files.model, settings), ["Glow", asdict(settings)]))


def _open(config: TeacherConfig) -> tuple[ModelFiles, GlowSettings]:
    no_options(config, "flow")
    files = find_model(config.model, config.revision)
    if files.file is not None:
        raise TeacherError(
            f"teacher '{config.model}' is a file; family 'flow' takes a folder with config.json "
            "and model.safetensors"
        )
    settings = GlowSettings(**read_settings(files, "Glow", asdict(GlowSettings())))
    if settings.image_size % 2**settings.levels:
        raise TeacherError(
            f"teacher '{config.model}': its config.json gives images of side "
            f"{settings.image_size}, which {settings.levels} levels cannot halve"
        )
    return files, settings


def _plan(model: str, settings: GlowSettings) -> Plan:
    shape = (settings.channels, settings.image_size, settings.image_size)
    return Plan(model, partial(Glow, settings), _run, shape, to_map=_to_map)


def _card(settings: GlowSettings, found: Trace) -> TeacherCard:
    return TeacherCard(
        channels=settings.channels,
        image_size=settings.image_size,
        num_timesteps=len(noise_levels()),
        layers_available=tuple(found.shapes),
        side_divisor=2**settings.levels,
        # The end of the middle level: the first mixes neighbours only, the last ends in noise.
        default_layers=(f"levels.{settings.levels // 2}.{settings.steps - 1}",),
        trace=found,
    )


def _to_map(output: Any, input_shape: tuple[int, ...]) -> Tensor | None:
    """A step returns its map and the log-determinant so far."""
    return plain_map(output[0] if isinstance(output, tuple) else output, input_shape)


def _run(network: nn.Module, images: Tensor, _conditions: Tensor) -> Any:
    return network(images)
