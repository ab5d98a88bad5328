"""Whether a bank has what a task is to predict."""

from __future__ import annotations

from typing import TypeVar

from repfusion_env.data.annotations import Boxes, Keypoints, Masks
from repfusion_env.data.bank import ImageBank

A = TypeVar("A", Masks, Keypoints, Boxes)
KINDS: dict[type, str] = {Masks: "masks", Keypoints: "keypoints", Boxes: "boxes"}


def require_annotation(bank: ImageBank, kind: type[A], task: str) -> A:
    """The annotation that a task learns from.

    Args:
        bank: Training or held-out images.
        kind: :class:`Masks`, :class:`Keypoints` or :class:`Boxes`.
        task: Who asks, for the message.

    Raises:
        ValueError: The bank has none of this kind.
    """
    found = bank.annotations.get(KINDS[kind])
    if isinstance(found, kind):
        return found
    have = [*sorted(bank.annotations), *(["labels"] if bank.labelled else [])]
    raise ValueError(
        f"task '{task}' needs {KINDS[kind]}, but data set '{bank.name}' has "
        f"{' and '.join(have) or 'images alone'}; docs/data.md lists the data sets with "
        f"{KINDS[kind]}"
    )
