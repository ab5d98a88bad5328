"""Glow: a normalizing flow of images (Kingma & Dhariwal, "Glow: Generative Flow with Invertible 1x1
Convolutions", 2018).

Each level squeezes 2x2 pixels into channels, takes steps of activation normalisation, invertible
1x1 convolution and affine coupling, and hands half of its channels out as latents; the last level
hands out all. The latents' prior is the standard normal one throughout.

Shape letters: N lanes, C,H,W image, F channels of a level, h,w its positions.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from repfusion_env.teachers.files.network_folder import save_network


@dataclass(frozen=True)
class GlowSettings:
    """The architecture of a Glow.

    Args:
        channels: C of the images.
        image_size: H = W that it was trained on; a multiple of ``2 ** levels``.
        levels: Scales (L in the paper).
        steps: Steps of each level (K in the paper).
        hidden: Width of the coupling networks.
        bits: Of the pixels that it was trained on (8, or 5 for the paper's large images).
    """

    channels: int = 3
    image_size: int = 32
    levels: int = 3
    steps: int = 32
    hidden: int = 512
    bits: int = 8


class ActNorm(nn.Module):
    """``(x + bias) * exp(log_scale)`` per channel; the first training batch sets both."""

    initialized: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(width, 1, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def forward(self, maps: Tensor) -> Tensor:
        """(N, F, h, w) -> the same shape; its log-determinant is ``h w sum(log_scale)``."""
        if self.training and not bool(self.initialized):
            with torch.no_grad():
                self.bias.copy_(-maps.mean((0, 2, 3))[:, None, None])
                self.log_scale.copy_(-(maps.std((0, 2, 3)) + 1e-6).log()[:, None, None])
                self.initialized.fill_(True)
        return (maps + self.bias) * self.log_scale.exp()

    def inverse(self, maps: Tensor) -> Tensor:
        """(N, F, h, w) -> what :meth:`forward` was given."""
        return maps * (-self.log_scale).exp() - self.bias


class FlowStep(nn.Module):
    """Activation normalisation, invertible 1x1 convolution, affine coupling (figure 2a)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = ActNorm(width)
        # A random rotation: its log-determinant is 0 (section 3.2).
        rotation = torch.linalg.qr(torch.randn(width, width))[0]
        self.mixing = nn.Parameter(rotation.contiguous())
        last = nn.Conv2d(hidden, 2 * (width - width // 2), 3, padding=1)
        # The step begins as the identity (section 3.3).
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.coupling = nn.Sequential(
            nn.Conv2d(width // 2, hidden, 3, padding=1),
            ActNorm(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            ActNorm(hidden),
            nn.ReLU(),
            last,
        )

    def forward(self, maps: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One step.

        Args:
            maps: (N, F, h, w).
            log_det: Log-determinant of the steps before, (N,); None: it is not asked for.

        Returns:
            (N, F, h, w), and ``log_det`` with this step's added.
        """
        maps = functional.conv2d(self.norm(maps), self.mixing[:, :, None, None])
        kept, moved = maps.tensor_split([maps.shape[1] // 2], dim=1)
        shift, log_scale = self._affine(kept)
        moved = (moved + shift) * log_scale.exp()
        if log_det is not None:
            positions = maps.shape[2] * maps.shape[3]
            volume = self.norm.log_scale.sum() + torch.linalg.slogdet(self.mixing)[1]
            log_det = log_det + positions * volume + log_scale.sum((1, 2, 3))
        return torch.cat((kept, moved), dim=1), log_det

    def inverse(self, maps: Tensor) -> Tensor:
        """(N, F, h, w) -> what :meth:`forward` was given."""
        kept, moved = maps.tensor_split([maps.shape[1] // 2], dim=1)
        shift, log_scale = self._affine(kept)
        maps = torch.cat((kept, moved * (-log_scale).exp() - shift), dim=1)
        mixing = torch.linalg.inv(self.mixing)
        return self.norm.inverse(functional.conv2d(maps, mixing[:, :, None, None]))

    def _affine(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log-scale of the other half; scales stay below 1.14, or maps explode."""
        shift, raw = self.coupling(kept).chunk(2, dim=1)
        # 0 where raw is 0, as the zeroed last convolution wants it.
        return shift, functional.logsigmoid(raw + 2) + math.log1p(math.exp(-2))


class Glow(nn.Module):
    """The flow: images in [-1, 1] to latents, and back.

    The network itself sees pixels in [-0.5, 0.5]: ``(value + u) / 2 ** bits - 0.5`` of whole values
    with uniform noise ``u`` in [0, 1) (dequantisation). Pixel values of [-1, 1] are brought to the
    middle of their bins, which is a factor.
    """

    def __init__(self, settings: GlowSettings) -> None:
        super().__init__()
        self.settings = settings
        # By levels, then steps: `levels.1.3` is the fourth step of the second level.
        levels, width = [], settings.channels
        for level in range(settings.levels):
            width *= 4
            levels.append(
                nn.ModuleList(FlowStep(width, settings.hidden) for _ in range(settings.steps))
            )
            width = width if level == settings.levels - 1 else width - width // 2
        self.levels = nn.ModuleList(levels)

    @property
    def factor(self) -> float:
        """From [-1, 1] to the middles of the bins."""
        return float((1 - 2.0**-self.settings.bits) / 2)

    def forward(
        self, images: Tensor, log_det: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Latents of images.

        Args:
            images: In [-1, 1], (N, C, H, W); each side a multiple of ``2 ** levels``.
            log_det: Zeros (N,), or None where the log-determinant is not asked for.

        Returns:
            One (N, F, h, w) by level, and the log-determinant of all steps, (N,), without that of
            :attr:`factor`.
        """
        maps, latents = images * self.factor, []
        for index, steps in enumerate(self.levels):
            maps = functional.pixel_unshuffle(maps, 2)
            for step in steps:  # type: ignore[attr-defined]
                maps, log_det = step(maps, log_det)
            if index < len(self.levels) - 1:
                latent, maps = maps.tensor_split([maps.shape[1] // 2], dim=1)
                latents.append(latent)
        return [*latents, maps], log_det

    def inverse(self, latents: list[Tensor]) -> Tensor:
        """Images (N, C, H, W) of latents as :meth:`forward` gives them."""
        maps = latents[-1]
        for index in reversed(range(len(self.levels))):
            if index < len(self.levels) - 1:
                maps = torch.cat((latents[index], maps), dim=1)
            for step in reversed(self.levels[index]):  # type: ignore[call-overload]
                maps = step.inverse(maps)
            maps = functional.pixel_shuffle(maps, 2)
        return maps / self.factor

    def log_likelihood(self, images: Tensor) -> Tensor:
        """Log-density of pixels in [-0.5, 0.5], in nats, (N,); images are given in [-1, 1]."""
        latents, log_det = self(images, torch.zeros(len(images)).to(images))
        assert log_det is not None
        prior = sum(-0.5 * (z.square() + math.log(2 * math.pi)).sum((1, 2, 3)) for z in latents)
        return prior + log_det


def save_flow(network: Glow, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, which family 'flow' reads."""
    save_network(network, {"_class_name": "Glow", **asdict(network.settings)}, folder)
