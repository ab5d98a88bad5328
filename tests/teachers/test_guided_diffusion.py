from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from guided_reference import Guided
from torch import Tensor

import repfusion_env  # noqa: F401  (registers the environment)
from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import TeacherError, describe_teacher, load_teacher
from repfusion_env.teachers.detect import family_of
from repfusion_env.teachers.guided_diffusion import main
from repfusion_env.teachers.reading.noise_process import edm

PUBLISHED_TAP = "middle_block.2.out_layers.3"
OPTIONS = {"image_size": 8, "num_head_channels": 16}


def saved(path: Path, **variant: Any) -> tuple[Path, Guided]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Guided(**variant).eval()
        for name, parameter in network.named_parameters():
            if "norm" in name or parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    weights = network.state_dict()
    if "label_emb.weight" in weights:
        weights = {**weights, "label_emb.weight": weights["label_emb.weight"] * math.nan}
    torch.save(weights, path)
    return path, network


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Guided]:
    folder = tmp_path_factory.mktemp("guided")
    return saved(folder / "plain.pt", classes=5)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 3, 500, 999])


def tapped(network: Guided, layers: list[str], images: Tensor, told: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: outputs.__setitem__(layer, output)
        )
        for layer in layers
    ]
    with torch.no_grad():
        network(images, told)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ({"classes": 5, "order": "new"}, {"attention_order": "new"}),
        ({"updown": False, "film": False, "blocks": 2, "attention": (0, 1)}, {}),
        ({"heads": {32: 2, 64: 2}, "attention": (0, 1)}, {"num_heads": 2}),
        ({"widths": (32, 64, 64), "base": 64, "classes": 3, "updown": True}, {}),
        ({"updown": False, "widths": (64,), "attention": ()}, {}),
    ],
    ids=["new", "convolutions", "heads", "half-wide", "one-level"],
)
def test_features_equal_those_of_the_published_network(tmp_path, variant, options):
    path, network = saved(tmp_path / "some.pt", **variant)
    images, timesteps = batch()
    layers = ["input_blocks.0", "input_blocks.1", PUBLISHED_TAP, "out"]
    layers += [f"input_blocks.{len(network.input_blocks) - 1}.0.in_layers.2", "middle_block.1"]
    layers += [f"output_blocks.{index}" for index in range(len(network.output_blocks))]
    if len(network.input_blocks) > 2:
        down = 1 + variant.get("blocks", 1)
        inner = ".op" if variant.get("updown") is False else ".out_layers.0"
        layers += [f"input_blocks.{down}", f"input_blocks.{down}.0{inner}"]
    config = TeacherConfig(model=str(path), layers=tuple(layers), options={**OPTIONS, **options})
    teacher = load_teacher(config, device="cpu")
    found = list(teacher.features(images, timesteps).values())
    expected = tapped(network, layers, images, timesteps)
    assert len(found) == len(layers) == len(expected)
    for layer, feature in zip(layers, found, strict=True):
        torch.testing.assert_close(feature, expected[layer], rtol=1e-5, atol=1e-5, msg=layer)


def test_the_order_of_attention_matters(plain):
    path, network = plain
    images, timesteps = batch()
    features = [
        load_teacher(
            TeacherConfig(
                model=str(path), layers=("mid_block.attentions.0",), options={**OPTIONS, **options}
            ),
            device="cpu",
        ).features(images, timesteps)["mid_block.attentions.0"]
        for options in ({}, {"attention_order": "new"}, {"num_heads": 2})
    ]
    expected = tapped(network, ["middle_block.1"], images, timesteps)["middle_block.1"]
    assert float((features[0] - expected).abs().max()) < 1e-5
    assert all(float((other - expected).abs().max()) > 1e-3 for other in features[1:])


