"""Stable Diffusion and its like: the cut forward, the empty prompt, the latents, no labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from latent_models import save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import repfusion_env  # noqa: F401 (registers the environment)
from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import TeacherError, describe_teacher, load_teacher
from repfusion_env.teachers.detect import family_of
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.reading.level_maps import grid_of
from repfusion_env.teachers.reading.network import NetworkTeacher

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TAPS = {
    "sd": ("mid_block.resnets.1", "down_blocks.0.attentions.0", "up_blocks.1.attentions.1"),
    "sdxl": ("mid_block.attentions.0", "up_blocks.0"),
    "classes": ("mid_block.resnets.0", "up_blocks.1.resnets.0"),
    "pixels": ("mid_block.resnets.1", "up_blocks.1.resnets.0"),
}
TOKENS = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder_of


@pytest.fixture
def copy_of(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        return Path(shutil.copytree(saved(kind), tmp_path / kind))

    return copy


def teacher_of(folder: Path, *layers: str, **options: Any) -> NetworkTeacher:
    teacher = load_teacher(TeacherConfig(model=str(folder), layers=layers, **options), device="cpu")
    assert isinstance(teacher, NetworkTeacher)
    return teacher


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherConfig(model=str(folder), **options), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def batch(height: int = 16, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(3, 3, height, width, generator=generator) * 2 - 1
    return images, torch.tensor([0, 250, 999])


def library_forward(
    kind: str, folder: Path, images: Tensor, timesteps: Tensor, layers: tuple[str, ...]
) -> dict[str, Any]:
    """What the whole network of the library's own pipeline gives, called as the pipeline does."""
    import diffusers

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    seen: dict[str, Any] = {}
    for layer in layers:
        unet.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: seen.__setitem__(layer, output)
        )
    count, size = len(images), tuple(images.shape[2:])
    arguments: dict[str, Any] = {"encoder_hidden_states": None}
    with torch.no_grad():
        if kind == "sd":
            pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
            text, _ = pipeline.encode_prompt("", "cpu", count, False)
            arguments["encoder_hidden_states"] = text
        elif kind == "sdxl":
            pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
            text, _, pooled, _ = pipeline.encode_prompt(
                "", num_images_per_prompt=count, do_classifier_free_guidance=False
            )
            times = pipeline._get_add_time_ids(size, (0, 0), size, text.dtype, 12)
            added = {"text_embeds": pooled, "time_ids": times.repeat(count, 1)}
            arguments = {"encoder_hidden_states": text, "added_cond_kwargs": added}
        elif kind == "pixels":
            pipeline = diffusers.IFPipeline.from_pretrained(folder, safety_checker=None)
            text, _ = pipeline.encode_prompt("", False, count)
            arguments["encoder_hidden_states"] = text
        else:
            unet.class_embedding.weight.zero_()
            arguments["class_labels"] = torch.zeros(count, dtype=torch.int64)
        if kind != "pixels":
            vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
            images = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        # The VAE hands its latents over with the channels last in memory, which rounds differently.
        unet(images.contiguous(), timesteps, **arguments)
    return {**seen, "clean": images}


