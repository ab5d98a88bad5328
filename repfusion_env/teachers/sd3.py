"""Denoisers on latents in diffusers' ``SD3Transformer2DModel``: Stable Diffusion 3 and 3.5.

Two streams of tokens, the text's and the image's, attend to each other (MMDiT; Esser et al., 2024);
the features are those of the image's. The noise is that of flow matching, and the timestep 0 is
the least noisy of the scheduler's. They are told of an empty prompt, by its sequence of CLIP and T5
embeddings and by its pooled CLIP embeddings.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError
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

KINDS = ("SD3Transformer2DModel",)


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load an SD3, its VAE's encoder and its scheduler, frozen, as far as the layers need them.

    The text encoders are loaded, asked for the embeddings of the empty prompt, and dropped.

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
    no_options(config, "sd3")
    files = find_model(config.model, config.revision)
    settings = transformer_settings(files, "sd3", KINDS)
    text = positive(files, settings, "joint_attention_dim", 4096)
    pooled = positive(files, settings, "pooled_projection_dim", 2048)
    return LatentTransformer(
        files,
        settings,
        process_of(files.scheduler(), config.model),
        _build,
        partial(_run, model=config.model),
        channels=positive(files, settings, "in_channels", 16),
        side=side_of(config.model, {"sample_size": 128, **settings}),
        patch=positive(files, settings, "patch_size", 2),
        middle=middle_of(("transformer_blocks", positive(files, settings, "num_layers", 18))),
        prompt_shapes=lambda tokens: {
            "encoder_hidden_states": (1, tokens, text),
            "pooled_projections": (1, pooled),
        },
    )


def _build(settings: dict[str, Any]) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_config(settings)


def _run(network: Any, latents: Tensor, conditions: Tensor, prompt: Prompt, *, model: str) -> Any:
    height, width = latents.shape[2:]
    known = network.pos_embed.pos_embed_max_size
    most = None if known is None else known * network.pos_embed.patch_size
    if most is not None and max(height, width) > most:
        raise TeacherError(
            f"teacher '{model}': it knows positions up to latents of {most}x{most}, and these are "
            f"{height}x{width}; teacher.image_size shows it smaller images"
        )
    return network(
        latents,
        timestep=conditions,
        encoder_hidden_states=prompt["encoder_hidden_states"],
        pooled_projections=prompt["pooled_projections"],
        return_dict=False,
    )
