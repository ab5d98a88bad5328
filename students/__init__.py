"""Student networks: backbones with named feature stages, the projection, and the task heads.

Importing this package imports nothing heavy: torch comes with the first name that needs it,
torchvision and timm when one of their networks is built.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from students.registry import BACKBONES, available_backbones, build_backbone

if TYPE_CHECKING:
    from students.backbone import Backbone as Backbone
    from students.heads import linear_head as linear_head
    from students.heads import mlp_head as mlp_head
    from students.projection import Projection as Projection
    from students.projection import Projections as Projections
    from students.saved import load_backbone as load_backbone

_LAZY = {
    "Backbone": "students.backbone",
    "Projection": "students.projection",
    "Projections": "students.projection",
    "linear_head": "students.heads",
    "load_backbone": "students.saved",
    "mlp_head": "students.heads",
}

__all__ = ["BACKBONES", "available_backbones", "build_backbone", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'students' has no attribute '{name}'")
