"""Small random latent diffusion models, saved as diffusers saves its pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from text_parts import clip_encoder, clip_tokenizer, save_index, t5_encoder, t5_tokenizer

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def tiny_vae(**settings: Any) -> Any:
    from diffusers import AutoencoderKL

    defaults: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return AutoencoderKL(**{**defaults, **settings}).eval()


def tiny_unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return UNet2DConditionModel(**{**UNET, **settings}).eval()


def save_model(folder: Path, kind: str = "sd", **unet: Any) -> Path:
    """Saves a model of a kind: ``sd``, ``sdxl``, ``classes`` (no text at all) or ``pixels``."""
    from diffusers import DDIMScheduler

    noise = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    parts: dict[str, Any] = {"scheduler": noise}
    if kind != "pixels":
        parts["vae"] = tiny_vae()
    name = {
        "sd": "StableDiffusionPipeline",
        "sdxl": "StableDiffusionXLPipeline",
        "classes": "LatentPipeline",
        "pixels": "IFPipeline",
    }[kind]
    if kind in ("sd", "sdxl"):
        parts["tokenizer"] = clip_tokenizer(folder / "words")
        parts["text_encoder"] = clip_encoder(16)
    if kind == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None}
    elif kind == "sdxl":
        parts["tokenizer_2"] = parts["tokenizer"]
        parts["text_encoder_2"] = clip_encoder(24, projection=12, seed=1)
        unet = {
            "cross_attention_dim": 40,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 12 + 6 * 8,
            **unet,
        }
    elif kind == "classes":
        plain = {
            "down_block_types": ("DownBlock2D",) * 2,
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ("UpBlock2D",) * 2,
        }
        unet = {**plain, "num_class_embeds": 5, **unet}
    elif kind == "pixels":
        parts |= {"tokenizer": t5_tokenizer(), "text_encoder": t5_encoder(20)}
        unet = {
            "in_channels": 3,
            "out_channels": 6,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "encoder_hid_dim": 20,
            "encoder_hid_dim_type": "text_proj",
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 4,
            **unet,
        }
    parts["unet"] = tiny_unet(**unet)
    save_index(folder, name, parts)
    return folder
