"""The student with everything that is trained beside it, and its optimizer.

Shape letters: B samples, C,H,W image, S student width, h,w its last map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from repfusion_env.config import ExperimentConfig, OptimizerConfig
from repfusion_env.frozen import FrozenParts
from repfusion_env.tasks import Task
from students import Projection, build_backbone


class Student(nn.Module):
    """Backbone, one projection per teacher layer, task head, and the head on teacher features."""

    def __init__(self, config: ExperimentConfig, parts: FrozenParts, task: Task) -> None:
        super().__init__()
        channels, size, _ = parts.train.shape
        self.backbone = build_backbone(
            config.student.name,
            in_channels=channels,
            image_size=size,
            pretrained=config.student.pretrained,
        )
        width, widths = self.backbone.feature_channels, parts.features.widths
        self.projections = nn.ModuleList(Projection(width, teacher) for teacher in widths)
        self.head = task.head(width)
        self.probe = task.head(sum(widths), config.reward.probe_hidden)

    def features(self, images: Tensor) -> Tensor:
        """The last stage's map, (B, C, H, W) -> (B, S, h, w) float32."""
        return self.backbone(images)[self.backbone.stages[-1]].float()


def make_optimizer(student: Student, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups: backbone with projections, and the heads."""
    rate, head_rate = config.learning_rate, config.head_learning_rate or config.learning_rate
    groups = [
        {"params": [*student.backbone.parameters(), *student.projections.parameters()], "lr": rate},
        {"params": [*student.head.parameters(), *student.probe.parameters()], "lr": head_rate},
    ]
    for group in groups:
        group["base_lr"] = group["lr"]
    if config.name == "sgd":
        return torch.optim.SGD(
            groups,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def learning_rate_factor(schedule: str, progress: float) -> float:
    """Factor of the learning rate at ``progress`` in [0, 1] of the run."""
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "multistep":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    return 1.0
