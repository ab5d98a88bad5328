"""Jobs on the machines of a Ray cluster, which share a file system with this one.

Ray is imported when it is asked for. A job is a task of one core and, where runs are on GPUs, a
share of one. Interrupted, this process cancels its tasks; Ray then raises Ctrl-C in each of them,
at which a run saves and ends.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import repfusion_env
from agents.comparison.places import Places
from agents.comparison.workers import FAILED, STOPPED, THREADS, Outcome, Work, attempt
from repfusion_env.atomic import write_text
from repfusion_env.config_loading import ConfigError

# Ends of a task that are no job's own.
MISPLACED, LOST = "misplaced", "lost"
# So often a job begins again after the loss of the machine that it ran on.
RETRIES = 2
BEACON = ".cluster"


@dataclass(frozen=True)
class _Site:
    """What a machine must have to be of use.

    Attributes:
        workplace: The working directory, to which paths of the configuration are relative.
        folder: The comparison's.
        token: What its file :data:`BEACON` holds, so that a folder of the same name is not taken
            for this one.
        version: Of the package.
    """

    workplace: str
    folder: str
    token: str
    version: str


@contextmanager
def connected(places: Places) -> Iterator[None]:
    """Join the cluster, or start one on this machine, until the block ends.

    Raises:
        ConfigError: No cluster answers, or it does not take this version of Ray or Python.
    """
    import ray

    if ray.is_initialized():  # somebody else's to end
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    option, address = "--address", places.address
    if address is None:
        option, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS")
    _knock(option, address)
    try:
        ray.init(address=places.address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        told = f"{option}: '{address}' given; " if address else "--engine ray: "
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ConfigError([f"{told}Ray cannot be reached there: {reason.strip()}"]) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(option: str, address: str | None) -> None:
    """Refuse an address at which nobody listens; Ray itself would try for many minutes.

    Raises:
        ConfigError: It has no port, or there is no answer.
    """
    if address in (None, "", "auto", "local"):
        return
    host, _, port = str(address).removeprefix("ray://").rpartition(":")
    told = f"{option}: '{address}' given; "
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError([f"{told}it must be HOST:PORT, ray://HOST:PORT, auto or local"])
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError([f"{told}no Ray cluster answers there ({reason})"]) from None


def run_on_ray(
    work: Work,
    jobs: Sequence[Any],
    places: Places,
    folder: Path,
    started: Callable[[Any], None],
) -> Iterator[Outcome]:
    """Run ``work(job)`` for every job, in order of the list as the cluster has room.

    Args:
        work: A function at the top level of a module that all machines can import.
        jobs: Each picklable.
        places: How many at a time, and whether they need GPUs.
        folder: Of this machine; the others must see the same files under the same path.
        started: Told of each job as it is handed to Ray.

    Yields:
        Outcomes as they come. After Ctrl-C or SIGTERM no further job begins; those that run end as
        ``stopped``, or as ``done`` where they were through. A job whose machine is lost goes on at
        another one from its last checkpoint.

    Raises:
        ConfigError: A machine does not see the folder, or has another version of the package. What
            runs on others is stopped first.
    """
    import ray

    site, share = _mark(folder), _share(places)
    task = ray.remote(max_retries=0)(_visit).options(num_cpus=1, num_gpus=share)
    waiting, running = list(reversed(jobs)), dict[Any, Any]()
    asked, stopping, misplaced = 0, False, ""
    losses: dict[int, int] = {}

    def ask_to_stop(*_: object) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise KeyboardInterrupt

    before = {
        number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while running or (waiting and not stopping):
            # Not in the handler, which may have struck in the middle of one of Ray's own calls.
            if (asked or misplaced) and not stopping:
                stopping = True
                for reference in running:
                    ray.cancel(reference)
            while waiting and not stopping and len(running) < (places.jobs or _room(share)):
                job = waiting.pop()
                running[task.remote(work, job, site)] = job
                started(job)
            for reference in ray.wait(list(running), timeout=0.5)[0] if running else []:
                outcome = _outcome(reference, running.pop(reference), stopping)
                if outcome.state == MISPLACED:
                    misplaced = misplaced or str(outcome.value)
                elif outcome.state != LOST:
                    yield outcome
                elif losses.setdefault(id(outcome.job), 0) < RETRIES:
                    losses[id(outcome.job)] += 1
                    waiting.append(outcome.job)
                else:
                    yield replace(outcome, state=FAILED)
        if misplaced:
            raise ConfigError([misplaced])
    finally:
        for reference in running:
            with suppress(Exception):
                ray.cancel(reference, force=True)
        for number, handler in before.items():
            signal.signal(number, handler)
        (folder / BEACON).unlink(missing_ok=True)


def _mark(folder: Path) -> _Site:
    token = secrets.token_hex(8)
    write_text(folder / BEACON, token)
    return _Site(str(Path.cwd()), str(folder.resolve()), token, repfusion_env.__version__)


def _share(places: Places) -> float:
    """The part of a GPU that a job asks for."""
    import ray

    there = float(ray.cluster_resources().get("GPU", 0))
    if places.device == "cuda" and not there:
        print("the cluster has no GPU now; runs wait for one", file=sys.stderr, flush=True)
    return 1 / places.per_gpu if places.device == "cuda" or there * (places.device == "auto") else 0


def _room(share: float) -> int:
    """How many jobs the cluster has room for; machines may join and leave meanwhile."""
    import ray

    have = ray.cluster_resources()
    room = float(have.get("CPU", 0))
    if share:
        room = min(room, float(have.get("GPU", 0)) / share)
    # One is always handed over: where there is no machine at all, some clusters then fetch one.
    return max(1, int(room + 1e-6))


def _outcome(reference: Any, job: Any, stopping: bool) -> Outcome:
    """What became of a task."""
    import ray
    from ray import exceptions

    try:
        state, value = ray.get(reference)
    except exceptions.TaskCancelledError:
        return Outcome(job, STOPPED, None)
    except exceptions.RayTaskError as error:
        # Failures of the job itself come back as values: this one never got so far.
        said = [line for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        return Outcome(job, MISPLACED, f"a machine of the cluster cannot begin: {said[-1].strip()}")
    except exceptions.RayError as error:
        if stopping:
            return Outcome(job, STOPPED, None)
        lost = isinstance(error, exceptions.NodeDiedError)
        how = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
        text = f"its process ended ({type(error).__name__}: {how})"
        return Outcome(job, LOST if lost else FAILED, text)
    return Outcome(job, state, value)


def _visit(work: Work, job: Any, site: _Site) -> tuple[str, Any]:
    """One job on a machine of the cluster."""
    here = socket.gethostname()
    if repfusion_env.__version__ != site.version:
        return MISPLACED, (
            f"machine '{here}' has repfusion-env {repfusion_env.__version__}, and this one "
            f"{site.version}; install the same everywhere"
        )
    try:
        os.chdir(site.workplace)
        seen = (Path(site.folder) / BEACON).read_text(encoding="utf-8") == site.token
    except OSError:
        seen = False
    if not seen:
        return MISPLACED, (
            f"machine '{here}' does not see '{site.folder}' and '{site.workplace}' as this one "
            "does; on a cluster both must be on a file system that all machines share"
        )
    for name in THREADS:
        os.environ.setdefault(name, "1")
    return attempt(work, job)