def test_a_folder_written_once_gives_the_same_features(plain, tmp_path, capsys):
    path, network = plain
    arguments = [str(path), "--out", str(tmp_path / "folder"), "--image-size", "8"]
    assert main([*arguments, "--num-head-channels", "16", "--noise-schedule", "cosine"]) == 0
    images, timesteps = batch()
    unet = UNet2DModel.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        expected = network(images, timesteps)
        torch.testing.assert_close(unet(images, timesteps).sample, expected, rtol=1e-5, atol=1e-5)
    given = {**OPTIONS, "noise_schedule": "cosine"}
    ways = [
        TeacherConfig(model=str(tmp_path / "folder")),
        TeacherConfig(model=str(path), options=given),
    ]
    folder, checkpoint = (load_teacher(way, device="cpu") for way in ways)
    layer = "mid_block.resnets.1.conv2"
    assert folder.layers == checkpoint.layers == (layer,)
    assert torch.equal(
        folder.features(images, timesteps)[layer], checkpoint.features(images, timesteps)[layer]
    )
    every = torch.arange(1000)
    assert torch.equal(folder.snr(every), checkpoint.snr(every))
    assert main([*arguments, "--num-head-channels", "16"]) == 2
    assert "already holds a model" in capsys.readouterr().err
    assert main([str(path), "--out", str(tmp_path / "b"), "--num-heads", "2"]) == 2
    assert "give teacher.options.image_size" in capsys.readouterr().err
    rescaled = ["--rescale-timesteps", "true", "--num-head-channels", "16", "--image-size", "8"]
    assert main([str(path), "--out", str(tmp_path / "b"), *rescaled]) == 2
    assert "cannot say that its timesteps are rescaled" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_published_names_bring_their_settings(plain, tmp_path):
    path, _network = plain
    named = tmp_path / "64x64_diffusion.pt"
    named.write_bytes(path.read_bytes())
    given = {"num_head_channels": 16}
    config = TeacherConfig(model=str(named), options=given)
    assert family_of(config) == "guided_diffusion"
    assert describe_teacher(config).image_size == 64
    teacher = load_teacher(config, device="cpu")
    cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    every = torch.arange(1000)
    torch.testing.assert_close(teacher.snr(every), cosine / (1 - cosine))
    images, timesteps = batch()
    same = TeacherConfig(
        model=str(path), options={**OPTIONS, "attention_order": "new", "image_size": 64}
    )
    layer = teacher.layers[0]
    assert torch.equal(
        teacher.features(images, timesteps)[layer],
        load_teacher(same, device="cpu").features(images, timesteps)[layer],
    )


@pytest.mark.parametrize(
    ("side", "steps", "variant"),
    [
        (64, 1000, {"base": 192, "widths": (192, 384, 576, 768), "attention": (1, 2, 3)}),
        (64, 4000, {"base": 192, "widths": (192, 384, 576, 768), "updown": False}),
        (128, 1000, {"base": 256, "widths": (256, 256, 512, 768, 1024), "attention": (2, 4)}),
        (512, 1000, {"base": 256, "widths": (128, 256, 256, 512, 512, 1024, 1024)}),
    ],
)
def test_renamed_releases_are_known_by_their_widths(tmp_path, side, steps, variant):
    with torch.device("meta"):
        network = Guided(**variant, heads=dict.fromkeys(variant["widths"], 4), classes=1000)
    # One number stands for each whole weight, so that the file is small.
    weights = {
        name: torch.zeros(1).expand(value.shape) for name, value in network.state_dict().items()
    }
    torch.save(weights, tmp_path / "renamed.pt")
    card = describe_teacher(TeacherConfig(model=str(tmp_path / "renamed.pt")))
    assert (card.channels, card.image_size, card.num_timesteps) == (3, side, steps)
    assert {PUBLISHED_TAP, "mid_block.resnets.1.conv2"} <= set(card.layers_available)


def test_timesteps_of_longer_schedules_are_rescaled(plain):
    path, network = plain
    steps = {"diffusion_steps": 4000, "rescale_timesteps": True}
    config = TeacherConfig(model=str(path), options={**OPTIONS, **steps})
    teacher = load_teacher(config, device="cpu")
    images, _ = batch()
    timesteps = torch.tensor([0, 3, 2001, 3999])
    expected = tapped(network, [PUBLISHED_TAP], images, timesteps / 4)[PUBLISHED_TAP]
    feature = teacher.features(images, timesteps)[teacher.layers[0]]
    torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-5)
    # Linear betas of Ho et al., a quarter as large for four times as many steps.
    betas = torch.linspace(0.25e-4, 0.005, 4000, dtype=torch.float64)
    products = torch.cumprod(1 - betas, 0)
    ratios = (products / (1 - products)).float()[timesteps]
    torch.testing.assert_close(teacher.snr(timesteps), ratios, rtol=2e-3, atol=0)


