"""DiT, PixArt, SD3 and Flux: what all transformer denoisers have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

import repfusion_env  # noqa: F401 (registers the environment)
from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import describe_teacher, load_teacher
from repfusion_env.teachers.detect import family_of
from repfusion_env.teachers.reading.network import NetworkTeacher
from repfusion_env.teachers.reading.token_maps import middle_of

LAST = {
    "flux": "single_transformer_blocks.1",
    "flux_guided": "single_transformer_blocks.1",
}
EMBEDDINGS = {"flux": "x_embedder", "flux_guided": "x_embedder"}
CASES = ("dit", "dit_old", "pixart", "pixart_sized", "sd3", "sd3_dual", "flux", "flux_guided")
FAMILIES = ("dit", "pixart", "sd3", "flux")


def teacher_of(folder: Path, *layers: str, **options: Any) -> NetworkTeacher:
    teacher = load_teacher(TeacherConfig(model=str(folder), layers=layers, **options), device="cpu")
    assert isinstance(teacher, NetworkTeacher)
    return teacher


def batch(channels: int, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, channels, height, width, generator=generator), torch.tensor([0, 250, 999])


def told(folder: Path, timesteps: Tensor) -> Tensor:
    """What the pipelines of diffusers tell the network of a timestep."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if DDIMScheduler.load_config(folder / "scheduler")["_class_name"] == "DDIMScheduler":
        return timesteps
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return scheduler.timesteps.sort().values[timesteps]


def library_forward(
    case: str, folder: Path, latents: Tensor, timesteps: Tensor, layers: tuple[str, ...]
) -> dict[str, Tensor]:
    """Tokens (N, T, F) of the library's own, whole forward, called as its pipelines call it."""
    import diffusers
    from diffusers import FluxPipeline
    from safetensors.torch import load_file

    kinds = {
        "dit": diffusers.DiTTransformer2DModel,
        "pixart": diffusers.PixArtTransformer2DModel,
        "sd3": diffusers.SD3Transformer2DModel,
        "flux": diffusers.FluxTransformer2DModel,
    }
    family = case.split("_")[0]
    network = kinds[family].from_pretrained(folder / "transformer").eval()
    for value in network.parameters():
        # Out of the mapped file: an odd address may add up in another order.
        value.data = value.data.clone()
    tokens: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            tokens[name] = output[1] if isinstance(output, tuple) else output

        return hook

    for layer in layers:
        network.get_submodule(layer).register_forward_hook(keep(layer))
    # What the network's own output is made of: the image's tokens behind the last block.
    network.norm_out.register_forward_pre_hook(
        lambda _module, inputs: tokens.__setitem__("norm_out", inputs[0])
    )
    count, height, width = len(latents), *latents.shape[2:]
    conditions = told(folder, timesteps)
    prompt: dict[str, Tensor] = {}
    if family != "dit":
        saved = load_file(folder / "empty_prompt.safetensors")
        prompt = {key: torch.cat([value] * count) for key, value in saved.items()}
    with torch.no_grad():
        if family == "dit":
            network(latents, conditions, class_labels=torch.tensor([10] * count))
        elif family == "pixart":
            size = {"resolution": None, "aspect_ratio": None}
            if case == "pixart_sized":
                # Pixels: the VAE of these tests halves an image once.
                size = {
                    "resolution": torch.tensor([[2.0 * height, 2.0 * width]] * count),
                    "aspect_ratio": torch.tensor([[height / width]] * count),
                }
            network(latents, timestep=conditions, added_cond_kwargs=size, **prompt)
        elif family == "sd3":
            network(latents, timestep=conditions, **prompt)
        else:
            channels = latents.shape[1]
            text = prompt["encoder_hidden_states"].shape[1]
            network(
                FluxPipeline._pack_latents(latents, count, channels, height, width),
                timestep=conditions / 1000,
                img_ids=FluxPipeline._prepare_latent_image_ids(
                    count, height // 2, width // 2, "cpu", torch.float32
                ),
                txt_ids=torch.zeros(text, 3),
                guidance=torch.tensor([3.5] * count) if case == "flux_guided" else None,
                **prompt,
            )
    return tokens


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.reshape(len(tokens), height, width, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=["trained", "wider"])
def test_the_cut_forward_equals_the_full_one_to_the_last_bit(transformer_folder, case, size):
    folder = transformer_folder(case)
    default = describe_teacher(TeacherConfig(model=str(folder))).default_layers[0]
    last = LAST.get(case, "transformer_blocks.2")
    layers = (EMBEDDINGS.get(case, "pos_embed"), "transformer_blocks.0.ff", default, last)
    latents, timesteps = batch(4, *size)
    if case.startswith("dit") and size != (8, 8):
        # The library's DiT cannot put a wide output together; its blocks can.
        latents, size = batch(4, 12, 12)[0], (12, 12)
    expected = library_forward(case, folder, latents, timesteps, layers)
    features = teacher_of(folder, *layers).features(latents, timesteps)
    assert tuple(features) == layers
    for layer in layers:
        wanted = as_map(expected[layer], size[0] // 2, size[1] // 2)
        assert torch.equal(features[layer], wanted), layer
        assert features[layer].dtype == torch.float32
    assert torch.equal(features[last], as_map(expected["norm_out"], size[0] // 2, size[1] // 2))
    # One layer alone, so that the forward ends there; and the layer of no choice is this one.
    assert torch.equal(teacher_of(folder).features(latents, timesteps)[default], features[default])


@pytest.mark.parametrize(
    ("case", "default"),
    [
        ("dit", "transformer_blocks.1"),
        ("pixart", "transformer_blocks.1"),
        ("sd3", "transformer_blocks.1"),
        ("flux", "single_transformer_blocks.0"),
    ],
)
def test_the_middle_block_is_read_and_what_lies_behind_it_is_not(transformer_folder, case, default):
    folder = transformer_folder(case)
    teacher = teacher_of(folder)
    assert teacher.layers == (default,)
    assert teacher.parameters_used < teacher.parameters_all
    assert teacher.parameters_used == sum(p.numel() for p in teacher.network.parameters())
    assert not list(teacher.network.proj_out_2.parameters() if case == "dit" else
                    teacher.network.proj_out.parameters())  # fmt: skip


def test_the_middle_is_counted_over_both_stacks_and_is_the_earlier_of_two():
    # 57 blocks of FLUX.1: the 29th is the tenth of the second stack.
    assert middle_of(("double", 19), ("single", 38)) == "single.9"
    assert middle_of(("blocks", 28)) == "blocks.13"
    assert middle_of(("blocks", 1)) == "blocks.0"


@pytest.mark.parametrize("case", FAMILIES)
def test_the_family_is_told_by_the_files_and_the_card_needs_no_weights(
    transformer_folder, tmp_path, case
):
    import shutil

    folder = tmp_path / "bare"
    shutil.copytree(
        transformer_folder(case), folder, ignore=shutil.ignore_patterns("diffusion_*.safetensors")
    )
    config = TeacherConfig(model=str(folder))
    assert family_of(config) == case
    card = describe_teacher(config)
    side = 256 if case == "flux" else 16
    assert (card.channels, card.image_size, card.side_divisor) == (1, side, 4)
    assert (card.num_timesteps, card.fixed_size) == (1000, False)
    # Neither text, nor attention heads, nor vectors are maps of the image.
    for stranger in ("context_embedder", "caption_projection", "time_text_embed", "ff_context"):
        assert not [layer for layer in card.layers_available if stranger in layer]
    assert not [layer for layer in card.layers_available if "norm_q" in layer]


def test_the_old_class_name_tells_two_families_apart(transformer_folder, tmp_path):
    import json
    import shutil

    assert family_of(TeacherConfig(model=str(transformer_folder("dit_old")))) == "dit"
    old = tmp_path / "old"
    shutil.copytree(transformer_folder("pixart"), old)
    path = old / "transformer" / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "_class_name": "Transformer2DModel"})
    )
    assert family_of(TeacherConfig(model=str(old))) == "pixart"
    latents, timesteps = batch(4)
    for ours, same in zip(
        teacher_of(old).features(latents, timesteps).values(),
        teacher_of(transformer_folder("pixart")).features(latents, timesteps).values(),
        strict=True,
    ):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_patch_of_the_latents_has_its_own_place_in_the_map(transformer_folder, case):
    layer = EMBEDDINGS.get(case, "pos_embed")
    teacher = teacher_of(transformer_folder(case), layer)
    latents, timesteps = batch(4, 8, 12)
    changed = latents.clone()
    changed[:, :, 2:4, 8:10] += 1
    before, after = (teacher.features(value, timesteps)[layer] for value in (latents, changed))
    moved = (before != after).any(1)
    assert moved[:, 1, 4].all()
    assert int(moved.sum()) == len(latents)


