"""What every teacher is: a frozen generative model read at a timestep.

Shape letters: N lanes, C channels, H height, W width of the image; F feature width, h, w feature
positions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from repfusion_env.teachers.reading.tracing import Trace


class TeacherError(ValueError):
    """A teacher that cannot be found, loaded or used, in one sentence."""


@runtime_checkable
class Teacher(Protocol):
    """A frozen generative model that gives features of images at timesteps.

    Attributes:
        layers: Module paths whose outputs are the features.
        channels: C of the images.
        image_size: Side in pixels of the images that it was trained on.
        num_timesteps: Timesteps of its noise scheduler, ``0..num_timesteps - 1``.
        feature_shapes: (F, h, w) by layer for images of ``image_size``.
        fingerprint: SHA-256 (hex) of weights, configuration, noise process and layers; what changes
            no more than the rounding (memory layout, batch size, offload) is not in it.
    """

    layers: tuple[str, ...]
    channels: int
    image_size: int
    num_timesteps: int
    feature_shapes: dict[str, tuple[int, int, int]]
    fingerprint: str

    def encode(self, images: Tensor) -> Tensor:
        """What noise is added to: the images themselves, or the latents of a VAE.

        Args:
            images: In [-1, 1], float32, (N, C, H, W).

        Returns:
            float32, (N, ...), without gradients.
        """
        ...

    def features(self, images: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """Read the network, without gradients and without a host synchronisation.

        There is no way in for a label or a prompt.

        Args:
            images: What :meth:`encode` or :meth:`add_noise` gave, float32.
            timesteps: int64, (N,).

        Returns:
            float32 (N, F, h, w) by layer; ordinary tensors that a loss may use.
        """
        ...

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise images as the teacher's own noise process does.

        Args:
            images: What :meth:`encode` gave, float32.
            noise: Standard normal, float32, of the same shape.
            timesteps: int64, (N,).

        Returns:
            float32, of the same shape.
        """
        ...

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio ``alpha_bar / (1 - alpha_bar)``, float32, (N,)."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the teacher to ``device`` and return it."""
        ...


@dataclass(frozen=True)
class TeacherCard:
    """What can be known of a teacher without its weights.

    Args:
        channels: C of the images it takes.
        image_size: Side in pixels of the images that it was trained on.
        num_timesteps: Timesteps of its noise scheduler.
        layers_available: Module paths whose output is a map (N, F, h, w).
        side_divisor: Each side of an image must be a multiple of this.
        default_layers: What is read where the configuration names no layers.
        fixed_size: Whether images must have the size ``image_size``.
        trace: What one forward computes, layer by layer; None where it is not known.
    """

    channels: int
    image_size: int
    num_timesteps: int
    layers_available: tuple[str, ...]
    side_divisor: int = 1
    default_layers: tuple[str, ...] = ()
    fixed_size: bool = False
    trace: Trace | None = None


def unknown_layers(layers: Sequence[str], available: Iterable[str]) -> list[str]:
    """One sentence for each of ``layers`` that is not ``available``, with the closest matches."""
    available = list(available)
    sentences = []
    for layer in layers:
        if layer in available:
            continue
        close = difflib.get_close_matches(layer, available, n=3, cutoff=0.6)
        inside = [name for name in available if name.startswith(f"{layer}.")]
        if inside:
            hint = f"inside it there are {', '.join(map(repr, inside[:3]))}, ..."
        elif close:
            hint = f"did you mean {' or '.join(map(repr, close))}?"
        else:
            hint = f"allowed are {', '.join(map(repr, available[:3]))}, ..."
        sentences.append(f"the teacher has no layer '{layer}' with an output (N, F, h, w); {hint}")
    return sentences
