"""Worker processes that run one job after another, so that what they import is loaded once.

Each has one thread of arithmetic and a session of its own at the system, so that Ctrl-C on a
terminal reaches the parent alone; the parent then asks every worker once to save and stop. A worker
that dies costs its job and no other's. Workers may be given different environments, which is how
each comes to see one GPU.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

# How many threads the libraries below torch take; they read it when they are loaded.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DONE, FAILED, STOPPED = "done", "failed", "stopped"

Work = Callable[[Any], Any]
Environment = Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: As it was given.
        state: ``done``, ``failed`` or ``stopped`` (asked to, having saved).
        value: What the work returned; of a failure, a sentence.
    """

    job: Any
    state: str
    value: Any


class Stop(BaseException):
    """Raised by work that was asked to stop and has saved what it had."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    environment: Environment
    job: Any = None
    busy: bool = False


def run_jobs(
    work: Work,
    jobs: Sequence[Any],
    workers: int,
    *,
    environments: Sequence[Environment] = ({},),
    started: Callable[[Any], None] | None = None,
) -> Iterator[Outcome]:
    """Run ``work(job)`` for every job, in order of the list as workers become free.

    Args:
        work: A function at the top level of a module. It may raise :class:`Stop`; any other
            exception is that job's failure.
        jobs: Each picklable.
        workers: Processes at a time.
        environments: What the first, second, ... worker finds in its environment beside what this
            process has; more workers than environments begin again with the first. It is there
            before a worker's first import. One that takes a dead one's place gets its environment.
        started: Told of each job as it is handed to a worker.

    Yields:
        Outcomes as they come. After Ctrl-C or SIGTERM no further job begins; those that run end as
        ``stopped``, or as ``done`` where they were through.
    """
    waiting = list(reversed(jobs))
    pool: list[_Worker] = []
    stopping = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stopping
        if stopping:
            raise KeyboardInterrupt
        stopping = True
        for worker in pool:
            if worker.busy and worker.process.is_alive():
                worker.process.terminate()

    def hand_out(worker: _Worker) -> None:
        if waiting and not stopping:
            worker.job, worker.busy = waiting.pop(), True
            # One that has died meanwhile is found by the next wait: its pipe has ended.
            with suppress(OSError):
                worker.pipe.send(worker.job)
            if started is not None:
                started(worker.job)

    before = {
        number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for index in range(min(workers, len(jobs))):
            pool.append(_start(work, environments[index % len(environments)]))
        for worker in pool:
            hand_out(worker)
        while any(worker.busy for worker in pool):
            # A time limit, as on some systems a signal does not end the wait.
            ready = wait([worker.pipe for worker in pool if worker.busy], timeout=0.5)
            for worker in [worker for worker in pool if worker.pipe in ready]:
                job, outcome = worker.job, _outcome(worker)
                worker.busy = False
                if outcome is None:
                    yield _died(worker, job, stopping)
                    if waiting and not stopping:
                        fresh = _start(work, worker.environment)
                        pool[pool.index(worker)] = worker = fresh
                else:
                    yield outcome
                hand_out(worker)
    finally:
        for worker in pool:
            with suppress(OSError):
                worker.pipe.close()  # an idle worker ends here
            if worker.busy:
                worker.process.terminate()
        for worker in pool:
            worker.process.join(timeout=30)
        for number, handler in before.items():
            signal.signal(number, handler)


def attempt(work: Work, job: Any) -> tuple[str, Any]:
    """Do one job: its state and its value, as an :class:`Outcome` has them."""
    try:
        return DONE, work(job)
    except (Stop, KeyboardInterrupt):
        return STOPPED, None
    except Exception as error:
        return FAILED, f"{type(error).__name__}: {error}"


def _outcome(worker: _Worker) -> Outcome | None:
    """What a worker said; None where it is dead."""
    try:
        state, value = worker.pipe.recv()
    except (EOFError, OSError):
        return None
    return Outcome(worker.job, state, value)


def _died(worker: _Worker, job: Any, stopping: bool) -> Outcome:
    worker.process.join(timeout=10)
    if stopping:
        return Outcome(job, STOPPED, None)
    code = worker.process.exitcode
    how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return Outcome(job, FAILED, f"its process ended ({how})")


def _start(work: Work, environment: Environment) -> _Worker:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=False)
    with _inherited(dict.fromkeys(THREADS, "1") | dict(environment)):
        process.start()
    theirs.close()
    return _Worker(process, ours, environment)


@contextmanager
def _inherited(values: Environment) -> Iterator[None]:
    """Put ``values`` into the environment that a process started now inherits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(work: Work, pipe: Connection) -> None:
    """The worker's loop; ends when the parent closes the pipe."""
    if hasattr(os, "setsid"):
        with suppress(OSError):
            os.setsid()
    busy = False

    def stop(*_: object) -> None:
        if busy:
            raise KeyboardInterrupt
        sys.exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    _follow_parent()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            busy = True
            state, value = attempt(work, job)
        except KeyboardInterrupt:  # struck before the job began, or after its end
            state, value = STOPPED, None
        busy = False
        try:
            pipe.send((state, value))
        except OSError:
            return


def _follow_parent() -> None:
    """Ask ourselves to stop when the parent is gone, however that happened."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
