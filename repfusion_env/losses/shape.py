"""What a loss with parts of its own is built for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Anchors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FeatureShape:
    """The features of one teacher layer as its loss gets them.

    Attributes:
        width: Channels F of the teacher's feature and of the projected student's.
        dense: Whether features are maps ``(B, F, h, w)`` instead of ``(B, F)``.
        size: ``(h, w)`` of the map; ``(1, 1)`` where pooled.
        images: Images M of the training bank.
    """

    width: int
    dense: bool = False
    size: tuple[int, int] = (1, 1)
    images: int = 1
