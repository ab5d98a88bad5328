"""Distillation losses: student feature against teacher feature, one value per sample.

Each takes the projected student feature and the standardised teacher feature, both ``(B, F)``
(pooled) or ``(B, F, H, W)`` (dense), and gives ``(B,)``, non-negative. A loss is a function
``(student, teacher, anchors=None, **options)``, or an ``nn.Module`` class with parts that learn or
remember, built once per teacher layer as ``Loss(shape, **options)``.

Relational losses compare a sample with others: on pooled features with the other images of the
batch, on dense features with the other positions of the same image. ``anchors`` fixes those others
(student, teacher) so that the gradient moves one sample alone; without it they are the batch.
"""

from repfusion_env.losses.attention import attention_transfer
from repfusion_env.losses.cosine import cosine
from repfusion_env.losses.distillation import DistillationLoss
from repfusion_env.losses.hint import hint
from repfusion_env.losses.l1 import l1
from repfusion_env.losses.normalized_l2 import normalized_l2
from repfusion_env.losses.rkd_angle import rkd_angle
from repfusion_env.losses.rkd_distance import rkd_distance
from repfusion_env.losses.shape import Anchors, FeatureShape

__all__ = [
    "Anchors",
    "DistillationLoss",
    "FeatureShape",
    "attention_transfer",
    "cosine",
    "hint",
    "l1",
    "normalized_l2",
    "rkd_angle",
    "rkd_distance",
]
