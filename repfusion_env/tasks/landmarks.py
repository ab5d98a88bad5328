"""Landmarks: the same points in every image, found by heatmaps, judged by their mean error.

Shape letters: B samples, C,H,W image or map, P points, h,w heatmap.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from repfusion_env.config import ExperimentConfig
from repfusion_env.data.annotations import Keypoints
from repfusion_env.data.bank import ImageBank
from repfusion_env.tasks import Shape
from repfusion_env.tasks.landmarks_errors import THRESHOLD, LandmarkErrors, normalized_errors, units
from repfusion_env.tasks.landmarks_heatmaps import Heatmaps
from repfusion_env.tasks.requirements import require_annotation

# Without `landmarks.stride`: the papers' 4, or less where the heatmaps would be smaller than this.
SMALLEST_SIDE = 32
LARGEST_STRIDE = 4
# Of fewer pixels nothing can be told apart.
SMALLEST_HEATMAP = 4


class LandmarksTask:
    """Targets and predictions (B, P, 3): x, y in image pixels, then visible, or how sure.

    What a head returns are logits of heatmaps, (B, P, h, w), of any size.

    Raises:
        ValueError: The bank has no keypoints, none of its images can be measured, or
            ``landmarks.stride`` leaves no heatmap worth the name.
    """

    annotation = "keypoints"
    reads: Literal["last", "stages"]
    score = "points_within_0.1"
    headline = "nme"
    higher_is_better = False
    percent = True

    def __init__(self, config: ExperimentConfig, bank: ImageBank) -> None:
        keypoints = require_annotation(bank, Keypoints, "landmarks")
        self.normalizer = keypoints.normalizer
        if not (units(_packed(keypoints), self.normalizer) > 0).any():
            unit = (
                "two visible points that are not on one line with the image's sides"
                if self.normalizer is None
                else f"the points {' and '.join(map(str, self.normalizer))} visible and apart"
            )
            raise ValueError(
                f"data set '{bank.name}' has no image whose error can be measured: task "
                f"'landmarks' needs {unit}"
            )
        self.points = keypoints.points.shape[1]
        self.config = config.landmarks
        side, stride = min(bank.shape[1:]), self.config.stride
        if stride is not None and side // stride < SMALLEST_HEATMAP:
            raise ValueError(
                f"landmarks.stride: {stride} given, but the images of data set '{bank.name}' are "
                f"{bank.shape[2]}x{bank.shape[1]} pixels, and a heatmap has at least "
                f"{SMALLEST_HEATMAP} in its side; allowed: 1..{max(1, side // SMALLEST_HEATMAP)}"
            )
        self.reads = "stages" if self.config.head == "hrnet" else "last"
        self.heatmaps = Heatmaps((bank.shape[1], bank.shape[2]), self.config.sigma)

    def head(self, shapes: list[Shape], hidden: int = 0) -> nn.Module:
        """Heatmaps by the configured head, or with ``hidden`` > 0 by three layers per position."""
        from students.landmarks import HEADS, LinearHeatmaps

        if hidden:
            return LinearHeatmaps(shapes, self.points, hidden)
        height, width = self.heatmaps.image
        stride = self.config.stride or default_stride(min(height, width))
        size = max(1, height // stride), max(1, width // stride)
        return HEADS[self.config.head](shapes, self.points, self.config.width, size)

    def targets(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """Points of the images ``ids``, float32 (B, P, 3); 0 where one is not visible."""
        return _packed(require_annotation(bank, Keypoints, "landmarks").take(ids))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Divergence of the heatmaps of visible points from their targets, in nats, (B,)."""
        return self.heatmaps.losses(outputs, targets[..., :2], targets[..., 2] > 0.5)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Part of the visible points that are off by at most 0.1 units, (B,) float32.

        0 for an image that has no visible point or no unit.
        """
        errors, counts = normalized_errors(self.predict(outputs), targets, self.normalizer)
        return ((errors <= THRESHOLD) & counts).sum(1) / counts.sum(1).clamp_min(1)

    def predict(self, outputs: Tensor) -> Tensor:
        """Points x and y, and the probability of each peak, float32 (B, P, 3)."""
        return self.heatmaps.decode(outputs)

    def metric(self) -> LandmarkMetric:
        """NME, AUC and failure rate at 0.1, all as parts of 1."""
        return LandmarkMetric(self)

    def draw(self, image: np.ndarray, answer: Tensor, side: int) -> np.ndarray:
        """The image with its points, each in a colour of its own."""
        from repfusion_env.tasks.pictures import draw_points

        return draw_points(image, answer, side)


class LandmarkMetric:
    """:class:`LandmarkErrors` of what a task's head says."""

    def __init__(self, task: LandmarksTask) -> None:
        self._predict = task.predict
        self._errors = LandmarkErrors(task.normalizer)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take heatmaps (B, P, h, w) and targets (B, P, 3)."""
        self._errors.update(self._predict(outputs), targets)

    def compute(self) -> dict[str, float]:
        """See :meth:`LandmarkErrors.compute`."""
        return self._errors.compute()


def default_stride(side: int) -> int:
    """Image pixels in the side of a heatmap pixel, for images of ``side`` pixels."""
    stride = LARGEST_STRIDE
    while stride > 1 and side // stride < SMALLEST_SIDE:
        stride //= 2
    return stride


def _packed(keypoints: Keypoints) -> Tensor:
    """(M, P, 3): x, y and visible. What is not visible may be no number, which would spread."""
    visible = keypoints.visible[..., None]
    return torch.cat([torch.where(visible, keypoints.points, 0.0), visible.float()], dim=-1)
