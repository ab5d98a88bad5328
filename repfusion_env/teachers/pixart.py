"""Denoisers on latents in diffusers' ``PixArtTransformer2DModel``: PixArt-alpha and PixArt-Sigma.

They are told of an empty prompt, by cross-attention to its T5 embeddings (Chen et al., 2024, a and
b). The largest PixArt-alpha is told the size of its image in pixels as well, and is told that of
the image that it sees. Older folders name the class ``Transformer2DModel``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard
from repfusion_env.teachers.files.model_files import find_model
from repfusion_env.teachers.reading.family import no_options, side_of
from repfusion_env.teachers.reading.latents import vae_factor, vae_settings
from repfusion_env.teachers.reading.network import NetworkTeacher
from repfusion_env.teachers.reading.noise_process import process_of
from repfusion_env.teachers.reading.prompted_run import Prompt
from repfusion_env.teachers.reading.token_maps import (
    LatentTransformer,
    middle_of,
    positive,
    transformer_settings,
)

KINDS = ("PixArtTransformer2DModel", "Transformer2DModel")


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load a PixArt, its VAE's encoder and its scheduler, frozen, as far as the layers need them.

    The text encoder is loaded, asked for the embeddings of the empty prompt, and dropped.

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
    no_options(config, "pixart")
    files = find_model(config.model, config.revision)
    settings = transformer_settings(files, "pixart", KINDS, "ada_norm_single")
    heads = positive(files, settings, "num_attention_heads", 16)
    width = heads * positive(files, settings, "attention_head_dim", 72)
    # Without a projection of its own, the caption comes in the width of the image tokens.
    text = settings.get("caption_channels") or settings.get("cross_attention_dim") or width
    return LatentTransformer(
        files,
        settings,
        process_of(files.scheduler(), config.model),
        _build,
        partial(_run, pixels=vae_factor(vae_settings(files))),
        channels=positive(files, settings, "in_channels", 4),
        side=side_of(config.model, {"sample_size": 128, **settings}),
        patch=positive(files, settings, "patch_size", 2),
        middle=middle_of(("transformer_blocks", positive(files, settings, "num_layers", 28))),
        prompt_shapes=lambda tokens: {
            "encoder_hidden_states": (1, tokens, text),
            "encoder_attention_mask": (1, tokens),
        },
    )


def _build(settings: dict[str, Any]) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel.from_config(settings)


def _run(network: Any, latents: Tensor, conditions: Tensor, prompt: Prompt, *, pixels: int) -> Any:
    sized = network.use_additional_conditions
    return network(
        latents,
        timestep=conditions,
        encoder_hidden_states=prompt["encoder_hidden_states"],
        encoder_attention_mask=prompt["encoder_attention_mask"],
        added_cond_kwargs=_size(latents, pixels) if sized else None,
        return_dict=False,
    )


def _size(latents: Tensor, pixels: int) -> dict[str, Tensor]:
    """Height and width of the image in pixels (N, 2), and their ratio (N, 1)."""
    height, width = (pixels * side for side in latents.shape[2:])
    # Filled on the device itself: copying two numbers to it would wait for it.
    count = len(latents)
    sides = [latents.new_full((count, 1), float(side)) for side in (height, width)]
    return {
        "resolution": torch.cat(sides, 1),
        "aspect_ratio": latents.new_full((count, 1), height / width),
    }
