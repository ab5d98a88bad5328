from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

ModelMaker = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path) -> ModelMaker:
    """Saves a small random UNet2DModel and its scheduler in diffusers' layout."""

    def make(
        *, name: str = "model", subfolders: bool = False, safe: bool = True, **arguments: Any
    ) -> Path:
        defaults: dict[str, Any] = {
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (8, 16, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DModel(**{**defaults, **arguments})
        folder = tmp_path / name
        unet.save_pretrained(folder / "unet" if subfolders else folder, safe_serialization=safe)
        scheduler = DDPMScheduler(num_train_timesteps=1000)
        scheduler.save_pretrained(folder / "scheduler" if subfolders else folder)
        return folder

    return make


def _transformer(case: str) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A small random network of diffusers, and the shapes of the embeddings that it is told."""
    import diffusers

    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    text = {"encoder_hidden_states": (1, 5, 20)}
    pooled = {**text, "pooled_projections": (1, 12)}
    told = {"joint_attention_dim": 20, "pooled_projection_dim": 12}
    if case.startswith("dit"):
        return diffusers.DiTTransformer2DModel(
            **heads, num_layers=3, sample_size=8, out_channels=8, num_embeds_ada_norm=10
        ), {}
    if case.startswith("pixart"):
        return diffusers.PixArtTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=8,
            num_layers=3,
            sample_size=8,
            cross_attention_dim=24,
            caption_channels=20,
            use_additional_conditions=case == "pixart_sized",
        ), {**text, "encoder_attention_mask": (1, 5)}
    if case.startswith("sd3"):
        dual = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
        return diffusers.SD3Transformer2DModel(
            **heads,
            **told,
            **(dual if case == "sd3_dual" else {}),
            num_layers=3,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            caption_projection_dim=16,
            pos_embed_max_size=12,
        ), pooled
    return diffusers.FluxTransformer2DModel(
        **told,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=case == "flux_guided",
    ), pooled


# Scaling and shift of the published VAEs; those of DiT's time leave it to the class.
_LATENTS: dict[str, dict[str, Any]] = {
    "dit": {},
    "pixart": {"scaling_factor": 0.13025},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False},
}


@pytest.fixture(scope="session")
def transformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a small random transformer denoiser of 1x16x16 images with all that belongs to it.

    A case is a family, or a family and a variant of it: "dit_old", "pixart_sized", "sd3_dual",
    "flux_guided". Its files are shared: copy them before changing one.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    folders: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case in folders:
            return folders[case]
        folder = folders[case] = tmp_path_factory.mktemp(case)
        family = case.split("_")[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, shapes = _transformer(case)
            vae = AutoencoderKL(
                in_channels=1,
                out_channels=1,
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
                **_LATENTS[family],
            )
            prompt = {name: torch.randn(shape) for name, shape in shapes.items()}
        network.save_pretrained(folder / "transformer")
        vae.save_pretrained(folder / "vae")
        if "encoder_attention_mask" in prompt:
            prompt["encoder_attention_mask"] = torch.tensor([[1, 1, 0, 0, 0]])
        if prompt:
            save_file(prompt, folder / "empty_prompt.safetensors")
        if family in ("dit", "pixart"):
            DDIMScheduler().save_pretrained(folder / "scheduler")
        else:
            shift = {"sd3": 3.0, "flux": 1.0}[family]
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
            scheduler.save_pretrained(folder / "scheduler")
        if family == "dit":
            _drop(folder / "vae" / "config.json", "scaling_factor")
        if case == "dit_old":
            path = folder / "transformer" / "config.json"
            settings = {**json.loads(path.read_text()), "_class_name": "Transformer2DModel"}
            path.write_text(json.dumps(settings))
        return folder

    return make


def _drop(path: Path, key: str) -> None:
    settings = json.loads(path.read_text())
    del settings[key]
    path.write_text(json.dumps(settings))
