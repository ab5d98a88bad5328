"""Observations that were handed out, kept for when the same look is asked for again.

Shape letters: N lanes, D embedding.
"""

from __future__ import annotations

import weakref

from torch import Tensor

from repfusion_env.data.bank import ImageBank
from repfusion_env.observations import Observer


class Looks:
    """Looks at the images that lanes show; the last look is kept, not made twice.

    Args:
        observer: Makes observations.
        keep: Whether anybody will ask again.
    """

    def __init__(self, observer: Observer, *, keep: bool) -> None:
        self._observer, self._keep = observer, keep
        self._kept: tuple[Tensor, Tensor, tuple[object, int]] | None = None

    def new(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """Observations of the images ``ids`` (N,), (N, D), newly made."""
        observations = self._observer(bank, ids)
        if self._keep:
            # A copy, since what is handed out belongs to the caller.
            self._kept = (ids, observations.clone(), self._student())
        return observations

    def again(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """The same once more, where ``ids`` is what :meth:`new` got; a tensor of its own.

        The student may have learned since, if others train it too: then it is a new look.
        """
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] is ids and kept[2] == self._student():
            return kept[1]
        return self._observer(bank, ids)

    def _student(self) -> tuple[object, int]:
        """Which student it is, and how far."""
        trainer = self._observer.trainer
        return weakref.ref(trainer.student), trainer.steps
