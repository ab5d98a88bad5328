"""Tasks: a head on the student's maps, a loss per sample, a metric.

Shape letters: B samples, C,H,W image or map, S student width, P points, G most boxes of an image.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from repfusion_env.data.bank import ImageBank

# (C, H, W) of a map.
Shape = tuple[int, int, int]


class TaskMetric(Protocol):
    """A metric over many images, as the field reports it."""

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Take what a head said of B images, and their targets."""
        ...

    def compute(self) -> dict[str, float]:
        """Of all images so far, by name; the task's ``headline`` is one of the names."""
        ...


class Task(Protocol):
    """What the trainer needs to know of a task; made as ``Kind(config, bank)``.

    What a head returns (``outputs``) is the task's own matter: nobody else looks into it.

    Attributes:
        annotation: What of a bank is to be predicted: ``labels``, ``masks``, ``keypoints`` or
            ``boxes``.
        reads: What the head takes: the last stage's average (B, S), the last stage's map, or the
            maps of all stages, shallow to deep.
        score: What :meth:`correct` is called in logs.
        headline: The metric by which students are compared.
        higher_is_better: Of the headline.
        percent: Whether the headline is a part of 1, to be read in %.
    """

    annotation: str
    reads: Literal["pooled", "last", "stages"]
    score: str
    headline: str
    higher_is_better: bool
    percent: bool

    def head(self, shapes: list[Shape], hidden: int = 0) -> nn.Module:
        """A new head, called as ``head(*maps)``.

        Args:
            shapes: Of what it takes: one or more, shallow to deep; ``(S, 1, 1)`` where it reads
                averages (B, S). A head that reads all stages must do with a single one too.
            hidden: Above 0 the published method's three layers, where the task has such a head.
        """
        ...

    def targets(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """What is known of the images ``ids`` (B,), as one tensor with B rows."""
        ...

    def losses(self, outputs: Any, targets: Tensor) -> Tensor:
        """One finite, non-negative loss per sample, (B,), with a gradient to the outputs."""
        ...

    def correct(self, outputs: Any, targets: Tensor) -> Tensor:
        """How much of each sample is solved, (B,): bool, or float32 in [0, 1]."""
        ...

    def predict(self, outputs: Any) -> Tensor:
        """What the outputs say, in the form of targets; boxes with a score behind the label."""
        ...

    def metric(self) -> TaskMetric:
        """A new metric, empty."""
        ...

    def draw(self, image: np.ndarray, answer: Tensor, side: int) -> np.ndarray:
        """A picture of an image with what is known, or predicted, of it.

        Args:
            image: uint8 (H, W, 3).
            answer: One row of targets or of predictions, on the CPU.
            side: Of the picture, in pixels.

        Returns:
            uint8 (side, side, 3).
        """
        ...
