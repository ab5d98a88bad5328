"""Where the runs of a comparison take place: processes of this machine with their GPUs, a cluster.

Nothing heavy is imported before a device has to be counted.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from agents.comparison.arms import Arm, arm_config
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import ConfigError

PROCESSES, RAY = "processes", "ray"


@dataclass(frozen=True)
class Places:
    """Where jobs are run, and how many at a time.

    Attributes:
        engine: A key of :data:`agents.comparison.engines.ENGINES`.
        jobs: Most at a time; None: as many as the cluster has room for.
        gpus: The GPUs of this machine among which its processes are dealt, by the names that
            CUDA_VISIBLE_DEVICES has for them; empty: a process sees what this one sees.
        per_gpu: Jobs that share a GPU.
        device: What jobs ask of a cluster's machines: ``cpu``, ``cuda``, or ``auto``, which is a
            GPU where the cluster has any.
        address: Of the cluster; None: the engine looks for one, and else starts one here.
    """

    engine: str = PROCESSES
    jobs: int | None = 1
    gpus: tuple[str, ...] = ()
    per_gpu: int = 1
    device: str = "cpu"
    address: str | None = None

    @property
    def environments(self) -> list[dict[str, str]]:
        """What the first, second, ... process finds in its environment."""
        return [{"CUDA_VISIBLE_DEVICES": name} for name in self.gpus] or [{}]


def used_devices(config: ExperimentConfig, arms: Iterable[Arm]) -> set[str]:
    """What the configurations of all arms name as devices."""
    configs = [arm_config(config, arm) for arm in arms]
    return {name for one in configs for name in (one.device, one.sb3.device)}


def local_places(jobs: int | None, per_gpu: int | None, devices: Collection[str]) -> Places:
    """Processes of this machine, dealt out among its GPUs where runs ask for one.

    Args:
        jobs: Most processes; None: one for each core, or ``per_gpu`` for each GPU.
        per_gpu: Most processes on one GPU; None: one, or what ``jobs`` makes of it.
        devices: That runs name: auto, cpu, cuda, cuda:<index>. With an index in one of them no
            process is tied to a GPU, as the index would then mean another one.

    Raises:
        ConfigError: A GPU is asked for that is not there, or shared where there is none.
    """
    gpus = () if set(devices) <= {"cpu"} else visible_gpus()
    _check_devices(devices, len(gpus))
    if not gpus:
        if per_gpu is not None:
            why = "all runs are on the cpu" if set(devices) <= {"cpu"} else "this machine has none"
            raise ConfigError(
                [f"--jobs-per-gpu: {per_gpu} given, but there is no GPU to share: {why}; --jobs "
                 "says how many processes there are"]
            )  # fmt: skip
        return Places(jobs=jobs or _cores())
    indexed = {name for name in devices if re.fullmatch(r"cuda:\d+", name)}
    if indexed:
        # The others are on the first one.
        used = len({name for name in devices if name != "cpu"} - indexed) > 0
        count = len(indexed | ({"cuda:0"} if used else set()))
    else:
        count = len(gpus)
    room = count * (per_gpu or 1)
    if jobs is not None:
        room = jobs if per_gpu is None else min(jobs, room)
    return Places(jobs=room, gpus=() if indexed else gpus, per_gpu=per_gpu or 1)


def cluster_places(
    jobs: int | None, per_gpu: int | None, devices: Collection[str], address: str | None
) -> Places:
    """The machines of a Ray cluster.

    Args:
        jobs: Most at a time; None: what the cluster has room for.
        per_gpu: Jobs that share a GPU; None: one.
        devices: That runs name.
        address: Of the cluster, or None.

    Raises:
        ConfigError: Ray is not installed, or a run names a GPU by its index.
    """
    problems = [
        f"device: '{name}' given; on a cluster the GPUs are dealt out, so write cuda or auto"
        for name in sorted(devices)
        if name.startswith("cuda:")
    ]
    if importlib.util.find_spec("ray") is None:
        problems.append(
            "--engine ray needs Ray; install it by pip install 'repfusion-env[ray]', here and on "
            "every machine of the cluster"
        )
    asked = next((name for name in ("cuda", "auto") if name in devices), "cpu")
    if asked == "cpu" and per_gpu is not None:
        problems.append(
            f"--jobs-per-gpu: {per_gpu} given, but there is no GPU to share: all runs are on the "
            "cpu; --jobs says how many run at a time"
        )
    if problems:
        raise ConfigError(problems)
    return Places(RAY, jobs, (), per_gpu or 1, asked, address)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them: indices or identifiers."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if given is None else given.split(",")
    return tuple(name.strip() for name in names[:count])


def _check_devices(devices: Collection[str], count: int) -> None:
    """Refuse before the first run what each of them would fail with."""
    there = ", ".join(["auto", "cpu", *(["cuda"] if count else [])])
    there += "".join(f", cuda:{index}" for index in range(count))
    problems = [
        f"device: '{name}' given, but this machine has {count} usable CUDA devices; allowed here: "
        f"{there}"
        for name in sorted(devices)
        if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= count
    ]
    if problems:
        raise ConfigError(problems)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
