"""The student with everything that is trained beside it, and its optimizer.

Shape letters: B samples, C,H,W image, S student width, h,w its last map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from repfusion_env.compiling import CompiledBackbone
from repfusion_env.config import ExperimentConfig, OptimizerConfig, StudentConfig
from repfusion_env.frozen import FrozenParts
from repfusion_env.fusion import probe_shape
from repfusion_env.registry import PROJECTIONS, look_up
from repfusion_env.tasks import Shape, Task
from students import Backbone, Projections, build_backbone


class Encoder(Protocol):
    """What :func:`inference_maps` needs of a student, be it distilled or not."""

    training: bool

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of images (B, C, H, W), shallow to deep."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set training or inference mode."""
        ...


class Student(nn.Module):
    """Backbone, projection to the teacher's layers, task head, and the head on teacher features.

    Attributes:
        compiled: The backbone's forward where it is compiled; no module, and in no copy.
    """

    compiled: CompiledBackbone | None = None

    def __init__(self, config: ExperimentConfig, parts: FrozenParts, task: Task) -> None:
        super().__init__()
        self.backbone = student_backbone(config.student, parts.train.shape)
        stages = stage_shapes(self.backbone, parts.train.shape)
        name = config.distillation.projection
        self.projections: Projections = look_up("projection", name, PROJECTIONS)(
            stages, parts.features.shapes
        )
        _check_last_stage(
            task, self.projections, dict(zip(self.backbone.stages, stages, strict=True))
        )
        self.all_stages = self.projections.all_stages or task.reads == "stages"
        self.precision = config.student.precision
        self.head = task.head(head_shapes(task, stages))
        self.probe = task.head(
            [probe_shape(parts.features.shapes, pooled=task.reads == "pooled")],
            config.reward.probe_hidden,
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps that projection and head read, shallow to deep; the last one is the feature.

        Args:
            images: (B, C, H, W) in [-1, 1].

        Returns:
            float32 maps, at least that of the last stage, (B, S, h, w), computed in
            ``student.precision``.
        """
        stages = self.backbone.stages if self.all_stages else self.backbone.stages[-1:]
        return stage_maps(self.compiled or self.backbone, images, stages, self.precision)


def student_backbone(config: StudentConfig, shape: Shape) -> Backbone:
    """The configured backbone for images of ``shape``; weights from torch's global generator."""
    return build_backbone(
        config.name, in_channels=shape[0], image_size=shape[1], pretrained=config.pretrained
    )


def stage_maps(
    backbone: Callable[[Tensor], Any], images: Tensor, stages: Sequence[str], precision: str
) -> list[Tensor]:
    """float32 maps of ``stages``, computed in ``precision``, fp32, bf16 or fp16."""
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(images.device.type, kind, enabled=precision != "fp32"):
        maps = backbone(images)
        return [maps[stage].float() for stage in stages]


def inference_maps(student: Encoder, images: Tensor) -> list[Tensor]:
    """``student.features(images)`` in inference mode; its own mode is as before afterwards."""
    training = student.training
    student.train(False)
    maps = student.features(images)
    student.train(training)
    return maps


def task_input(task: Task, maps: Sequence[Tensor]) -> list[Tensor]:
    """What the task's head takes of a backbone's maps, shallow to deep: ``head(*task_input(...))``.

    Args:
        task: Whose head it is.
        maps: Of all stages, or of the last one alone where that is all it reads; this may also be
            its average (B, S).
    """
    if task.reads == "stages":
        return list(maps)
    last = maps[-1]
    return [last.mean((2, 3)) if task.reads == "pooled" and last.ndim == 4 else last]


def head_shapes(task: Task, stages: Sequence[Shape]) -> list[Shape]:
    """The shapes of :func:`task_input` for maps of ``stages``, (C, H, W) each."""
    if task.reads == "stages":
        return list(stages)
    return [(stages[-1][0], 1, 1) if task.reads == "pooled" else stages[-1]]


def _check_last_stage(task: Task, projections: Projections, stages: Mapping[str, Shape]) -> None:
    """Refuse a head that reads the last stage alone where no teacher layer is matched.

    What is distilled would not reach the head, and a look-ahead's reward not depend on the action.
    """
    matched = {index % len(stages) for index in projections.moved}
    if task.reads == "stages" or len(stages) - 1 in matched:
        return
    name, (_, height, wide) = list(stages.items())[-1]
    others = ", ".join(list(stages)[index] for index in sorted(matched))
    raise ValueError(
        f"teacher.layers: the task's head reads the student's last stage '{name}' alone, which is "
        f"{height}x{wide}, but the layers are matched at {others}; add a layer of about that size, "
        "such as the mid-block, or give distillation.projection linear or pyramid"
    )


@torch.no_grad()
def stage_shapes(backbone: Backbone, shape: Shape) -> list[Shape]:
    """(C, H, W) of each stage's map, shallow to deep, for images of ``shape``."""
    training = backbone.training
    device = next(backbone.parameters()).device
    maps = backbone.eval()(torch.zeros(1, *shape, device=device))
    backbone.train(training)
    found = [maps[stage].shape for stage in backbone.stages]
    return [(width, height, wide) for _, width, height, wide in found]


def make_optimizer(
    config: OptimizerConfig,
    body: Iterable[nn.Parameter],
    heads: Iterable[nn.Parameter],
) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups.

    Args:
        config: Which optimizer, and its settings.
        body: Backbone and projections, with what the losses on features learn.
        heads: What a task loss alone trains; ``head_learning_rate`` is theirs.
    """
    rate, head_rate = config.learning_rate, config.head_learning_rate or config.learning_rate
    groups = [{"params": list(body), "lr": rate}, {"params": list(heads), "lr": head_rate}]
    return optimizer_of(
        groups,
        config.name,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def optimizer_of(
    groups: list[dict[str, Any]],
    name: str,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW or SGD, fused; each group remembers its ``lr`` as ``base_lr`` for the schedule.

    Args:
        groups: ``params`` and ``lr`` of each group.
        name: ``adamw`` or ``sgd``.
        momentum: Of sgd alone.
        nesterov: Of sgd alone.
        weight_decay: Of both.
    """
    for group in groups:
        group["base_lr"] = group["lr"]
    if name == "sgd":
        return torch.optim.SGD(
            groups, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True
        )
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def learning_rate_factor(schedule: str, progress: float) -> float:
    """Factor of the learning rate at ``progress`` in [0, 1] of the run."""
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "multistep":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    return 1.0