def test_checkpoints_of_consistency_models_bring_the_noise_of_edm(tmp_path):
    path, network = saved(tmp_path / "edm.pt", axes=2, order="new")
    config = TeacherConfig(model=str(path), options=OPTIONS)
    teacher = load_teacher(config, device="cpu")
    images, timesteps = batch()
    sigmas = (0.002 ** (1 / 7) + timesteps / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    told = 250 * sigmas.log()
    expected = tapped(network, [PUBLISHED_TAP], images, told)[PUBLISHED_TAP]
    feature = teacher.features(images, timesteps)[teacher.layers[0]]
    # The levels' rounding is seen at a thousandfold by the sinusoids.
    torch.testing.assert_close(feature, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(teacher.snr(timesteps), edm().snr(timesteps))


def test_only_what_the_tap_needs_is_read(plain):
    path, network = plain
    config = TeacherConfig(model=str(path), options=OPTIONS)
    teacher: Any = load_teacher(config, device="cpu")
    whole = sum(value.numel() for value in network.parameters())
    labels = network.label_emb.weight.numel()
    assert teacher.parameters_all == whole - labels
    behind = [network.output_blocks, network.out]
    expected = whole - labels - sum(v.numel() for part in behind for v in part.parameters())
    assert teacher.parameters_used == expected
    trace = describe_teacher(config).trace
    assert trace is not None
    assert trace.cost([PUBLISHED_TAP]) == trace.cost(["mid_block.resnets.1.conv2"]) == expected
    assert trace.shapes[PUBLISHED_TAP] == (64, 4, 4)


def test_the_environment_steps_on_a_checkpoint(tiny, tmp_path):
    path, _network = saved(tmp_path / "grey.pt", channels=1)
    teacher = {"model": str(path), "layers": [PUBLISHED_TAP, "input_blocks.1"]}
    options = {**OPTIONS, "image_size": 16}
    overrides = {**tiny, "teacher": {**teacher, "options": options, "standardize_images": 8}}
    environment = gym.make_vec("RepFusion-v0", **overrides)
    observation, _ = environment.reset(seed=0)
    assert torch.as_tensor(observation).isfinite().all()
    _, rewards, *_ = environment.step(environment.action_space.sample())
    assert torch.as_tensor(rewards).isfinite().all()
    environment.close()


def refusal(path: Path, layers: tuple[str, ...] = (), **options: Any) -> str:
    config = TeacherConfig(model=str(path), layers=layers, options={**OPTIONS, **options})
    with pytest.raises(TeacherError) as caught:
        load_teacher(config, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_checkpoints_and_options_are_refused(plain, tmp_path):
    path, network = plain
    said = refusal(path, ("middle_block.2.out_layer.3",))
    assert "no layer 'middle_block.2.out_layer.3'" in said
    assert f"'{PUBLISHED_TAP}'" in said
    assert "no layer 'input_blocks.1.0.emb_layers'" in refusal(
        path, ("input_blocks.1.0.emb_layers",)
    )
    assert "'out' is the same layer as 'conv_out'" in refusal(path, ("conv_out", "out"))
    assert "Did you mean 'noise_schedule'?" in refusal(path, noise_shedule="linear")
    assert "allowed: 'legacy', 'new'" in refusal(path, attention_order="old")
    assert "num_heads: 3 does not divide the width 64" in refusal(path, num_heads=3)
    assert "num_head_channels: 0 given" in refusal(path, num_head_channels=0)
    assert "give teacher.options.image_size" in refusal(path, image_size=0)

    def changed(name: str, change: Any) -> str:
        weights = dict(network.state_dict())
        change(weights)
        torch.save(weights, tmp_path / name)
        return refusal(tmp_path / name)

    def without(part: str) -> Any:
        def change(weights: dict[str, Tensor]) -> None:
            for name in [name for name in weights if name.startswith(part)]:
                del weights[name]

        return change

    assert "lacks weights input_blocks.1.0.in_layers.0.bias, so it is of a variant" in changed(
        "a.pt", without("input_blocks.1.0.in_layers.0.bias")
    )
    assert "has the unknown weights extra" in changed(
        "b.pt", lambda weights: weights.update({"extra": torch.zeros(1)})
    )
    assert "a classifier is not a denoiser" in changed("c.pt", without("output_blocks"))
    assert "are not arranged in levels" in changed("d.pt", without("output_blocks.3"))
    assert "it lacks input_blocks.0.0.weight" in changed("e.pt", without("input_blocks.0"))
    assert "is an upsampler" in changed(
        "f.pt", lambda weights: weights.update({"input_blocks.0.0.weight": torch.ones(32, 6, 3, 3)})
    )
    (tmp_path / "g.pt").write_bytes(b"none")
    assert "is damaged" in refusal(tmp_path / "g.pt")
    with pytest.raises(TeacherError, match="takes one checkpoint file"):
        load_teacher(TeacherConfig(model=str(tmp_path), family="guided_diffusion"), device="cpu")
