"""Teachers and students whose work is known: built on the meta device, cut as the environment does.

Shape letters: B images, C,H,W what a network sees, F feature width, h,w feature positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.material import DDPM_CIFAR10_UNET, LAYER
from benchmarks.scaling.work import Work, count
from repfusion_env.teachers.networks.guided_layout import Architecture, unet_config
from repfusion_env.teachers.reading.latents import posterior_mean
from students import build_backbone

TEXT_TOKENS, TEXT_WIDTH = 77, 768
LATENTS = 4
STABLE_DIFFUSION_LAYER = "mid_block.resnets.1"
# The published 64x64_diffusion.pt: ADM on ImageNet, class-conditional, 296 M parameters.
ADM64 = Architecture(
    in_channels=3,
    out_channels=6,
    embedded=192,
    widths=(192, 384, 576, 768),
    blocks=3,
    attention=(False, True, True, True),
    residual_resampling=True,
    scale_shift=True,
    classes=1000,
)
VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "latent_channels": LATENTS,
}


@dataclass(frozen=True)
class Teacher:
    """What one teacher costs.

    Attributes:
        name: For tables.
        side: Of the images that it is shown, in pixels.
        cut: Its forward up to the layer that is read.
        whole: All of its forward.
        encoder: From pixels to latents; nothing for a network on pixels.
        shape: (F, h, w) of the layer.
        parameters: Of the cut network, the encoder's among them.
        parameters_all: Of the whole denoiser.
    """

    name: str
    side: int
    cut: Work
    whole: Work
    encoder: Work
    shape: tuple[int, int, int]
    parameters: int
    parameters_all: int


@dataclass(frozen=True)
class Student:
    """What one student costs.

    Attributes:
        name: In the registry.
        side: Of its images.
        training: Forward and backward.
        inference: Forward alone, as a reward's look ahead or back takes it.
        parameters: Of the backbone.
        norms: Batch normalisations, each of which reduces over the ranks.
    """

    name: str
    side: int
    training: Work
    inference: Work
    parameters: int
    norms: int


class _Reached(Exception):
    """The forward has come to the layer that is read."""


@functools.cache
def teacher(name: str) -> Teacher:
    """The cost of a teacher by its name in :data:`TEACHERS`.

    Raises:
        ValueError: No teacher has that name.
    """
    if name not in TEACHERS:
        raise ValueError(f"teacher: '{name}' given; one of {', '.join(TEACHERS)} is needed")
    return TEACHERS[name](name)


@functools.cache
def student(name: str, side: int) -> Student:
    """The cost of a student for images of ``side`` pixels.

    Raises:
        ValueError: It is unknown or cannot take such images.
    """
    with torch.device("meta"):
        backbone = build_backbone(name, in_channels=3, image_size=side)
    last = backbone.stages[-1]

    def images(batch: int) -> Tensor:
        return torch.empty(batch, 3, side, side, device="meta")

    def train(batch: int) -> None:
        backbone.train()(images(batch))[last].sum().backward()
        backbone.zero_grad()

    def infer(batch: int) -> None:
        with torch.no_grad():
            backbone.eval()(images(batch))

    return Student(
        name,
        side,
        count(train),
        count(infer),
        sum(parameter.numel() for parameter in backbone.parameters()),
        sum(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()),
    )


def measure_forward(network: nn.Module, run: Callable[[nn.Module, int], object], layer: str) -> Any:
    """Count a forward cut at ``layer`` and whole.

    Args:
        network: On the meta device.
        run: Its forward for so many images.
        layer: Path of the module whose output is read.

    Returns:
        Work of the cut, work of the whole, (F, h, w) of the layer, parameters that the cut uses.
    """
    shape: list[tuple[int, ...]] = []
    used: dict[int, int] = {}

    def note(module: nn.Module, *_: Any) -> None:
        used.update({id(p): p.numel() for p in module.parameters(recurse=False)})

    def stop(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        shape.append(tuple(output.shape[1:]))
        raise _Reached

    def cut(batch: int) -> None:
        with torch.no_grad():
            try:
                run(network, batch)
            except _Reached:
                return
        raise ValueError(f"layer '{layer}' is not reached by the forward")

    def whole(batch: int) -> None:
        with torch.no_grad():
            run(network, batch)

    everything = count(whole)
    watched = [module.register_forward_pre_hook(note) for module in network.modules()]
    handle = network.get_submodule(layer).register_forward_hook(stop)
    part = count(cut)
    for hook in (handle, *watched):
        hook.remove()
    return part, everything, shape[0], sum(used.values())


def pixel_unet(name: str, config: Mapping[str, Any], layer: str = LAYER) -> Teacher:
    """Diffusers' ``UNet2DModel`` on pixels."""
    from diffusers import UNet2DModel

    side = config["sample_size"]
    with torch.device("meta"):
        network = UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()

    def run(network: nn.Module, batch: int) -> None:
        network(torch.empty(batch, 3, side, side, device="meta"), _timesteps(batch))

    cut, whole, shape, used = measure_forward(network, run, layer)
    return Teacher(name, side, cut, whole, Work(()), shape, used, _parameters(network))


def latent_unet(
    name: str,
    side: int,
    widths: tuple[int, ...] = (320, 640, 1280, 1280),
    vae_widths: tuple[int, ...] = (128, 256, 512, 512),
) -> Teacher:
    """Stable Diffusion 1's ``UNet2DConditionModel`` behind its VAE's encoder.

    Args:
        name: For tables.
        side: Of the images; the denoiser sees an eighth of it.
        widths: Of the denoiser's levels.
        vae_widths: Of the VAE's levels.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(
            sample_size=side // 8,
            block_out_channels=widths,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=8,
        ).eval()
        vae = AutoencoderKL(**{**VAE, "block_out_channels": vae_widths}).eval()

    def run(network: nn.Module, batch: int) -> None:
        latents = torch.empty(batch, LATENTS, side // 8, side // 8, device="meta")
        prompt = torch.empty(batch, TEXT_TOKENS, TEXT_WIDTH, device="meta")
        network(latents, _timesteps(batch), encoder_hidden_states=prompt)

    def encode(batch: int) -> None:
        with torch.no_grad():
            posterior_mean(vae, torch.empty(batch, 3, side, side, device="meta"))

    cut, whole, shape, used = measure_forward(network, run, STABLE_DIFFUSION_LAYER)
    encoder = _parameters(vae.encoder) + _parameters(vae.quant_conv)
    return Teacher(
        name, side, cut, whole, count(encode), shape, used + encoder, _parameters(network)
    )


def guided(name: str, architecture: Architecture = ADM64, head_width: int = 64) -> Teacher:
    """A network of OpenAI's guided diffusion at 64x64, without its class embedding."""
    return pixel_unet(name, unet_config(architecture, 64, head_width))


TEACHERS: dict[str, Callable[[str], Teacher]] = {
    "DDPM CIFAR-10": lambda name: pixel_unet(name, DDPM_CIFAR10_UNET),
    "ADM-64": guided,
    "SD 1.5 at 256": lambda name: latent_unet(name, 256),
    "SD 1.5 at 512": lambda name: latent_unet(name, 512),
}


def _timesteps(batch: int) -> Tensor:
    return torch.empty(batch, dtype=torch.int64, device="meta")


def _parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())
