"""How far a long loop is: a live bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

PLAIN_LINE_SECONDS = 10.0
# Work that is done sooner needs no bar.
PATIENCE_SECONDS = 2.0

T = TypeVar("T", bound=Sized)


class Progress:
    """Context manager around a long loop; writes to stderr.

    On a terminal: a bar with the rate and the time left, and under it the figures of the last
    :meth:`update`. Elsewhere: a plain line about every 10 s and one at the end.

    Args:
        total: Units in all.
        unit: What is counted, plural.
        description: What the loop does, a word or two.
        initial: Units that an earlier process did already; they do not count for the rate.
        started: When the loop began, by the monotonic clock; None: when the block is entered.
    """

    _shown = False  # whether one is on the screen

    def __init__(
        self,
        total: int,
        unit: str = "decisions",
        *,
        description: str,
        initial: int = 0,
        started: float | None = None,
    ) -> None:
        self.total = total
        self.unit = unit
        self.description = description
        self._initial = self._completed = initial
        self._began = started
        self._figures: dict[str, float] = {}
        self._bar: RichProgress | None = None
        self._start = self._last_line = time.monotonic()
        self._printed: int | None = None
        self._silent = False

    def __enter__(self) -> Progress:
        self._last_line = time.monotonic()
        self._start = self._last_line if self._began is None else self._began
        self._silent = Progress._shown
        if self._silent:
            return self
        Progress._shown = True
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _live_bar(self)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._silent:
            return
        Progress._shown = False
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._completed)
            self._bar.stop()
            self._bar = None
        elif self._printed != self._completed:
            self._print_line()

    def update(self, completed: int, **figures: float) -> None:
        """Say how many units are done in all, and the figures to show beside them."""
        self._completed = completed
        self._figures.update(figures)
        if self._silent:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=completed)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._print_line()

    @classmethod
    def silence(cls) -> None:
        """Show nothing in this process from now on, since another one does."""
        cls._shown = True

    @property
    def rate(self) -> float:
        """Units per second since the loop began."""
        return (self._completed - self._initial) / max(time.monotonic() - self._start, 1e-9)

    def line(self) -> str:
        """Where the loop is, as one line of plain text."""
        elapsed = time.monotonic() - self._start
        parts = [
            f"{self.description}: {self._completed:,}/{self.total:,} {self.unit}",
            f"{_speed(self.rate)}/s",
            f"{_clock(elapsed)} elapsed",
        ]
        if 0 < self._completed < self.total and self.rate > 0:
            parts.append(f"{_clock((self.total - self._completed) / self.rate)} left")
        return ", ".join([*parts, *self.figures()])

    def figures(self) -> Iterable[str]:
        """The figures, each as ``name value``."""
        return [f"{name} {_short(value)}" for name, value in self._figures.items()]

    def _print_line(self) -> None:
        print(self.line(), file=sys.stderr, flush=True)
        self._last_line = time.monotonic()
        self._printed = self._completed


def watched(pieces: Iterable[T], total: int, *, description: str, unit: str) -> Iterator[T]:
    """Pass ``pieces`` on; where the loop over them takes long, show how far it is.

    Args:
        pieces: What the loop is over.
        total: Of their lengths.
        description: What the loop does, a word or two.
        unit: What is counted, plural.
    """
    started, done = time.monotonic(), 0
    progress: Progress | None = None
    with ExitStack() as stack:
        for piece in pieces:
            yield piece
            done += len(piece)
            if progress is not None:
                progress.update(done)
            elif time.monotonic() - started >= PATIENCE_SECONDS and done < total:
                progress = Progress(total, unit, description=description, started=started)
                stack.enter_context(progress)
                progress.update(done)


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _short(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _live_bar(progress: Progress) -> RichProgress:
    """Built here so that only a terminal pays for rich's import."""
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Count(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{int(task.completed):,}/{progress.total:,} {progress.unit}")

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = progress.rate if task.finished else task.speed or progress.rate
            return Text(f"{_speed(speed)}/s", style="cyan")

    class BarWithFigures(Bars):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            if progress.figures():
                indent = " " * (len(progress.description) + 1)
                line = Text(indent, no_wrap=True, overflow="ellipsis")
                for index, (name, value) in enumerate(progress._figures.items()):
                    line.append(" · " if index else "", style="dim")
                    line.append(f"{name} ", style="dim")
                    line.append(_short(value), style="bold")
                yield line

    bar = BarWithFigures(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
        Count(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        # With stdout in a file, rich would send prints to the terminal instead.
        redirect_stdout=sys.stdout.isatty(),
        expand=True,
        refresh_per_second=5,
    )
    bar.add_task(progress.description, total=progress.total, completed=progress._initial)
    return bar