@pytest.mark.parametrize("kind", TAPS)
@pytest.mark.parametrize("size", [(16, 16), (18, 12)])
def test_the_cut_forward_equals_that_of_the_librarys_pipeline(saved, kind, size):
    folder, (images, timesteps) = saved(kind), batch(*size)
    layers = (*TAPS[kind], TOKENS) if kind == "sd" else TAPS[kind]
    expected = library_forward(kind, folder, images, timesteps, layers)
    teacher = teacher_of(folder, *layers)
    clean = teacher.encode(images)
    torch.testing.assert_close(clean, expected["clean"], rtol=0, atol=0)
    for one in (teacher, teacher_of(folder, layers[0])):
        features = one.features(clean, timesteps)
        for layer in one.layers:
            output = expected[layer][0] if isinstance(expected[layer], tuple) else expected[layer]
            if layer == TOKENS:
                output = output.transpose(1, 2).reshape(3, 8, size[0] // 2, size[1] // 2)
            assert torch.equal(features[layer], output), layer


def test_the_default_layer_ends_the_mid_block_and_needs_no_decoder(saved):
    for kind, last in zip(TAPS, (1, 1, 0, 1), strict=True):
        teacher = teacher_of(saved(kind))
        assert family_of(TeacherConfig(model=str(saved(kind)))) == "unet2d_condition"
        assert teacher.layers == (f"mid_block.resnets.{last}",)
        assert 0 < teacher.parameters_used < 0.6 * teacher.parameters_all
        assert (teacher.channels, teacher.image_size) == (3, 8 if kind == "pixels" else 16)


def test_text_is_never_taken_for_a_map(saved):
    card = describe_teacher(TeacherConfig(model=str(saved("sd"))))
    block = f"{TOKENS}.attn"
    assert {f"{block}1.to_k", f"{block}2.to_q", f"{block}2"} <= set(card.layers_available)
    assert not {f"{block}2.to_k", f"{block}2.to_v"} & set(card.layers_available)


def test_grids_follow_from_the_number_of_tokens():
    assert grid_of(20, (10, 8), 3) == (5, 4)
    assert grid_of(6, (10, 8), 3) == (3, 2)  # rounded up
    assert grid_of(4, (10, 8), 3) == (2, 2)  # rounded down
    assert grid_of(20, (8, 10), 3) == (4, 5)
    assert grid_of(7, (10, 8), 3) is None
    assert grid_of(20, (10, 8), 0) is None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_latents_are_noised_as_the_scheduler_does(saved, copy_of, prediction):
    from diffusers import DDIMScheduler

    folder = copy_of("sd")
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        rescale_betas_zero_snr=prediction == "v_prediction",
    )
    scheduler.save_pretrained(folder / "scheduler")
    teacher, (images, timesteps) = teacher_of(folder), batch()
    clean = teacher.encode(images)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        teacher.add_noise(clean, noise, timesteps),
        scheduler.add_noise(clean, noise, timesteps),
        rtol=0,
        atol=0,
    )
    assert teacher.process.prediction == prediction


def test_latents_with_a_mean_of_their_own_are_standardized_by_it(copy_of):
    folder, (images, _) = copy_of("sd"), batch()
    plain = teacher_of(folder).encode(images)
    config = json.loads((folder / "vae/config.json").read_text())
    mean, deviation = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 3.0, 4.0]
    config |= {"latents_mean": mean, "latents_std": deviation, "scaling_factor": 0.5}
    (folder / "vae/config.json").write_text(json.dumps(config))
    expected = torch.stack(
        [(plain[:, c] / 0.18215 - mean[c]) * 0.5 / deviation[c] for c in range(4)], 1
    )
    torch.testing.assert_close(teacher_of(folder).encode(images), expected, rtol=1e-4, atol=1e-6)


def test_the_environment_steps_on_latents(saved, tiny):
    tiny["teacher"] = {"model": str(saved("sd")), "standardize_images": 8}
    tiny["data"] |= {"train_limit": 16, "heldout_limit": 8}
    tiny["data"]["path"] = str(_color_bank(saved("sd")))
    tiny["data"]["name"] = "npz"
    env = gym.make_vec("RepFusion-v0", num_envs=4, config=tiny)
    env.reset(seed=0)
    _, reward, *_ = env.step(torch.tensor([0, 1, 2, 3]))
    assert torch.isfinite(torch.as_tensor(reward)).all()
    env.close()


def _color_bank(folder: Path) -> Path:
    import numpy as np

    path, numbers = folder / "bank.npz", np.random.default_rng(0)
    if not path.exists():
        images = numbers.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
        np.savez(path, images=images, labels=np.arange(40) % 3)
    return path


def test_a_label_reaches_no_teacher(copy_of):
    folder, (images, timesteps) = copy_of("classes"), batch()
    before = teacher_of(folder, "up_blocks.1")
    clean = before.encode(images)
    expected = before.features(clean, timesteps)["up_blocks.1"]
    weights = load_file(folder / WEIGHTS)
    weights["class_embedding.weight"].fill_(float("nan"))
    save_file(weights, folder / WEIGHTS)
    after = teacher_of(folder, "up_blocks.1").features(clean, timesteps)["up_blocks.1"]
    assert after.isfinite().all()
    assert torch.equal(after, expected)


