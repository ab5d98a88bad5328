"""The configured sum of losses, built once for every teacher layer.

Shape letters: B samples, F width of a teacher layer, H,W positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from repfusion_env.config import DistillationConfig
from repfusion_env.loss_rules import option_complaints, unknown_option
from repfusion_env.losses.shape import Anchors, FeatureShape
from repfusion_env.registry import LOSSES, look_up


class DistillationLoss(nn.Module):
    """A weighted sum of registered losses, with whatever they learn and remember.

    Args:
        config: Weights and options per name; a weight of 0 switches a loss off.
        shapes: The features of each teacher layer, in order.

    Raises:
        ValueError: A loss is unknown, an option is unknown or unfit.
    """

    def __init__(self, config: DistillationConfig, shapes: Sequence[FeatureShape]) -> None:
        super().__init__()
        self.weights = {name: weight for name, weight in config.losses.items() if weight}
        parts = {name: look_up("loss", name, LOSSES) for name in self.weights}
        self.layers = nn.ModuleList(
            nn.ModuleList(
                _built(name, part, config.options.get(name, {}), shape)
                for name, part in parts.items()
            )
            for shape in shapes
        )

    @property
    def names(self) -> frozenset[str]:
        """The losses that count."""
        return frozenset(self.weights)

    @property
    def remembers(self) -> bool:
        """Whether a loss keeps a memory of images."""
        return any(hasattr(loss, "remember") for loss in self._losses(0))

    def layer(
        self,
        index: int,
        student: Tensor,
        teacher: Tensor,
        *,
        anchors: Anchors | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum for one teacher layer.

        Args:
            index: Position of the layer among the shapes.
            student: Projected student feature, (B, F) or (B, F, H, W).
            teacher: Standardised teacher feature of the same shape.
            anchors: Student and teacher features that stay fixed while each sample moves alone.
            ids: (B,) int64 images of the training bank; None for images that are not in it.

        Returns:
            (B,) values.
        """
        losses = zip(self.weights.values(), self._losses(index), strict=True)
        values = [weight * loss(student, teacher, anchors, ids=ids) for weight, loss in losses]
        return torch.stack(values).sum(0)

    def auxiliary(self, teacher: list[Tensor]) -> Tensor:
        """What networks on the teacher's side learn by, summed over losses and layers; ()."""
        total = torch.zeros((), device=teacher[0].device)
        for index, features in enumerate(teacher):
            for loss in self._losses(index):
                if hasattr(loss, "auxiliary"):
                    total = total + loss.auxiliary(features)
        return total

    @torch.no_grad()
    def remember(
        self, student: list[Tensor], teacher: list[Tensor], ids: Tensor, skip: Tensor
    ) -> None:
        """Bring memories up to date after a step.

        Args:
            student: Projected student features per layer.
            teacher: Teacher features per layer.
            ids: (B,) images of the training bank.
            skip: () bool on the device; where True nothing changes.
        """
        for index, (mine, theirs) in enumerate(zip(student, teacher, strict=True)):
            for loss in self._losses(index):
                if hasattr(loss, "remember"):
                    loss.remember(mine, theirs, ids, skip)

    def _losses(self, index: int) -> list[Any]:
        return list(cast(nn.ModuleList, self.layers[index]))


class _Plain(nn.Module):
    """A loss that is a function, behind the call of those that are modules."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        anchors: Anchors | None = None,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        return self.function(student, teacher, anchors)


def _built(
    name: str, part: Callable[..., Any], options: Mapping[str, Any], shape: FeatureShape
) -> nn.Module:
    learned = inspect.isclass(part) and issubclass(part, nn.Module)
    # A module's options follow the shape, a function's stand behind its three tensors.
    parameters = list(inspect.signature(part).parameters.values())[1 if learned else 3 :]
    allowed = [parameter.name for parameter in parameters]
    complaints = [unknown_option(option, allowed) for option in options if option not in allowed]
    for clause in complaints or option_complaints(name, options):
        raise ValueError(f"loss '{name}', option {clause}")
    if learned:
        return part(shape, **options)  # type: ignore[no-any-return]
    return _Plain(partial(part, **options) if options else part)
