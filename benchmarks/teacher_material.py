"""One model of each family of teachers, with random weights, saved as its family has it on disk.

Speed and memory do not depend on the values of weights, so nothing has to be downloaded. The
architectures are real ones, some narrower than what is published so that a CPU can run them.

Shape letters: T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.material import DDPM_CIFAR10_SCHEDULER, DDPM_CIFAR10_UNET

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "latent_channels": 4,
    "sample_size": 256,
}
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Model:
    """One model of the comparison.

    Attributes:
        family: As ``teacher.family``.
        name: What it is, for the table.
        make: Saves it into a folder and returns what ``teacher.model`` is given.
        options: As ``teacher.options``.
        images: In one batch.
        side: Of the images in pixels; default: that of the card.
    """

    family: str
    name: str
    make: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)
    images: int = 8
    side: int | None = None


def _unet2d(folder: Path) -> Path:
    from diffusers import DDPMScheduler, UNet2DModel

    UNet2DModel(**DDPM_CIFAR10_UNET).save_pretrained(folder)
    DDPMScheduler(**DDPM_CIFAR10_SCHEDULER).save_pretrained(folder)
    return folder


def _edm(folder: Path) -> Path:
    from diffusers import EDMEulerScheduler

    _unet2d(folder)
    EDMEulerScheduler().save_pretrained(folder)
    return folder


def _guided(folder: Path) -> Path:
    """A checkpoint in the layout of 64x64_diffusion.pt, at half its width."""
    from diffusers import UNet2DModel

    from repfusion_env.teachers.networks.guided_layout import (
        QKV,
        Architecture,
        modules,
        unet_config,
    )

    architecture = Architecture(
        in_channels=3,
        out_channels=6,
        embedded=96,
        widths=(96, 192, 288, 384),
        blocks=3,
        attention=(False, True, True, True),
        residual_resampling=True,
        scale_shift=True,
        classes=1000,
    )
    weights = UNet2DModel.from_config(unet_config(architecture, 64, 32)).state_dict()
    saved: dict[str, Tensor] = {"label_emb.weight": torch.randn(1000, 4 * 96)}
    for module in modules(architecture):
        for leaf in ("weight", "bias"):
            if not module.weights:
                continue
            if module.ours.endswith(QKV):
                attention = module.ours.removesuffix(f".{QKV}")
                saved[f"{module.theirs}.{leaf}"] = torch.cat(
                    [weights[f"{attention}.to_{letter}.{leaf}"] for letter in "qkv"]
                )[..., None]
            elif f"{module.ours}.{leaf}" in weights:
                saved[f"{module.theirs}.{leaf}"] = weights[f"{module.ours}.{leaf}"]
    for name in list(saved):
        if name.endswith("proj_out.weight"):
            saved[name] = saved[name][..., None]
        if "qkv.bias" in name:
            saved[name] = saved[name].flatten()
    path = folder / "64x64_diffusion.pt"
    torch.save(saved, path)
    return path


def _latent_parts(folder: Path, latents: int = 4, **vae: Any) -> None:
    from diffusers import AutoencoderKL

    settings = {**VAE, "latent_channels": latents, "block_out_channels": (32, 64, 128, 128), **vae}
    AutoencoderKL(**settings).save_pretrained(folder / "vae")


def _prompt(folder: Path, width: int, **others: Tensor) -> None:
    from safetensors.torch import save_file

    tensors = {"encoder_hidden_states": torch.randn(1, TEXT_TOKENS, width), **others}
    save_file(tensors, folder / "empty_prompt.safetensors")


def _ddim(folder: Path) -> None:
    from diffusers import DDIMScheduler

    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(folder / "scheduler")


def _flow_matching(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")


def _stable_diffusion(folder: Path, widths: tuple[int, ...], vae: tuple[int, ...]) -> Path:
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(
        sample_size=32 if widths[0] < 320 else 64,
        block_out_channels=widths,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=32,
    ).half().save_pretrained(folder / "unet")
    _latent_parts(folder, block_out_channels=vae)
    _ddim(folder)
    _prompt(folder, 768)
    return folder


def _narrow_diffusion(folder: Path) -> Path:
    return _stable_diffusion(folder, (96, 192, 384, 384), (32, 64, 128, 128))


def stable_diffusion(folder: Path) -> Path:
    """The architecture of Stable Diffusion 1.5: 860 M parameters and 84 M of its VAE."""
    return _stable_diffusion(folder, (320, 640, 1280, 1280), (128, 256, 512, 512))


def _dit(folder: Path) -> Path:
    from diffusers import DiTTransformer2DModel

    DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).save_pretrained(folder / "transformer")
    _latent_parts(folder)
    _ddim(folder)
    return folder


def _pixart(folder: Path) -> Path:
    from diffusers import PixArtTransformer2DModel

    PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        sample_size=32,
        patch_size=2,
        cross_attention_dim=384,
        caption_channels=512,
        use_additional_conditions=False,
    ).save_pretrained(folder / "transformer")
    _latent_parts(folder)
    _ddim(folder)
    mask = torch.zeros(1, TEXT_TOKENS, dtype=torch.int64)
    mask[:, 0] = 1
    _prompt(folder, 512, encoder_attention_mask=mask)
    return folder


def _sd3(folder: Path) -> Path:
    from diffusers import SD3Transformer2DModel

    SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        num_layers=8,
        attention_head_dim=64,
        num_attention_heads=6,
        joint_attention_dim=512,
        caption_projection_dim=384,
        pooled_projection_dim=256,
        out_channels=16,
        pos_embed_max_size=64,
    ).save_pretrained(folder / "transformer")
    _latent_parts(folder, 16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06)
    _flow_matching(folder)
    _prompt(folder, 512, pooled_projections=torch.randn(1, 256))
    return folder


def _flux(folder: Path) -> Path:
    from diffusers import FluxTransformer2DModel

    FluxTransformer2DModel(
        in_channels=64,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=6,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    ).save_pretrained(folder / "transformer")
    _latent_parts(folder, 16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    _flow_matching(folder)
    _prompt(folder, 512, pooled_projections=torch.randn(1, 256))
    return folder


def _autoencoder(folder: Path) -> Path:
    from diffusers import AutoencoderKL

    settings = {**VAE, "block_out_channels": (64, 128, 256, 256), "sample_size": 128}
    AutoencoderKL(**settings).save_pretrained(folder)
    return folder


def _gan(folder: Path) -> Path:
    from repfusion_env.teachers.files.network_folder import save_network
    from repfusion_env.teachers.networks.dcgan import DCGAN, GanSettings

    widths = {"discriminator": (64, 128, 256, 512), "generator": (512, 256, 128, 64)}
    settings = GanSettings(channels=3, latent=100, encoder=widths["discriminator"], **widths)
    config = {"_class_name": "DCGAN", "channels": 3, "latent": 100}
    lists = {name: list(getattr(settings, name)) for name in (*widths, "encoder")}
    save_network(
        DCGAN(settings, ("discriminator", "generator", "encoder")), {**config, **lists}, folder
    )
    return folder


def _flow(folder: Path) -> Path:
    from repfusion_env.teachers.networks.glow import Glow, GlowSettings, save_flow

    save_flow(Glow(GlowSettings(channels=3, image_size=32, levels=3, steps=8, hidden=256)), folder)
    return folder


def _timm(folder: Path) -> Path:
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("resnet50"), str(folder), safe_serialization=True)
    return folder


MODELS = (
    Model("unet2d", "ddpm-cifar10-32's UNet2DModel", _unet2d, images=16),
    Model("edm", "the same under an EDM scheduler", _edm, images=16),
    Model(
        "guided_diffusion",
        "64x64_diffusion.pt at half width",
        _guided,
        {"num_head_channels": 32, "attention_order": "new", "noise_schedule": "cosine"},
    ),
    Model(
        "unet2d_condition",
        "Stable Diffusion 1.5, narrow, at 256x256",
        _narrow_diffusion,
        images=4,
    ),
    Model("dit", "DiT-S/2 at 256x256", _dit, images=4),
    Model("pixart", "PixArt of DiT-S's width at 256x256", _pixart, images=4),
    Model("sd3", "MMDiT of 8 blocks at 256x256", _sd3, images=4),
    Model("flux", "Flux of 4 + 8 blocks at 256x256", _flux, images=4, side=256),
    Model(
        "autoencoder_kl", "Stable Diffusion's VAE at half width, 128x128", _autoencoder, images=4
    ),
    Model("gan", "DCGAN, discriminator", _gan, images=32),
    Model("gan", "DCGAN, generator behind an encoder", _gan, {"part": "generator"}, 32),
    Model("flow", "Glow, 3 levels of 8 steps", _flow),
    Model("timm", "ResNet-50", _timm),
)
