"""Mean average precision as COCO defines it, by torchmetrics over pycocotools."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from repfusion_env.data.annotations import NO_BOX


class MeanPrecision:
    """Mean average precision over many images.

    Args:
        predict: From a detector's outputs to boxes (B, G, 6), with label and score.
        classes: Names, in the order of the labels.
    """

    def __init__(
        self, predict: Callable[[dict[str, Tensor]], Tensor], classes: tuple[str, ...]
    ) -> None:
        self.predict = predict
        self.classes = classes
        self.found = MeanAveragePrecision(
            box_format="xyxy", iou_type="bbox", class_metrics=True, backend="pycocotools"
        )

    def update(self, outputs: dict[str, Tensor], targets: Tensor) -> None:
        """Take what a detector said of B images, and their targets (B, G, 5)."""
        answers, known = [], []
        for row in self.predict(outputs).cpu():
            row = row[row[:, 4] != NO_BOX]
            answers.append({"boxes": row[:, :4], "labels": row[:, 4].long(), "scores": row[:, 5]})
        for row in targets.cpu():
            row = row[row[:, 4] != NO_BOX]
            known.append({"boxes": row[:, :4], "labels": row[:, 4].long()})
        self.found.update(answers, known)

    def compute(self) -> dict[str, float]:
        """``map``, ``map_50``, ``map_75``, and ``map/<class>`` of each class that has objects.

        Each is in [0, 1]; NaN where no image had an object.
        """
        values = self.found.compute()
        named = {name: float(values[name]) for name in ("map", "map_50", "map_75")}
        shown = torch.atleast_1d(values["classes"]).tolist()
        for label, value in zip(shown, torch.atleast_1d(values["map_per_class"]), strict=False):
            if value >= 0:
                named[f"map/{self.classes[label]}"] = float(value)
        # The library says -1 where nothing can be measured, which would pass for a number.
        return {name: math.nan if value < 0 else value for name, value in named.items()}
