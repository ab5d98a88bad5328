from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import Teacher, describe_teacher, load_teacher

DEEP = (
    "down_blocks.0.resnets.0",
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "mid_block.resnets.1.conv2",
    "up_blocks.0.resnets.1.conv1",
    "up_blocks.1.attentions.1",
)


def teacher_of(folder: Path, *layers: str, **options: Any) -> Teacher:
    config = TeacherConfig(model=str(folder), layers=layers, **options)
    return load_teacher(config, device="cpu")


def batch(size: int = 8, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(5, channels, size, size, generator=generator) * 2 - 1
    return images, torch.tensor([0, 3, 250, 998, 999])


def full_forward(
    folder: Path, layers: tuple[str, ...], images: Tensor, timesteps: Tensor, **arguments: Any
) -> dict[str, Tensor]:
    """The forward of diffusers itself, whole, with hooks."""
    unet = UNet2DModel.from_pretrained(folder).eval()
    outputs: dict[str, Tensor] = {}
    for layer in layers:
        unet.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: outputs.__setitem__(layer, output)
        )
    with torch.no_grad():
        unet(images, timesteps, **arguments)
    return outputs


@pytest.mark.parametrize("layer", DEEP)
def test_the_cut_forward_equals_the_full_one_to_the_last_bit(make_model, layer):
    folder, (images, timesteps) = make_model(), batch()
    expected = full_forward(folder, (layer,), images, timesteps)[layer]
    teacher = teacher_of(folder, layer)
    feature = teacher.features(images, timesteps)[layer]
    assert torch.equal(feature, expected)
    assert feature.shape[1:] == teacher.feature_shapes[layer]
    # The same again: nothing of one call lingers in the next.
    assert torch.equal(teacher.features(images, timesteps)[layer], expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"center_input_sample": True},
        {"add_attention": False},
        {"resnet_time_scale_shift": "scale_shift"},
        {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
        {"mid_block_type": None},
        {"time_embedding_type": "learned", "num_train_timesteps": 1000},
        {
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
            "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "block_out_channels": (32, 64, 64),
        },
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D"),
        },
    ],
    ids=lambda arguments: ",".join(arguments) or "plain",
)
def test_it_does_so_for_every_kind_of_network_and_for_several_layers(make_model, arguments):
    folder, (images, timesteps) = make_model(**arguments), batch()
    layers = [
        "conv_in",
        "down_blocks.1.resnets.0",
        "down_blocks.2.resnets.0",
        "up_blocks.1.resnets.0",
    ]
    if arguments.get("mid_block_type", "") is not None:
        layers.append("mid_block.resnets.0")
    expected = full_forward(folder, tuple(layers), images, timesteps)
    features = teacher_of(folder, *layers).features(images, timesteps)
    assert list(features) == layers
    for layer in layers:
        assert torch.equal(features[layer], expected[layer]), layer


def test_a_network_of_classes_is_read_without_its_labels(make_model):
    folder, (images, timesteps) = make_model(num_class_embeds=10), batch()
    plain = UNet2DModel.from_pretrained(folder).eval()
    plain.class_embedding.weight.data.zero_()  # diffusers adds the embedding, so zeros are none
    plain.save_pretrained(folder.parent / "without")
    layer = "mid_block.resnets.1.conv2"
    labels = torch.zeros(5, dtype=torch.int64)
    expected = full_forward(
        folder.parent / "without", (layer,), images, timesteps, class_labels=labels
    )
    # The zeroed embedding adds -0.0/+0.0 at most, which compares equal.
    assert torch.equal(
        teacher_of(folder, layer).features(images, timesteps)[layer], expected[layer]
    )


def test_what_lies_behind_the_cut_is_freed(make_model):
    folder = make_model()
    whole = sum(weight.numel() for weight in UNet2DModel.from_pretrained(folder).parameters())

    def kept(layer: str) -> int:
        return sum(weight.numel() for weight in teacher_of(folder, layer).network.parameters())  # type: ignore[attr-defined]

    sizes = [
        kept(layer)
        for layer in ("conv_in", "down_blocks.1", "mid_block", "up_blocks.1.resnets.0")
        if layer != "down_blocks.1"
    ]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < whole == kept("conv_out")


def test_subfolders_and_pickled_weights_are_read_alike(make_model):
    images, timesteps = batch()
    layer = "mid_block.resnets.1.conv2"
    ways = [
        make_model(name="root"),
        make_model(name="nested", subfolders=True),
        make_model(name="pickled", safe=False),
    ]
    assert (ways[2] / "diffusion_pytorch_model.bin").is_file()
    first, *others = (teacher_of(way, layer).features(images, timesteps)[layer] for way in ways)
    for other in others:
        assert torch.equal(first, other)


