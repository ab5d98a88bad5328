from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import TeacherError, describe_teacher, load_teacher
from repfusion_env.teachers.networks.dcgan import DCGAN, GanSettings, save_gan

SETTINGS = GanSettings(
    channels=1, latent=6, discriminator=(8, 12), generator=(10, 8), encoder=(6, 10)
)
LATENT, GENERATED = "encoder.main.5", "generator.main.2"


def example_discriminator(widths: tuple[int, ...], outputs: int, *last: nn.Module) -> nn.Sequential:
    """The discriminator of PyTorch's DCGAN example, for one channel and other widths."""
    modules: list[nn.Module] = [nn.Conv2d(1, widths[0], 4, 2, 1, bias=False)]
    modules.append(nn.LeakyReLU(0.2, inplace=True))
    for before, after in itertools.pairwise(widths):
        modules.append(nn.Conv2d(before, after, 4, 2, 1, bias=False))
        modules += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*modules, nn.Conv2d(widths[-1], outputs, 4, 1, 0, bias=False), *last)


def example_generator() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(6, 10, 4, 1, 0, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(True),
        nn.ConvTranspose2d(10, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(True),
        nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Sequential]:
    """Trained-looking networks of the example, in inference mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {
            "discriminator": example_discriminator((8, 12), 1, nn.Sigmoid()),
            "generator": example_generator(),
            "encoder": example_discriminator((6, 10), 6),
        }
        for network in made.values():
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean, std=0.1)
                    nn.init.uniform_(module.running_var, 0.02, 0.1)
            network.eval()
    return made


@pytest.fixture
def folder(networks, tmp_path) -> Path:
    """The folder that family 'gan' reads, written by way of our own network."""
    whole = DCGAN(SETTINGS)
    whole.load_state_dict(
        {
            f"{part}.main.{name}": value
            for part, network in networks.items()
            for name, value in network.state_dict().items()
        }
    )
    save_gan(whole, tmp_path / "gan")
    return tmp_path / "gan"


@pytest.fixture
def checkpoint(networks, tmp_path):
    """Writes one network as the example does."""

    def write(part: str, change: Any = None) -> Path:
        weights = {f"main.{name}": value for name, value in networks[part].state_dict().items()}
        if change is not None:
            change(weights)
        torch.save(weights, tmp_path / "net.pth")
        return tmp_path / "net.pth"

    return write


def teacher_of(model: Path, *layers: str, **settings: Any) -> Any:
    return load_teacher(TeacherConfig(model=str(model), layers=layers, **settings), device="cpu")


def images_of(side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(4, 1, side, side, generator=generator) * 2 - 1
    return images, torch.tensor([0, 5, 500, 999])


def after(network: nn.Sequential, last: int, inputs: Tensor) -> Tensor:
    """Output of module ``last``, and of none behind it."""
    with torch.no_grad():
        output: Tensor = network[: last + 1](inputs)
        return output


def test_the_discriminator_equals_the_example_to_the_last_bit(networks, folder, checkpoint):
    images, timesteps = images_of()
    for model in (folder, checkpoint("discriminator")):
        teacher = teacher_of(model)
        assert teacher.layers == ("discriminator.main.4",)
        assert (teacher.channels, teacher.image_size) == (1, 16)
        assert torch.equal(teacher.encode(images), images)
        both = teacher_of(model, "discriminator.main.3", "discriminator.main.4")
        features = both.features(images, timesteps)
        for index in (3, 4):
            expected = after(networks["discriminator"], index, images)
            assert torch.equal(features[f"discriminator.main.{index}"], expected)
        single = teacher.features(images, timesteps)["discriminator.main.4"]
        assert torch.equal(single, features["discriminator.main.4"])
        assert teacher.parameters_used == teacher.parameters_all - 12 * 16
        # Larger images have larger maps.
        assert teacher.features(*images_of(32))["discriminator.main.4"].shape == (4, 12, 8, 8)


def test_the_generator_is_read_at_the_images_latent(networks, folder):
    images, timesteps = images_of()
    teacher = teacher_of(folder, options={"part": "generator"})
    assert teacher.layers == (GENERATED,)
    latents = after(networks["encoder"], 5, images)
    expected = after(networks["generator"], 2, latents)
    feature = teacher.features(images, timesteps)[GENERATED]
    assert torch.equal(feature, expected)
    assert float(feature.std()) > 0
    both = teacher_of(folder, LATENT, GENERATED, options={"part": "generator"})
    assert torch.equal(both.features(images, timesteps)[LATENT], latents)
    card = describe_teacher(TeacherConfig(model=str(folder), options={"part": "generator"}))
    assert card.fixed_size
    assert teacher.parameters_used < teacher.parameters_all


def test_nothing_is_told_of_the_timestep_but_noise(folder):
    images, timesteps = images_of()
    teacher = teacher_of(folder)
    one = teacher.features(images, timesteps)["discriminator.main.4"]
    assert torch.equal(one, teacher.features(images, timesteps.flip(0))["discriminator.main.4"])
    ratio = teacher.snr(torch.tensor([0, 999]))
    assert ratio[0] > 9000
    assert ratio[1] < 1e-4


def test_an_environment_chooses_between_the_layers_of_a_discriminator(tiny, folder):
    layers = ["discriminator.main.1", "discriminator.main.4"]
    settings = {**tiny, "teacher": {"model": str(folder), "layers": layers}}
    settings |= {"env": {"action": "layer"}, "timesteps": {"values": [0]}}
    env = gym.make_vec("repfusion_env:RepFusion-v0", num_envs=4, config="debug", **settings)
    env.reset(seed=0)
    assert env.single_action_space.n == 2
    assert env.step([0, 1, 0, 1])[1].isfinite().all()
    env.close()


def edit(folder: Path, **changes: Any) -> Path:
    content = {**asdict(SETTINGS), "_class_name": "DCGAN", **changes}
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def refusal(model: Path, **settings: Any) -> str:
    with pytest.raises(TeacherError) as caught:
        teacher_of(model, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_generator_without_an_encoder_is_refused(folder, checkpoint):
    generator = {"options": {"part": "generator"}}
    assert "the image's latent is unknown" in refusal(checkpoint("generator"))
    assert "holds a discriminator" in refusal(checkpoint("discriminator"), **generator)
    assert "the image's latent is unknown" in refusal(edit(folder, encoder=None), **generator)
    assert "no widths of a generator; it has discriminator, encoder" in refusal(
        edit(folder, generator=None), **generator
    )


def test_configurations_that_make_no_sense_are_refused(folder):
    assert "images of side 8, its generator makes such of side 16" in refusal(
        edit(folder, encoder=[4]), options={"part": "generator"}
    )
    assert "must be a list of positive whole numbers" in refusal(edit(folder, discriminator=[0]))
    assert "latent 'wide'; it must be a positive whole number" in refusal(
        edit(folder, latent="wide")
    )
    assert "gives 'chanels', which a DCGAN does not have. Did you mean 'channels'" in refusal(
        edit(folder, chanels=3)
    )
    assert "options.part: 'critic' given" in refusal(folder, options={"part": "critic"})
    assert "is a Glow, not a DCGAN" in refusal(edit(folder, _class_name="Glow"), family="gan")


def test_weights_of_another_network_are_refused(folder, checkpoint):
    assert "wrong shape of weights discriminator.main.0.weight" in refusal(
        edit(folder, discriminator=[9, 12])
    )
    edit(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["discriminator.main.5.weight"]
    save_file(weights, path)
    assert "lacks weights discriminator.main.5.weight" in refusal(folder)

    def without_last(weights: dict[str, Tensor]) -> None:
        del weights["main.5.weight"]

    def without_mean(weights: dict[str, Tensor]) -> None:
        del weights["main.3.running_mean"]

    assert "weights" in refusal(checkpoint("discriminator", without_last))
    assert "lacks weights discriminator.main.3.running_mean" in refusal(
        checkpoint("discriminator", without_mean)
    )
    assert "no checkpoint of a DCGAN" in refusal(checkpoint("discriminator", dict.clear))
