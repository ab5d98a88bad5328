"""How the metrics of tasks are called and written where people read them."""

from __future__ import annotations

import math

# By their names in summaries; another one is written as it is, with spaces.
NAMES = {
    "miou": "mIoU",
    "nme": "NME",
    "map": "mAP",
    "map_50": "mAP@.5",
    "map_75": "mAP@.75",
    "auc_0.1": "AUC@0.1",
    "failure_rate_0.1": "failure rate@0.1",
    "reward": "reward",
}


def metric_name(metric: str) -> str:
    """``miou`` as ``mIoU``, ``pixel_accuracy`` as ``pixel accuracy``."""
    return NAMES.get(metric, metric.replace("_", " "))


def metric_text(value: float | None, *, percent: bool) -> str:
    """A value as ``43.2 %``, or as ``0.432`` where it is no part of 1; without one ``none``."""
    if value is None or not math.isfinite(value):
        return "none"
    return f"{100 * value:.1f} %" if percent else f"{value:.3f}"
