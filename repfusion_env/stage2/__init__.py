"""Stage 2: what a distilled student is worth on labels, by probes and by fine-tuning.

Importing this package loads nothing heavy; the names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repfusion_env.stage2.finetuning import FinetuneResult as FinetuneResult
    from repfusion_env.stage2.finetuning import finetune as finetune
    from repfusion_env.stage2.knn import KnnProbe as KnnProbe
    from repfusion_env.stage2.knn import knn_probe as knn_probe
    from repfusion_env.stage2.labels import label_count as label_count
    from repfusion_env.stage2.labels import labelled_subset as labelled_subset
    from repfusion_env.stage2.linear import LinearProbe as LinearProbe
    from repfusion_env.stage2.linear import linear_probe as linear_probe
    from repfusion_env.stage2.loading import SavedStudent as SavedStudent
    from repfusion_env.stage2.loading import embed as embed
    from repfusion_env.stage2.loading import load_banks as load_banks
    from repfusion_env.stage2.loading import load_student as load_student
    from repfusion_env.stage2.network import TaskStudent as TaskStudent
    from repfusion_env.stage2.settings import FinetuneConfig as FinetuneConfig

_LAZY = {
    "FinetuneConfig": "settings",
    "FinetuneResult": "finetuning",
    "KnnProbe": "knn",
    "LinearProbe": "linear",
    "SavedStudent": "loading",
    "TaskStudent": "network",
    "embed": "loading",
    "finetune": "finetuning",
    "knn_probe": "knn",
    "label_count": "labels",
    "labelled_subset": "labels",
    "linear_probe": "linear",
    "load_banks": "loading",
    "load_student": "loading",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = importlib.import_module(f"repfusion_env.stage2.{_LAZY[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'repfusion_env.stage2' has no attribute '{name}'")
