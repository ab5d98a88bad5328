"""The DCGAN of Radford et al., "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks", 2016, and the encoder that finds an image's latent: that of
BiGAN (Donahue et al., 2017) and ALI (Dumoulin et al., 2017), of the discriminator's form.

Modules are numbered as in PyTorch's DCGAN example, so that its checkpoints fit.

Shape letters: N lanes, C,H,W image, Z width of the latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repfusion_env.teachers.files.network_folder import save_network

PARTS = ("discriminator", "generator", "encoder")


@dataclass(frozen=True)
class GanSettings:
    """The architecture of a DCGAN; n widths make images of side ``4 * 2 ** n``.

    Args:
        channels: C of the images.
        latent: Z.
        discriminator: Widths from the image on; none: it has no discriminator.
        generator: Widths from the latent on; none: it has no generator.
        encoder: Widths from the image on; none: it has no encoder.
    """

    channels: int = 3
    latent: int = 100
    discriminator: tuple[int, ...] = ()
    generator: tuple[int, ...] = ()
    encoder: tuple[int, ...] = ()

    def side(self, part: str) -> int:
        """Side in pixels of the images that ``part`` takes or makes."""
        return int(4 * 2 ** len(getattr(self, part)))


class DownNetwork(nn.Module):
    """Strided 4x4 convolutions from an image to one position: discriminator or encoder."""

    def __init__(
        self, channels: int, widths: Sequence[int], outputs: int, last: Sequence[nn.Module]
    ):
        super().__init__()
        modules: list[nn.Module] = []
        for index, (taken, given) in enumerate(zip((channels, *widths), widths, strict=False)):
            modules.append(nn.Conv2d(taken, given, 4, stride=2, padding=1, bias=False))
            if index:  # none on the image itself: section 3 of the paper
                modules.append(nn.BatchNorm2d(given))
            modules.append(nn.LeakyReLU(0.2))
        modules.append(nn.Conv2d(widths[-1], outputs, 4, bias=False))
        self.main = nn.Sequential(*modules, *last)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, outputs, 1, 1) at its own size."""
        output: Tensor = self.main(images)
        return output


class Generator(nn.Module):
    """Transposed 4x4 convolutions from a latent to an image in [-1, 1]."""

    def __init__(self, channels: int, widths: Sequence[int], latent: int):
        super().__init__()
        modules: list[nn.Module] = []
        for index, (taken, given) in enumerate(zip((latent, *widths), widths, strict=False)):
            stride, padding = (2, 1) if index else (1, 0)
            modules += [
                nn.ConvTranspose2d(taken, given, 4, stride, padding, bias=False),
                nn.BatchNorm2d(given),
                nn.ReLU(),
            ]
        modules.append(nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1, bias=False))
        self.main = nn.Sequential(*modules, nn.Tanh())

    def forward(self, latents: Tensor) -> Tensor:
        """(N, Z, 1, 1) -> (N, C, H, W)."""
        images: Tensor = self.main(latents)
        return images


class DCGAN(nn.Module):
    """The parts of a DCGAN that its settings give widths to.

    Args:
        settings: The architecture.
        parts: Build only these.
    """

    def __init__(self, settings: GanSettings, parts: Sequence[str] = PARTS) -> None:
        super().__init__()
        self.settings = settings
        channels, latent = settings.channels, settings.latent
        if settings.discriminator and "discriminator" in parts:
            self.discriminator = DownNetwork(channels, settings.discriminator, 1, [nn.Sigmoid()])
        if settings.generator and "generator" in parts:
            self.generator = Generator(channels, settings.generator, latent)
        if settings.encoder and "encoder" in parts:
            self.encoder = DownNetwork(channels, settings.encoder, latent, [])

    def forward(self, images: Tensor, part: str = "discriminator") -> Tensor:
        """Judge images (N, C, H, W) in [-1, 1], or generate them again from their latents."""
        output: Tensor = (
            self.generator(self.encoder(images))
            if part == "generator"
            else self.discriminator(images)
        )
        return output


def save_gan(network: DCGAN, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, which family 'gan' reads."""
    given = {name: value for name, value in asdict(network.settings).items() if value != ()}
    save_network(network, {"_class_name": "DCGAN", **given}, folder)


def checkpoint_settings(shapes: Mapping[str, Any]) -> tuple[str, GanSettings]:
    """Which part a checkpoint of PyTorch's DCGAN example holds, and its architecture.

    Args:
        shapes: Of its tensors, by name.

    Raises:
        ValueError: It holds no such network.
    """
    found = [
        (int(name.split(".")[1]), shape)
        for name, shape in shapes.items()
        if name.startswith("main.") and name.endswith(".weight") and len(shape) == 4
    ]
    convolutions = [shape for _, shape in sorted(found)]
    if len(convolutions) < 2:
        raise ValueError("no weights main.0.weight, main.2.weight, ...")
    first, *_, last = convolutions
    if "main.1.weight" in shapes:
        # Only the generator normalises its first stage. Transposed weights are (in, out, 4, 4).
        widths = tuple(shape[1] for shape in convolutions[:-1])
        return "generator", GanSettings(channels=last[1], latent=first[0], generator=widths)
    widths = tuple(shape[0] for shape in convolutions[:-1])
    return "discriminator", GanSettings(channels=first[1], discriminator=widths)
