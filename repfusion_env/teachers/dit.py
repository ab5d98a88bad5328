"""Denoisers on latents in diffusers' ``DiTTransformer2DModel``: DiT (Peebles & Xie, 2023).

They were trained on classes, with one class more for "no class", which classifier-free guidance
asks for; a teacher is always told that one. Older folders name the class ``Transformer2DModel``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard
from repfusion_env.teachers.files.model_files import find_model
from repfusion_env.teachers.reading.family import no_options, side_of
from repfusion_env.teachers.reading.network import NetworkTeacher
from repfusion_env.teachers.reading.noise_process import process_of
from repfusion_env.teachers.reading.prompted_run import Prompt
from repfusion_env.teachers.reading.token_maps import (
    LatentTransformer,
    middle_of,
    positive,
    transformer_settings,
)

KINDS = ("DiTTransformer2DModel", "Transformer2DModel")


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load a DiT, its VAE's encoder and its scheduler, frozen, as far as the layers need them.

    Raises:
        TeacherError: Files are missing or damaged, they do not fit together, it is another kind of
            model, or it has no such layer.
    """
    return _transformer(config).load(config).to(device)


def describe(config: TeacherConfig) -> TeacherCard:
    """Read the configuration files and build the network without memory for its weights.

    Raises:
        TeacherError: See :func:`load`.
    """
    return _transformer(config).card()


def _transformer(config: TeacherConfig) -> LatentTransformer:
    no_options(config, "dit")
    files = find_model(config.model, config.revision)
    settings = transformer_settings(files, "dit", KINDS, "ada_norm_zero")
    return LatentTransformer(
        files,
        settings,
        process_of(files.scheduler(), config.model),
        _build,
        _run,
        channels=positive(files, settings, "in_channels", 4),
        side=side_of(config.model, {"sample_size": 32, **settings}),
        patch=positive(files, settings, "patch_size", 2),
        middle=middle_of(("transformer_blocks", positive(files, settings, "num_layers", 28))),
    )


def _build(settings: dict[str, Any]) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_config(settings)


def _run(network: Any, latents: Tensor, conditions: Tensor, _prompt: Prompt) -> Any:
    # Labels never reach a teacher: the row behind those of the classes means "no class".
    none = network.config.num_embeds_ada_norm
    labels = torch.full((len(latents),), none, device=latents.device)
    return network(latents, conditions, class_labels=labels, return_dict=False)
