"""Object detection: boxes with classes, torchvision's detectors, mean average precision.

Shape letters: B samples, G most objects of an image, K classes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from repfusion_env.config import ExperimentConfig
from repfusion_env.data.annotations import NO_BOX, Boxes
from repfusion_env.data.bank import ImageBank
from repfusion_env.tasks import Shape
from repfusion_env.tasks.detection_boxes import box_ious
from repfusion_env.tasks.detection_decoding import READINGS, detections, surest
from repfusion_env.tasks.detection_metric import MeanPrecision
from repfusion_env.tasks.pictures import LEAST_SCORE, draw_boxes
from repfusion_env.tasks.requirements import require_annotation

# An object counts as found from this IoU on; among so many of the surest answers it is looked for.
FOUND_IOU = 0.5
ANSWERS = 100

Outputs = dict[str, Tensor]


class DetectionTask:
    """Targets ``(B, G, 5)``: left, top, right, bottom in pixels, label; -1 where there is none.

    Outputs are those of :class:`students.detection.Detector`.

    Args:
        config: ``detection`` names the detector.
        bank: Training or held-out images.

    Raises:
        ValueError: The bank has no boxes, or no object in any image.
    """

    annotation = "boxes"
    reads: Literal["stages"] = "stages"
    score = "objects_found"
    headline = "map"
    higher_is_better = True
    percent = True

    def __init__(self, config: ExperimentConfig, bank: ImageBank) -> None:
        boxes = require_annotation(bank, Boxes, "detection")
        if not bool((boxes.labels != NO_BOX).any()):
            raise ValueError(
                f"task 'detection' needs objects, but none of the {len(bank)} images of data set "
                f"'{bank.name}' has a box"
            )
        self.classes = boxes.classes
        self.size = (bank.shape[1], bank.shape[2])
        self.config = config.detection
        self.reading = READINGS[config.detection.head]

    def head(self, shapes: list[Shape], hidden: int = 0) -> nn.Module:
        """The configured detector on maps of these shapes; it has its own hidden layers."""
        from students.detection import Detector

        config = self.config
        return Detector(
            shapes,
            self.size,
            len(self.classes),
            config.head,
            width=config.width,
            convs=config.convs,
            stride=config.stride,
        )

    def targets(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """Boxes and labels of the images ``ids``, float32 (B, G, 5)."""
        found = require_annotation(bank, Boxes, "detection")
        labels = found.labels.index_select(0, ids)[..., None].float()
        rows = torch.cat([found.boxes.index_select(0, ids), labels], dim=2)
        if rows.shape[1]:
            return rows
        return torch.cat([rows.new_zeros(len(ids), 1, 4), rows.new_full((len(ids), 1, 1), -1)], 2)

    def losses(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """The detector's own loss of each sample, (B,)."""
        return self.reading.losses(outputs, targets)

    @torch.no_grad()
    def correct(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Part of the objects that are found, (B,) float32: without suppression of doubles.

        An object is found if the surest of the answers that overlap it (IoU of at least 0.5) names
        its class with a score of at least 0.3. An image without objects is solved where no answer
        is that sure.
        """
        boxes, labels, scores = surest(self.reading, outputs, self.size, ANSWERS)
        wanted, real = targets[..., 4], targets[..., 4] > NO_BOX + 0.5
        sure = scores >= LEAST_SCORE
        # Answers are sorted: the first that overlaps is the surest.
        over = (box_ious(targets[..., :4], boxes) >= FOUND_IOU) & sure[:, None]  # (B, G, n)
        first = over.int().argmax(2)
        found = over.any(2) & (labels.gather(1, first) == wanted) & real
        count = real.sum(1)
        part = found.sum(1) / count.clamp_min(1)
        return torch.where(count > 0, part, (~sure.any(1)).float())

    @torch.no_grad()
    def predict(self, outputs: Outputs) -> Tensor:
        """What was found, float32 (B, 100, 6): box, label (-1: nothing), score; surest first."""
        return detections(self.reading, outputs, self.size)

    def metric(self) -> MeanPrecision:
        """``map``: mean average precision over IoU 0.5 to 0.95; ``map_50``, and by class."""
        return MeanPrecision(self.predict, self.classes)

    def draw(self, image: np.ndarray, answer: Tensor, side: int) -> np.ndarray:
        """The image with its boxes; of answers those with a score of at least 0.3."""
        return draw_boxes(image, answer, side, self.classes)
