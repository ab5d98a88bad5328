"""From pixels to the latents of a VAE, for denoisers that work on these.

Shape letters: N lanes, C,H,W image, c,h,w latents.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherError
from repfusion_env.teachers.files.attention_names import current_names
from repfusion_env.teachers.files.model_files import ModelFiles
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.reading.family import known_trace
from repfusion_env.teachers.reading.network import DTYPES, Plan, filled
from repfusion_env.teachers.reading.offload import CpuOffload


class LatentEncoder:
    """The encoder of an ``AutoencoderKL``: mean of the posterior, scaled as the denoiser wants it.

    Args:
        vae: With the weights of its encoder.
        settings: Its configuration: ``scaling_factor`` and ``shift_factor``.
        offload: Where its weights wait in main memory: how they visit the device.
    """

    def __init__(
        self, vae: nn.Module, settings: Mapping[str, Any], *, offload: CpuOffload | None = None
    ) -> None:
        self.vae = vae
        self.scale, self.shift = latent_scale(settings)
        self.offload = offload
        self.dtype = next(vae.parameters()).dtype

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> latents (N, c, h, w), float32, without gradients."""
        with torch.inference_mode():
            latents = posterior_mean(self.vae, images.to(self.dtype))
        return (latents.to(torch.float32, copy=True) - self.shift) * self.scale

    def to(self, device: torch.device | str) -> LatentEncoder:
        """Move to ``device``; offloaded weights visit it layer by layer."""
        (self.offload or self.vae).to(device)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)
        return self


def latent_scale(settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Scale and shift of ``(latents - shift) * scale``, float32, each () or (1, c, 1, 1)."""
    scale = torch.tensor(float(settings.get("scaling_factor") or 1.0))
    shift = torch.tensor(float(settings.get("shift_factor") or 0.0))
    if settings.get("latents_mean") and settings.get("latents_std"):
        # A few VAEs say mean and deviation of their latents by channel instead.
        shift = torch.tensor(settings["latents_mean"]).float().view(1, -1, 1, 1)
        scale = scale / torch.tensor(settings["latents_std"]).float().view(1, -1, 1, 1)
    return scale, shift


def posterior_mean(vae: Any, images: Tensor) -> Tensor:
    """Mean of ``q(latents | images)``: the mode, so that one image has one latent."""
    moments: Tensor = vae.encoder(images)
    if vae.quant_conv is not None:
        moments = vae.quant_conv(moments)
    return moments.chunk(2, dim=1)[0]


def vae_settings(files: ModelFiles) -> dict[str, Any]:
    """The configuration of a model's VAE.

    Raises:
        TeacherError: It has none, or one of another class.
    """
    if not files.has("vae"):
        raise TeacherError(
            f"teacher '{files.model}' has no VAE: its denoiser works on latents, and there is no "
            "'vae/config.json' to encode images by"
        )
    settings = files.config("vae")
    kind = settings.get("_class_name")
    if kind != "AutoencoderKL":
        raise TeacherError(
            f"teacher '{files.model}': its vae is a {kind}; an AutoencoderKL is needed"
        )
    return settings


def vae_factor(settings: Mapping[str, Any]) -> int:
    """Pixels by which one latent position is wide and high."""
    return 2 ** (len(settings.get("block_out_channels", (64,))) - 1)


def vae_plan(model: str, settings: dict[str, Any]) -> Plan:
    """How the encoder of a VAE is built and run."""
    factor = vae_factor(settings)
    side = factor * math.ceil(32 / factor)
    return Plan(
        model, partial(_build, settings), _run, (int(settings.get("in_channels", 3)), side, side)
    )


def load_encoder(
    config: TeacherConfig, files: ModelFiles, settings: dict[str, Any] | None = None
) -> LatentEncoder:
    """The encoder of a model's VAE; its decoder is never read from the file.

    Args:
        config: Precision and memory.
        files: Of the model.
        settings: Of the VAE; default: those that its subfolder must hold.

    Raises:
        TeacherError: There is no VAE, or its weights are damaged or another network's.
    """
    settings = vae_settings(files) if settings is None else settings
    plan = vae_plan(files.model, settings)
    found = known_trace(plan, settings)
    dtype = DTYPES[config.precision]
    if dtype == torch.float16 and settings.get("force_upcast", True):
        dtype = torch.float32  # this VAE overflows in half precision, as its configuration says

    def open_weights(shapes: Container[str]) -> WeightFiles:
        return WeightFiles(files.model, files.weights("vae"), current_names(shapes))

    vae: Any = filled(plan, open_weights, found.touched, dtype)
    return LatentEncoder(
        vae,
        # With the defaults of what old files leave out: the scaling factor among them.
        dict(vae.config),
        offload=CpuOffload(vae, found.users) if config.offload == "cpu" else None,
    )


def _build(settings: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(settings)


def _run(vae: nn.Module, images: Tensor, _conditions: Tensor) -> Tensor:
    return posterior_mean(vae, images)
