"""Student networks: backbones with named feature stages, the projection, and the task heads.

Importing this package imports torch alone; torchvision and timm load when one of their networks
is built.
"""

from students.backbone import Backbone
from students.heads import linear_head, mlp_head
from students.projection import Projection
from students.registry import BACKBONES, available_backbones, build_backbone

__all__ = [
    "BACKBONES",
    "Backbone",
    "Projection",
    "available_backbones",
    "build_backbone",
    "linear_head",
    "mlp_head",
]