@pytest.mark.parametrize("case", FAMILIES)
def test_latents_are_those_of_the_vae_scaled_and_shifted(transformer_folder, case):
    from diffusers import AutoencoderKL

    folder = transformer_folder(case)
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
    scale, shift = {
        "dit": (0.18215, 0.0),  # not in the file of old models: the class's own default
        "pixart": (0.13025, 0.0),
        "sd3": (1.5305, 0.0609),
        "flux": (0.3611, 0.1159),
    }[case]
    assert (vae.quant_conv is None) == (case in ("sd3", "flux"))
    latents = teacher_of(folder).encode(images)
    assert latents.shape == (3, 4, 8, 8)
    torch.testing.assert_close(latents, (mode - shift) * scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", FAMILIES)
def test_noise_is_that_of_the_schedulers(transformer_folder, case):
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    folder = transformer_folder(case)
    clean, timesteps = batch(4)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    if case in ("dit", "pixart"):
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        expected = scheduler.add_noise(clean, noise, timesteps)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        expected = scheduler.scale_noise(clean, told(folder, timesteps), noise)
    teacher = teacher_of(folder)
    torch.testing.assert_close(teacher.add_noise(clean, noise, timesteps), expected)
    assert (teacher.snr(torch.arange(1000)).diff() < 0).all()


@pytest.mark.parametrize("case", FAMILIES)
def test_an_environment_steps_with_it(transformer_folder, tiny, case):
    tiny["teacher"] = {"model": str(transformer_folder(case)), "standardize_images": 8}
    env = gym.make_vec("RepFusion-v0", num_envs=4, config=tiny)
    env.reset(seed=0)
    _, rewards, *_ = env.step(torch.tensor([0, 1, 2, 4]))
    assert rewards.shape == (4,)
    assert torch.isfinite(torch.as_tensor(rewards)).all()
    env.close()