def test_weights_behind_the_deepest_layer_are_never_read(saved, monkeypatch):
    read: list[str] = []
    original = WeightFiles.read
    monkeypatch.setattr(
        WeightFiles, "read", lambda self, name: (read.append(name), original(self, name))[1]
    )
    teacher = teacher_of(saved("sd"))
    behind = ("up_blocks", "conv_norm_out", "conv_out", "decoder", "post_quant_conv")
    assert not [name for name in read if name.startswith(behind)]
    held = {name for name, _ in teacher.network.named_parameters()}
    held |= {name for name, _ in teacher.encoder.vae.named_parameters()}
    assert set(read) == held
    assert len(read) == len(set(read))
    read.clear()
    teacher_of(saved("sd"), "conv_in")
    from_unet = [name for name in read if not name.startswith(("encoder.", "quant_conv."))]
    # Time comes first in its forward.
    assert {name.split(".")[0] for name in from_unet} == {"time_embedding", "conv_in"}


def test_the_fingerprint_tells_text_encoders_apart(copy_of):
    folder = copy_of("sd")
    before = teacher_of(folder).fingerprint
    assert teacher_of(folder).fingerprint == before
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("final_layer_norm.bias"))
    save_file({**weights, name: weights[name] + 1}, path, metadata={"format": "pt"})
    assert teacher_of(folder).fingerprint != before


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_less_memory_changes_no_feature(saved, kind):
    folder, (images, timesteps) = saved(kind), batch()
    layer = "mid_block.resnets.1"
    whole = teacher_of(folder)
    clean = whole.encode(images)
    expected = whole.features(clean, timesteps)[layer]
    for options in ({"batch_size": 2}, {"offload": "cpu"}, {"offload": "cpu", "batch_size": 1}):
        teacher = teacher_of(folder, **options)
        torch.testing.assert_close(teacher.encode(images), clean, rtol=1e-5, atol=1e-6)
        given = teacher.features(clean, timesteps)[layer]
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close_and_halves_the_memory(saved, precision):
    folder, (images, timesteps) = saved("sdxl"), batch()
    whole, half = teacher_of(folder), teacher_of(folder, precision=precision)
    clean = whole.encode(images)
    expected = whole.features(clean, timesteps)["mid_block.resnets.1"]
    given = half.features(clean, timesteps)["mid_block.resnets.1"]
    error = float((given - expected).abs().max() / expected.std())
    assert 1e-6 < error < (0.15 if precision == "bf16" else 0.02)
    assert {value.element_size() for value in half.network.parameters()} == {2}
    # The VAE says of itself that it overflows in float16.
    wanted = torch.float32 if precision == "fp16" else torch.bfloat16
    assert half.encoder.dtype == wanted


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_latent_model_without_its_vae(copy_of):
    folder = copy_of("sd")
    shutil.rmtree(folder / "vae")
    assert "has no VAE: its denoiser works on latents" in refusal(folder)


def test_models_that_want_more_than_a_noised_image(copy_of):
    folder = copy_of("sd")
    edit(folder / "unet/config.json", in_channels=9)
    said = refusal(folder)
    assert "takes 9 channels, but its VAE gives latents of 4; models that inpaint" in said
    edit(folder / "unet/config.json", in_channels=4, addition_embed_type="image")
    assert "addition_embed_type 'image', which wants more than an image" in refusal(folder)
    edit(folder / "unet/config.json", addition_embed_type=None, class_embed_type="projection")
    assert "class_embed_type 'projection'" in refusal(folder)
    edit(folder / "unet/config.json", class_embed_type=None, class_embeddings_concat=True)
    assert "its class embedding cannot be switched off" in refusal(folder)


def test_text_encoders_of_another_model(copy_of, saved):
    folder = copy_of("sdxl")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(saved("sdxl") / "text_encoder_2", folder / "text_encoder")
    edit(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])
    assert "encoder_hidden_states as 1x8x48, but its denoiser takes 1xTx40" in refusal(folder)


def test_incomplete_weights_and_wrong_names(copy_of):
    folder = copy_of("sd")
    assert "no layer 'mid_block.resnet.1'" in refusal(folder, layers=("mid_block.resnet.1",))
    assert "family 'unet2d_condition' has no 'noise'" in refusal(folder, options={"noise": "x"})
    weights = load_file(folder / WEIGHTS)
    del weights["up_blocks.0.resnets.0.conv1.weight"]
    save_file(weights, folder / WEIGHTS)
    assert "lacks weights up_blocks.0.resnets.0.conv1.weight" in refusal(folder)
