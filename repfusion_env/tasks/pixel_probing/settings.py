"""What a pixel probe reads and how it is trained; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repfusion_env.landscapes.layers import spread_of_layers

# Of a U-Net of four levels they are all from the mid-block on.
LAYERS = 5


@dataclass(frozen=True)
class PixelProbeSettings:
    """A pixel probe, beside the experiment's configuration.

    Args:
        timesteps: At which the teacher is read.
        layers: Module paths of the teacher; empty: up to five blocks of its later half.
        images: Labelled training images, drawn by ``seed``.
        heldout: Held-out images that it is judged by, the first so many; None: as many as
            ``evaluation.images`` of the configuration, or all.
        members: Classifiers that vote.
        repeats: Independent draws of the labelled images, each with an ensemble of its own.
        seed: Of the first draw; the next ones count on from it.

    Raises:
        ValueError: A number is too small, or a timestep or layer is named twice or not at all.
    """

    timesteps: tuple[int, ...] = (50, 150, 250)
    layers: tuple[str, ...] = ()
    images: int = 20
    heldout: int | None = None
    members: int = 10
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("images", self.images, 1),
            ("heldout", self.heldout, 1),
            ("members", self.members, 1),
            ("repeats", self.repeats, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"--{name}: {value} given; it must be {least} or more")
        if not self.timesteps:
            raise ValueError("--timesteps: none given; at least one is needed")
        for name, values in (("timesteps", self.timesteps), ("layers", self.layers)):
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"--{name}: '{twice[0]}' is named twice")


def default_layers(available: Sequence[str], count: int = LAYERS) -> tuple[str, ...]:
    """Evenly spaced blocks of a network's later half, which has the finer maps in a U-Net.

    Args:
        available: Layers in the order of the forward.
        count: How many at most.
    """
    blocks = spread_of_layers(available, (), len(available))
    return spread_of_layers(blocks[len(blocks) // 2 :], (), count)
