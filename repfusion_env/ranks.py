"""Ranks: processes that share one run, each with its part of the lanes.

Started by ``torchrun``, W processes do together what one process does
alone; see ``docs/distributed.md``. Whatever needs the others asks :class:`Ranks`, whose plain form
:data:`ALONE` is one process: everything is its own, and nothing is imported for it.

Shape letters: W ranks, N lanes of all of them, n = N / W lanes of one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class OtherRankError(ValueError):
    """Another rank could not go on; its sentence."""


class Ranks:
    """The processes of a run, as one of them sees them. This class is a run of one process.

    Except for :meth:`share` all methods must be called by all ranks, in the same order.

    Attributes:
        index: Which rank this is, from 0.
        count: W.
        local_index: Which of those on this machine.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0

    @property
    def main(self) -> bool:
        """Whether this rank writes the run folder and talks to the user."""
        return self.index == 0

    @property
    def several(self) -> bool:
        """Whether there is anybody else."""
        return self.count > 1

    @property
    def purpose(self) -> tuple[object, ...]:
        """What tells this rank's own random numbers from those of rank 0, for ``derive_seed``."""
        return ("rank", self.index) if self.index else ()

    def share(self, values: Tensor, blocks: int = 1) -> Tensor:
        """This rank's rows.

        Args:
            values: Rows of all lanes, (N, ...), or of ``blocks`` steps one after the other,
                (blocks * N, ...).
            blocks: How many.

        Returns:
            (n, ...) or (blocks * n, ...).
        """
        if self.count == 1:
            return values
        shape = (blocks, self.count, -1, *values.shape[1:])
        return values.reshape(shape)[:, self.index].flatten(0, 1)

    def all(self, values: Tensor, blocks: int = 1) -> Tensor:
        """The rows of all ranks in the order of the lanes: what :meth:`share` takes apart.

        Gradients of what the ranks make of them are added up on the way back.

        Args:
            values: This rank's rows, (n, ...) or (blocks * n, ...).
            blocks: How many steps they are of.

        Returns:
            (N, ...) or (blocks * N, ...).
        """
        return values

    def all_own_first(self, values: Tensor) -> Tensor:
        """The rows of all ranks, (N, ...), this rank's before the others'."""
        return self.all(values).roll(-self.index * len(values), 0)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over the ranks; one exchange for each of their dtypes."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sum over the ranks; one exchange for each of their dtypes."""

    def any(self, flag: bool) -> bool:
        """Whether the flag of any rank is set. The host waits for the others', not for a device."""
        return flag

    def wait(self) -> None:
        """Until all ranks are here."""

    def from_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, for all ranks.

        Args:
            work: Called on rank 0 alone; its result is pickled for the others.

        Raises:
            OtherRankError: ``work`` failed on rank 0, where its own exception is raised.
        """
        return work()

    def on_main(self, work: Callable[[], Any]) -> None:
        """Let rank 0 do something while the others wait; errors as in :meth:`from_main`."""

        def quietly() -> None:
            work()

        self.from_main(quietly)

    def everywhere(self, work: Callable[[], T]) -> T:
        """What ``work`` gives here, once it has succeeded on all ranks.

        Raises:
            OtherRankError: ``work`` failed on another rank; where it failed, its own exception.
        """
        return work()

    def close(self) -> None:
        """Let go of the others, after the last exchange."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self


ALONE = Ranks()


def launched(environment: dict[str, str] | None = None) -> tuple[int, int]:
    """(index, W) as the launcher says in ``RANK`` and ``WORLD_SIZE``; (0, 1) without one.

    Args:
        environment: Default: this process's.

    Raises:
        ValueError: The variables are no whole numbers.
    """
    given = os.environ if environment is None else environment
    # A cluster's own variables may set one of them; torchrun and accelerate set all three.
    if not all(name in given for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return 0, 1
    try:
        return int(given["RANK"]), int(given["WORLD_SIZE"])
    except ValueError:
        raise ValueError(
            f"RANK '{given['RANK']}' and WORLD_SIZE '{given['WORLD_SIZE']}' stand in the "
            "environment; they must be whole numbers, as torchrun sets them"
        ) from None


def say(text: str) -> None:
    """Tell the user on stderr; of a machine's ranks the first one speaks for all.

    Each machine has a console of its own, and what is wrong may be so on one of them alone.
    """
    try:
        index, _ = launched()
    except ValueError:
        index = 0
    if index == 0 or os.environ.get("LOCAL_RANK") == "0":
        print(text, file=sys.stderr, flush=True)


def connect() -> Ranks:
    """Meet the other processes that the launcher started; :data:`ALONE` where there are none.

    Raises:
        ValueError: The variables of the launcher cannot be used.
    """
    if launched()[1] == 1:
        return ALONE
    from repfusion_env.rank_group import RankGroup

    return RankGroup()


def refuse_several(command: str) -> None:
    """Say that a command runs in one process, where a launcher has started more.

    Raises:
        ValueError: It has.
    """
    count = launched()[1]
    if count > 1:
        raise ValueError(
            f"{command} runs in one process, but {count} were started; start it without torchrun "
            "(several processes train with train_reinforce: docs/distributed.md)"
        )
