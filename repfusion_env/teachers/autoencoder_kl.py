"""A variational autoencoder as a teacher: diffusers' ``AutoencoderKL``, encoder and decoder.

The model is a folder with the VAE alone, or a pipeline whose ``vae/`` is read because
``teacher.family`` says so. It knows no timesteps, so they are noise levels: DDPM's, on the pixels
that the encoder sees, or with ``teacher.options`` ``{noise: latents}`` on the scaled latents that
the decoder sees, as a latent diffusion model noises them. With ``env.action: layer`` the action is
the layer instead.

Between encoder and decoder stands the mean of the posterior, so that one image has one feature.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError
from repfusion_env.teachers.files.attention_names import current_names
from repfusion_env.teachers.files.model_files import ModelFiles, find_model
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.reading.family import known_trace, side_of, take_options
from repfusion_env.teachers.reading.latents import load_encoder, posterior_mean, vae_factor
from repfusion_env.teachers.reading.level_maps import level_map
from repfusion_env.teachers.reading.network import NetworkTeacher, Plan, load_network
from repfusion_env.teachers.reading.noise_process import noise_levels
from repfusion_env.teachers.reading.tracing import Trace

OPTIONS = {"noise": ("pixels", "latents")}
DEFAULT_LAYERS = {
    "pixels": "encoder.mid_block.resnets.1",
    "latents": "decoder.mid_block.resnets.1",
}


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load an ``AutoencoderKL``, frozen, as far as the layers need it.

    Raises:
        TeacherError: Files are missing or damaged, it is another kind of model, an option is
            unknown, or it has no such layer.
    """
    files, settings, noise = _read(config)
    plan = _plan(files, settings, noise)
    if config.precision == "fp16" and settings.get("force_upcast", True):
        config = replace(config, precision="fp32")  # it overflows in half precision, as it says
    teacher = load_network(
        plan,
        lambda shapes: WeightFiles(files.model, files.weights("vae"), current_names(shapes)),
        noise_levels(),
        config,
        _card(plan, settings, noise),
        _trace(plan, settings, noise),
        encoder=load_encoder(config, files, settings) if noise == "latents" else None,
        description=json.dumps([settings, noise], sort_keys=True),
    )
    return teacher.to(device)


def describe(config: TeacherConfig) -> TeacherCard:
    """Read the configuration file and build the network without memory for its weights.

    Raises:
        TeacherError: See :func:`load`.
    """
    files, settings, noise = _read(config)
    return _card(_plan(files, settings, noise), settings, noise)


def _read(config: TeacherConfig) -> tuple[ModelFiles, dict[str, Any], str]:
    noise = take_options(config, "autoencoder_kl", OPTIONS)["noise"]
    files = find_model(config.model, config.revision)
    settings = files.config("vae")
    kind = settings.get("_class_name")
    if kind != "AutoencoderKL":
        raise TeacherError(
            f"teacher '{files.model}' is a {kind or 'model of unknown class'}; "
            "family 'autoencoder_kl' takes an AutoencoderKL"
        )
    if noise == "latents" and settings.get("latents_mean"):
        raise TeacherError(
            f"teacher '{files.model}': its config.json gives latents_mean, so its latents have no "
            "one scale for noise; teacher.options.noise 'pixels' reads it"
        )
    return files, settings, noise


def _plan(files: ModelFiles, settings: dict[str, Any], noise: str) -> Plan:
    side = side_of(files.model, {"sample_size": 32, **settings})
    factor = vae_factor(settings)
    levels = len(settings.get("block_out_channels", (64,))) - 1
    build = partial(_build, settings)
    to_map = partial(level_map, levels=levels)
    if noise == "latents":
        shape = (int(settings.get("latent_channels", 4)), max(side // factor, 1))
        return Plan(files.model, build, _decode, (shape[0], shape[1], shape[1]), to_map)
    shape = (int(settings.get("in_channels", 3)), side)
    return Plan(files.model, build, _encode_and_decode, (shape[0], side, side), to_map)


def _trace(plan: Plan, settings: dict[str, Any], noise: str) -> Trace:
    return known_trace(plan, [settings, noise])


def _card(plan: Plan, settings: dict[str, Any], noise: str) -> TeacherCard:
    found = _trace(plan, settings, noise)
    factor = vae_factor(settings)
    return TeacherCard(
        channels=int(settings.get("in_channels", 3)),
        image_size=plan.input_shape[1] * (factor if noise == "latents" else 1),
        num_timesteps=len(noise_levels()),
        layers_available=tuple(found.shapes),
        side_divisor=factor,
        default_layers=(DEFAULT_LAYERS[noise],),
        trace=found,
    )


def _build(settings: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(settings)


def _encode_and_decode(vae: Any, images: Tensor, _conditions: Tensor) -> Tensor:
    return _decode_unscaled(vae, posterior_mean(vae, images))


def _decode(vae: Any, latents: Tensor, _conditions: Tensor) -> Tensor:
    settings = vae.config
    scaled = latents / (settings.scaling_factor or 1.0) + (settings.shift_factor or 0.0)
    return _decode_unscaled(vae, scaled)


def _decode_unscaled(vae: Any, latents: Tensor) -> Tensor:
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    return vae.decoder(latents)
