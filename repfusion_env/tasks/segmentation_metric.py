"""How good predicted masks are, over many images.

Shape letters: B samples, H,W image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from repfusion_env.data.annotations import IGNORE


class SegmentationMetric:
    """Mean and per-class intersection over union, and pixel accuracy, by torchmetrics.

    All counts are over the pixels of all images together, as the field reports them (Pascal VOC),
    not averages of images. Pixels of :data:`IGNORE` count nowhere.

    Args:
        classes: Names of the K classes.
        answer: From what a head says and (H, W) to classes (B, H, W).
    """

    def __init__(
        self, classes: tuple[str, ...], answer: Callable[[Any, tuple[int, ...]], Tensor]
    ) -> None:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        # The library would look at every value of every batch, which were checked when they were
        # loaded.
        shared: dict[str, Any] = {
            "num_classes": len(classes),
            "ignore_index": IGNORE,
            "validate_args": False,
        }
        self.classes = classes
        self.answer = answer
        self.metrics = MetricCollection(
            {
                "miou": MulticlassJaccardIndex(average="macro", **shared),
                "iou": MulticlassJaccardIndex(average="none", **shared),
                "pixel_accuracy": MulticlassAccuracy(average="micro", **shared),
            }
        )

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Take what a head said of B images, and their masks (B, H, W)."""
        if self.metrics["miou"].device != targets.device:
            self.metrics.to(targets.device)
        self.metrics.update(self.answer(outputs, tuple(targets.shape[1:])), targets)

    def compute(self) -> dict[str, float]:
        """Parts of 1 by name: ``miou``, ``pixel_accuracy``, and ``iou/<class>``.

        A class that is in no mask and that nothing was taken for has no IoU: it is left out of the
        mean, and of the result.

        Raises:
            ValueError: No pixel has counted yet.
        """
        counts: Tensor = self.metrics["iou"].confmat  # type: ignore[assignment]
        if not int(counts.sum()):
            raise ValueError(
                "no pixel of these images counts: there are none, or their masks hold nothing but "
                f"{IGNORE}"
            )
        found = self.metrics.compute()
        present = (counts.sum(0) + counts.sum(1) > 0).tolist()
        each = zip(self.classes, present, found["iou"].tolist(), strict=True)
        return {
            "miou": float(found["miou"]),
            "pixel_accuracy": float(found["pixel_accuracy"]),
            **{f"iou/{name}": value for name, known, value in each if known},
        }
