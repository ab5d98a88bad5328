"""What runs the jobs of a comparison, by name: processes of this machine, or Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.comparison import ray_engine
from agents.comparison.places import PROCESSES, RAY, Places
from agents.comparison.workers import Outcome, Work, run_jobs

Started = Callable[[Any], None]


@dataclass(frozen=True)
class Engine:
    """A way to run jobs.

    Attributes:
        open: Connects to what runs them, until the block ends.
        run: (work, jobs, places, folder, started) to outcomes, as
            :func:`agents.comparison.workers.run_jobs` describes them.
    """

    open: Callable[[Places], AbstractContextManager[None]]
    run: Callable[[Work, Sequence[Any], Places, Path, Started], Iterator[Outcome]]


def _run_processes(
    work: Work, jobs: Sequence[Any], places: Places, folder: Path, started: Started
) -> Iterator[Outcome]:
    environments = places.environments
    return run_jobs(work, jobs, places.jobs or 1, environments=environments, started=started)


ENGINES: dict[str, Engine] = {
    PROCESSES: Engine(lambda places: nullcontext(), _run_processes),
    RAY: Engine(ray_engine.connected, ray_engine.run_on_ray),
}


def run_on(
    work: Work, jobs: Sequence[Any], places: Places, folder: Path, *, started: Started
) -> Iterator[Outcome]:
    """Run ``work(job)`` for every job where ``places`` says.

    Args:
        work: As :func:`agents.comparison.workers.run_jobs` takes it.
        jobs: Each picklable.
        places: Whose engine is open.
        folder: That jobs write to, which all machines must share.
        started: Told of each job as it is handed out.
    """
    return ENGINES[places.engine].run(work, jobs, places, folder, started)
