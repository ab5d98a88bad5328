"""Denoisers on latents in diffusers' ``FluxTransformer2DModel``: FLUX.1.

First two streams of tokens, the text's and the image's, attend to each other, then they go on as
one stream; the features are those of the image's tokens, at the blocks of either. A token is a
patch of 2x2 latents. The noise is that of flow matching, and timestep 0 is the least noisy of the
scheduler's. They are told of an empty prompt, by its sequence of T5 embeddings and by its pooled
CLIP embedding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError
from repfusion_env.teachers.files.model_files import find_model
from repfusion_env.teachers.reading.family import take_options
from repfusion_env.teachers.reading.network import NetworkTeacher
from repfusion_env.teachers.reading.noise_process import process_of
from repfusion_env.teachers.reading.prompted_run import Prompt
from repfusion_env.teachers.reading.token_maps import (
    LatentTransformer,
    middle_of,
    positive,
    transformer_settings,
)

KINDS = ("FluxTransformer2DModel",)
PATCH = 2
# Flux has positions of any size; its pipeline draws latents of this side where none is named.
SIDE = 128
# Of the networks that were distilled from guided ones: the guidance that diffusers asks them for.
GUIDANCE = 3.5
# Timesteps are thousandths to this network, and what it is told is multiplied by this again.
TIMESTEPS = 1000


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load a Flux, its VAE's encoder and its scheduler, frozen, as far as the layers need them.

    The text encoders are loaded, asked for the embeddings of the empty prompt, and dropped.
    ``teacher.options.guidance``: what a guidance-distilled network is told of the guidance.

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
    options = take_options(config, "flux", {"guidance": GUIDANCE})
    files = find_model(config.model, config.revision)
    settings = transformer_settings(files, "flux", KINDS)
    packed = positive(files, settings, "in_channels", 64)
    if packed % PATCH**2 or settings.get("patch_size", 1) != 1:
        raise TeacherError(
            f"teacher '{config.model}': its config.json gives in_channels {packed} and patch_size "
            f"{settings.get('patch_size', 1)}; family 'flux' packs {PATCH}x{PATCH} latents into "
            f"one token, so a multiple of {PATCH**2} and 1 are needed"
        )
    text = positive(files, settings, "joint_attention_dim", 4096)
    pooled = positive(files, settings, "pooled_projection_dim", 768)
    return LatentTransformer(
        files,
        settings,
        process_of(files.scheduler(), config.model),
        _build,
        partial(_run, guidance=float(options["guidance"])),
        channels=packed // PATCH**2,
        side=SIDE,
        patch=PATCH,
        middle=middle_of(
            ("transformer_blocks", positive(files, settings, "num_layers", 19)),
            ("single_transformer_blocks", positive(files, settings, "num_single_layers", 38)),
        ),
        prompt_shapes=lambda tokens: {
            "encoder_hidden_states": (1, tokens, text),
            "pooled_projections": (1, pooled),
        },
    )


def _build(settings: dict[str, Any]) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_config(settings)


def _run(
    network: Any, latents: Tensor, conditions: Tensor, prompt: Prompt, *, guidance: float
) -> Any:
    text = prompt["encoder_hidden_states"]
    told = None
    if network.config.guidance_embeds:
        told = torch.full((len(latents),), guidance, device=latents.device)
    return network(
        packed(latents),
        timestep=conditions / TIMESTEPS,
        guidance=told,
        encoder_hidden_states=text,
        pooled_projections=prompt["pooled_projections"],
        # Text tokens have no place.
        txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
        img_ids=places(latents),
        return_dict=False,
    )


def packed(latents: Tensor) -> Tensor:
    """Tokens of 2x2 latents: (N, c, H, W) -> (N, H/2 * W/2, 4c)."""
    return nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def places(latents: Tensor) -> Tensor:
    """Row and column of each token, behind a zero: (H/2 * W/2, 3)."""
    height, width = (side // PATCH for side in latents.shape[2:])
    rows = torch.arange(height, device=latents.device, dtype=torch.float32)
    columns = torch.arange(width, device=latents.device, dtype=torch.float32)
    grid = torch.cartesian_prod(rows, columns)
    return nn.functional.pad(grid, (1, 0))
