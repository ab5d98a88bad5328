from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import TeacherError, describe_teacher, load_teacher
from repfusion_env.teachers.networks.glow import Glow, GlowSettings, save_flow

SETTINGS = GlowSettings(channels=1, image_size=16, levels=2, steps=2, hidden=8)


def random_flow(settings: GlowSettings = SETTINGS) -> Glow:
    """A flow none of whose parts is the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = Glow(settings)
        for name, parameter in flow.named_parameters():
            if "mixing" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data += 0.2 * torch.randn_like(parameter) / len(parameter) ** 0.5
    return flow.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("flow")
    save_flow(random_flow(), made)
    return made


def images_of(count: int = 3, side: int = 16, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, side, side, generator=generator) * 2 - 1


def teacher_of(folder: Path, *layers: str, **settings: Any) -> Any:
    return load_teacher(TeacherConfig(model=str(folder), layers=layers, **settings), device="cpu")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_inverse_gives_the_images_back(channels):
    flow = random_flow(replace(SETTINGS, channels=channels, levels=3)).double()
    images = images_of(channels=channels).double()
    with torch.no_grad():
        latents, log_det = flow(images)
    assert log_det is None
    assert sum(latent[0].numel() for latent in latents) == images[0].numel()
    torch.testing.assert_close(flow.inverse(latents), images, rtol=0, atol=1e-11)
    # It is no trivial map.
    assert float((latents[0].flatten() - images.flatten()[: latents[0].numel()]).std()) > 0.1


def test_the_log_determinant_is_that_of_autograds_jacobian():
    settings = GlowSettings(channels=2, image_size=4, levels=2, steps=2, hidden=5)
    flow = random_flow(settings).double()
    image = images_of(1, 4, 2).double()

    def flat(pixels: Tensor) -> Tensor:
        """From pixels in the flow's own range to all latents."""
        latents, _ = flow((pixels / flow.factor).view(1, 2, 4, 4))
        return torch.cat([latent.flatten() for latent in latents])

    jacobian = torch.autograd.functional.jacobian(flat, (image * flow.factor).flatten())
    expected = torch.linalg.slogdet(jacobian)[1]
    latents, log_det = flow(image, torch.zeros(1, dtype=torch.float64))
    assert log_det is not None
    torch.testing.assert_close(log_det[0], expected, rtol=0, atol=1e-10)
    assert abs(float(expected)) > 0.1
    normal = torch.distributions.Normal(0.0, 1.0)
    prior = sum(float(normal.log_prob(latent.detach()).sum()) for latent in latents)
    assert math.isclose(
        float(flow.log_likelihood(image)[0].detach()), prior + float(expected), rel_tol=1e-9
    )


def test_a_new_flow_only_rotates():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        images = images_of().double()
        flow = Glow(SETTINGS).double().eval()
        latents, log_det = flow(images, torch.zeros(3, dtype=torch.float64))
    lengths = sum(latent.square().sum((1, 2, 3)) for latent in latents)
    torch.testing.assert_close(
        lengths, (images * flow.factor).square().sum((1, 2, 3)), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(log_det, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-3)


def test_a_new_flow_learns_its_norms_from_the_first_batch_and_becomes_likelier():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = Glow(SETTINGS)
        images = images_of(16)
        before = float(flow.eval().log_likelihood(images).mean().detach())
        flow.train()
        first = flow.levels[0][0].norm  # type: ignore[index]
        flow(images)
        inputs = torch.nn.functional.pixel_unshuffle(images * flow.factor, 2)
        outputs = first(inputs)
        torch.testing.assert_close(outputs.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)
        optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
        for _ in range(20):
            loss = -flow.log_likelihood(images).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    # The images are uniform pixels: their true log-density is 0.
    assert before < -200
    assert float(flow.eval().log_likelihood(images).mean().detach()) > -20


def test_pixels_come_to_the_middles_of_their_bins():
    # 256 values on [-0.5, 0.5], each in the middle of its 1/256.
    values = torch.arange(256.0)
    pixels = values / 127.5 - 1
    torch.testing.assert_close(pixels * random_flow().factor, (values + 0.5) / 256 - 0.5)


def test_the_cut_forward_equals_the_full_one_to_the_last_bit(folder):
    layers = ("levels.0.0", "levels.0.1.coupling.5", "levels.1.1")
    images, timesteps = images_of(), torch.tensor([0, 10, 900])
    outputs: dict[str, Tensor] = {}
    flow = random_flow()
    for layer in layers:
        flow.get_submodule(layer).register_forward_hook(
            lambda _m, _i, output, layer=layer: outputs.update(
                {layer: output[0] if isinstance(output, tuple) else output}
            )
        )
    with torch.no_grad():
        flow(images)
    features = teacher_of(folder, *layers).features(images, timesteps)
    for layer in layers:
        assert torch.equal(features[layer], outputs[layer]), layer
    assert torch.equal(
        teacher_of(folder).features(images, timesteps)["levels.1.1"], outputs["levels.1.1"]
    )
    first = teacher_of(folder, "levels.0.0")
    assert first.parameters_used < first.parameters_all
    assert first.features(images, timesteps)["levels.0.0"].shape == (3, 4, 8, 8)
    half = teacher_of(folder, precision="bf16").features(images, timesteps)["levels.1.1"]
    assert 0 < float((half - outputs["levels.1.1"]).abs().max()) < 0.2


def test_the_card_says_what_the_flow_takes(folder):
    card = describe_teacher(TeacherConfig(model=str(folder)))
    assert (card.channels, card.image_size, card.side_divisor) == (1, 16, 4)
    assert card.default_layers == ("levels.1.1",)
    assert {"levels.0.0", "levels.0.1", "levels.1.0"} <= set(card.layers_available)


def test_an_environment_chooses_the_depth_of_the_flow(tiny, folder):
    layers = ["levels.0.1", "levels.1.1"]
    settings = {**tiny, "teacher": {"model": str(folder), "layers": layers}}
    settings |= {"env": {"action": "layer"}, "timesteps": {"values": [0]}}
    env = gym.make_vec("repfusion_env:RepFusion-v0", num_envs=4, config="debug", **settings)
    env.reset(seed=0)
    assert env.step([0, 1, 0, 1])[1].isfinite().all()
    env.close()


@pytest.mark.parametrize(
    ("changes", "settings", "sentence"),
    [
        ({"image_size": 6}, {}, "images of side 6, which 2 levels cannot halve"),
        ({"steps": 3}, {}, "lacks weights levels.0.2."),
        ({"hidden": 9}, {}, "has a wrong shape of weights"),
        ({"depth": 3}, {}, "gives 'depth', which a Glow does not have"),
        ({"levels": 0}, {}, "gives levels 0; it must be a positive whole number"),
        ({}, {"layers": ("levels.0",)}, "inside it there are 'levels.0.0"),
        ({}, {"options": {"steps": 3}}, "family 'flow' has no 'steps'"),
    ],
)
def test_wrong_folders_and_settings_end_in_one_sentence(
    folder, tmp_path, changes, settings, sentence
):
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(TeacherError) as caught:
        teacher_of(tmp_path, **settings) if "layers" not in settings else load_teacher(
            TeacherConfig(model=str(tmp_path), **settings), device="cpu"
        )
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