def test_features_are_ordinary_float32_tensors_that_a_loss_can_use(make_model):
    images, timesteps = batch()
    for precision in ("fp32", "bf16"):
        teacher = teacher_of(make_model(), "mid_block.resnets.1.conv2", precision=precision)
        feature = teacher.features(images, timesteps)["mid_block.resnets.1.conv2"]
        assert feature.dtype == torch.float32
        assert not feature.requires_grad
        weight = torch.ones((), requires_grad=True)
        torch.nn.functional.mse_loss(weight * feature, feature).backward()
        assert weight.grad is not None


def test_bf16_and_channels_last_stay_close_to_fp32(make_model):
    folder, (images, timesteps) = make_model(), batch()
    layer = "mid_block.resnets.1.conv2"
    exact = teacher_of(folder, layer).features(images, timesteps)[layer]
    scale = float(exact.std())
    last = teacher_of(folder, layer, channels_last=True).features(images, timesteps)[layer]
    half = teacher_of(folder, layer, precision="bf16").features(images, timesteps)[layer]
    assert float((last - exact).abs().max()) < 1e-5 * scale
    assert 1e-6 * scale < float((half - exact).abs().max()) < 0.1 * scale


def test_half_precision_weights_are_raised_to_float32(make_model):
    folder, (images, timesteps) = make_model(), batch()
    layer = "mid_block.resnets.1.conv2"
    unet = UNet2DModel.from_pretrained(folder).half()
    unet.save_pretrained(folder)
    teacher = teacher_of(folder, layer)
    unet.float().save_pretrained(folder.parent / "float")
    expected = full_forward(folder.parent / "float", (layer,), images, timesteps)
    assert torch.equal(teacher.features(images, timesteps)[layer], expected[layer])


def test_add_noise_is_that_of_the_scheduler_and_of_the_closed_form(make_model):
    teacher = teacher_of(make_model(), "conv_in")
    images, timesteps = batch()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    ours = teacher.add_noise(images, noise, timesteps)
    theirs = DDPMScheduler(num_train_timesteps=1000).add_noise(images, noise, timesteps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    products = [
        math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(t + 1)) for t in timesteps
    ]
    for index, product in enumerate(products):
        expected = math.sqrt(product) * images[index] + math.sqrt(1 - product) * noise[index]
        torch.testing.assert_close(ours[index], expected, rtol=0, atol=2e-5)
    ratios = torch.tensor([product / (1 - product) for product in products])
    torch.testing.assert_close(teacher.snr(timesteps), ratios, rtol=2e-3, atol=0)


def test_other_schedulers_give_their_own_noise(make_model):
    from diffusers import DDIMScheduler

    folder = make_model()
    DDIMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2").save_pretrained(folder)
    teacher = teacher_of(folder, "conv_in")
    assert teacher.num_timesteps == 50
    products = DDIMScheduler(
        num_train_timesteps=50, beta_schedule="squaredcos_cap_v2"
    ).alphas_cumprod
    torch.testing.assert_close(
        teacher.snr(torch.arange(50)).double(), (products / (1 - products)).double()
    )


def test_loading_leaves_random_numbers_and_the_users_logging_alone(make_model, capfd):
    folder = make_model()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    teacher_of(folder, "mid_block.resnets.1.conv2")
    assert torch.equal(torch.get_rng_state(), state)
    assert "".join(capfd.readouterr()) == ""


def test_the_fingerprint_tells_weights_layers_and_schedules_apart(make_model):
    folder = make_model()
    first = teacher_of(folder, "conv_in").fingerprint
    assert first == teacher_of(folder, "conv_in").fingerprint
    other_layer = teacher_of(folder, "mid_block").fingerprint
    DDPMScheduler(num_train_timesteps=500).save_pretrained(folder)
    other_schedule = teacher_of(folder, "conv_in").fingerprint
    unet = UNet2DModel.from_pretrained(folder)
    unet.conv_out.bias.data += 1
    unet.save_pretrained(folder)
    assert len({first, other_layer, other_schedule, teacher_of(folder, "conv_in").fingerprint}) == 4


def test_a_card_is_written_without_weights(make_model):
    folder = make_model()
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    card = describe_teacher(TeacherConfig(model=str(folder)))
    assert (card.channels, card.image_size, card.num_timesteps, card.side_divisor) == (
        3,
        8,
        1000,
        4,
    )
    assert set(DEEP) <= set(card.layers_available)
    # These give no map (N, F, h, w): a vector, and a tuple.
    assert not {"time_embedding", "down_blocks.0"} & set(card.layers_available)


def test_images_of_another_size_give_larger_maps(make_model):
    teacher = teacher_of(make_model(), "mid_block.resnets.1.conv2")
    images, timesteps = batch(size=16)
    assert teacher.feature_shapes["mid_block.resnets.1.conv2"] == (16, 2, 2)
    assert teacher.features(images, timesteps)["mid_block.resnets.1.conv2"].shape == (5, 16, 4, 4)
