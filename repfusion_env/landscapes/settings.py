"""How much is measured of a landscape; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass

# Of images, labels and draws.
LEAST_IMAGES, LEAST_LABELS = 20, 10


@dataclass(frozen=True)
class LandscapeSettings:
    """What is measured beside the experiment's configuration.

    Args:
        layers: Module paths of the teacher; empty: a spread over its depth with its own layers.
        images: Most training images, and most held-out images, that are looked at.
        labels: Training labels that the linear heads learn from; None: those of all images.
        draws: Independent noise draws for each (image, timestep); 2 or more tell an image's own
            best timestep from the noise's.
        seed: Of folds, subsets and bootstrap.

    Raises:
        ValueError: A number is too small to measure anything.
    """

    layers: tuple[str, ...] = ()
    images: int = 2000
    labels: int | None = None
    draws: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("images", self.images, LEAST_IMAGES),
            ("labels", self.labels, LEAST_LABELS),
            ("draws", self.draws, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"--{name}: {value} given; it must be {least} or more")
        twice = [layer for layer in set(self.layers) if self.layers.count(layer) > 1]
        if twice:
            raise ValueError(f"--layers: '{twice[0]}' is named twice")
