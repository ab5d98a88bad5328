"""A VAE as a teacher: encoder and decoder features, noise on pixels or on latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from latent_models import tiny_vae
from torch import Tensor

import repfusion_env  # noqa: F401 (registers the environment)
from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import TeacherError, describe_teacher, load_teacher
from repfusion_env.teachers.detect import family_of
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.reading.network import NetworkTeacher

ENCODER, DECODER = "encoder.mid_block.resnets.1", "decoder.mid_block.resnets.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    tiny_vae(in_channels=1, out_channels=1, shift_factor=0.3).save_pretrained(path)
    return path


def teacher_of(folder: Path, *layers: str, **options: Any) -> NetworkTeacher:
    config = TeacherConfig(model=str(folder), layers=layers, **options)
    assert config.family == "autoencoder_kl" or family_of(config) == "autoencoder_kl"
    teacher = load_teacher(config, device="cpu")
    assert isinstance(teacher, NetworkTeacher)
    return teacher


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(3, 1, 16, 8, generator=generator) * 2 - 1, torch.tensor([0, 300, 999])


def library_forward(
    folder: Path, inputs: Tensor, layers: tuple[str, ...], *, latents: bool
) -> dict[str, Tensor]:
    """The library's own whole forward; ``sample_posterior=False`` takes the mode."""
    vae = AutoencoderKL.from_pretrained(folder).eval()
    seen: dict[str, Tensor] = {}
    for layer in layers:
        vae.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: seen.__setitem__(layer, output)
        )
    with torch.no_grad():
        if latents:
            vae.decode(inputs / vae.config.scaling_factor + vae.config.shift_factor)
        else:
            vae(inputs, sample_posterior=False)
    return seen


def test_encoder_and_decoder_are_read_as_the_library_runs_them(folder):
    images, timesteps = batch()
    layers = (ENCODER, "encoder.down_blocks.0.resnets.0", "encoder.mid_block.attentions.0.to_q")
    for chosen in (layers, (DECODER, "decoder.up_blocks.0.resnets.1", ENCODER)):
        expected = library_forward(folder, images, chosen, latents=False)
        features = teacher_of(folder, *chosen).features(images, timesteps)
        for layer in chosen:
            output = expected[layer]
            if output.ndim == 3:
                output = output.transpose(1, 2).reshape(3, 16, 8, 4)
            assert torch.equal(features[layer], output), layer


def test_noise_is_put_on_pixels_or_on_scaled_latents(folder):
    images, timesteps = batch()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    teacher = teacher_of(folder)
    assert teacher.layers == (ENCODER,)
    assert torch.equal(teacher.encode(images), images)
    noised = teacher.add_noise(images, noise, timesteps)
    torch.testing.assert_close(
        noised, scheduler.add_noise(images, noise, timesteps), rtol=0, atol=2e-5
    )
    expected = library_forward(folder, noised, (ENCODER,), latents=False)[ENCODER]
    assert torch.equal(teacher.features(noised, timesteps)[ENCODER], expected)

    teacher = teacher_of(folder, options={"noise": "latents"})
    assert teacher.layers == (DECODER,)
    clean = teacher.encode(images)
    vae = AutoencoderKL.from_pretrained(folder).eval()
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(clean, (mode - 0.3) * 0.18215, rtol=1e-6, atol=1e-7)
    noised = teacher.add_noise(clean, torch.randn_like(clean), timesteps)
    expected = library_forward(folder, noised, (DECODER,), latents=True)[DECODER]
    given = teacher.features(noised, timesteps)[DECODER]
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    # The timestep is the noise's level alone: the network is told nothing of it.
    assert torch.equal(teacher.features(noised, timesteps.flip(0))[DECODER], given)


def test_no_more_is_read_than_the_layers_need(folder, monkeypatch):
    read: list[str] = []
    original = WeightFiles.read
    monkeypatch.setattr(
        WeightFiles, "read", lambda self, name: (read.append(name), original(self, name))[1]
    )
    encoder = teacher_of(folder)
    assert {name.split(".")[0] for name in read} == {"encoder"}
    assert not [name for name in read if "conv_out" in name]
    assert encoder.parameters_used < 0.5 * encoder.parameters_all
    read.clear()
    teacher_of(folder, options={"noise": "latents"})
    parts = {name.split(".")[0] for name in read}
    assert parts == {"encoder", "quant_conv", "post_quant_conv", "decoder"}
    assert not [name for name in read if name.startswith(("decoder.up", "decoder.conv_out"))]


def test_less_memory_changes_no_feature(folder):
    images, timesteps = batch()
    expected = teacher_of(folder, DECODER).features(images, timesteps)[DECODER]
    for options in ({"batch_size": 2}, {"offload": "cpu"}, {"precision": "fp16"}):
        # fp16 is computed in float32: the model says of itself that it overflows.
        given = teacher_of(folder, DECODER, **options).features(images, timesteps)[DECODER]
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    half = teacher_of(folder, DECODER, precision="bf16").features(images, timesteps)[DECODER]
    assert 1e-6 < float((half - expected).abs().max() / expected.std()) < 0.2


def test_the_vae_of_a_pipeline_is_read_where_the_family_says_so(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X"}))
    images, timesteps = batch()
    for options in ({}, {"noise": "latents"}):
        one = teacher_of(tmp_path, family="autoencoder_kl", options=options)
        other = teacher_of(folder, options=options)
        clean = other.encode(images)
        layer = other.layers[0]
        assert torch.equal(
            one.features(one.encode(images), timesteps)[layer],
            other.features(clean, timesteps)[layer],
        )


def test_the_environment_chooses_among_its_layers(folder, tiny):
    layers = [ENCODER, "encoder.down_blocks.0.resnets.0"]
    tiny["teacher"] = {"model": str(folder), "standardize_images": 16, "layers": layers}
    tiny["timesteps"] = [100]
    tiny["env"]["action"] = "layer"
    env = gym.make_vec("RepFusion-v0", num_envs=4, config=tiny)
    env.reset(seed=0)
    _, reward, *_ = env.step(torch.tensor([0, 1, 1, 0]))
    assert torch.isfinite(torch.as_tensor(reward)).all()
    env.close()


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(TeacherError) as caught:
        describe_teacher(TeacherConfig(model=str(folder), family="autoencoder_kl", **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_models_and_options(folder, tmp_path):
    assert "'latent' given; allowed: 'pixels', 'latents'. Did you mean 'latents'?" in refusal(
        folder, options={"noise": "latent"}
    )
    assert "takes an AutoencoderKL" in refusal(Path("digits"))
    changed = json.loads((folder / "config.json").read_text()) | {"latents_mean": [0.0] * 4}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert "no one scale for noise" in refusal(tmp_path, options={"noise": "latents"})
    with pytest.raises(TeacherError, match=r"no layer 'encoder.mid_block'.*"):
        load_teacher(
            TeacherConfig(
                model=str(folder), options={"noise": "latents"}, layers=("encoder.mid_block",)
            ),
            device="cpu",
        )
