"""What :mod:`benchmarks.ranks` starts: one process, or under torchrun a rank, on a core of its own.

Rank 0 is told what to do over a local connection, and tells the others.

Shape letters: N lanes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.material import Material
from benchmarks.settings import SETTINGS, Setting, Size, experiment
from repfusion_env.config_loading import check, merge, to_dict
from repfusion_env.ranks import Ranks, connect
from repfusion_env.vector_env import RepFusionVectorEnv

PREPARED = 16  # batches of actions drawn before the clock starts


def named(name: str) -> Setting:
    """The setting of that name."""
    return next(setting for setting in SETTINGS if setting.name == name)


class Worker:
    """Environments by the setting's name, and what is measured of them.

    Args:
        ranks: The processes that step together.
        material: Teacher and images.
        size: Lanes of all ranks, and student.
    """

    def __init__(self, ranks: Ranks, material: Material, size: Size) -> None:
        self.ranks, self.material, self.size = ranks, material, size
        self._steps: dict[str, Callable[[], object]] = {}

    def seconds(self, name: str, steps: int) -> float:
        """Of ``steps`` steps under one setting, from all ranks' beginning to all ranks' end."""
        step = self._steps.get(name)
        if step is None:
            step = self._steps[name] = self._built(experiment_of(name, self))
        self.ranks.wait()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        self.ranks.wait()
        return time.perf_counter() - started

    def _built(self, config: Any) -> Callable[[], object]:
        env = RepFusionVectorEnv(config=config, ranks=self.ranks)
        env.reset(seed=0)
        batches = random_batches(env, PREPARED)
        number = 0

        def step() -> None:
            nonlocal number
            env.step(batches[number % PREPARED])
            number += 1

        step()  # pays for memory and primitives
        return step

    def gradient(self, double: bool, channels_last: bool) -> Tensor:
        """All of the student's gradients after one fp32 step, in one row of float64.

        Args:
            double: Run the student's backbone in float64, where rounding moves no value across the
                edge of a ReLU.
            channels_last: Another order of the same sums, for comparison.
        """
        # float64 has no fast convolutions; a few lanes show the same.
        few = Worker(self.ranks, self.material, replace(self.size, lanes=min(self.size.lanes, 16)))
        config = experiment_of("published work, fp32", few)
        changes = {"student.channels_last": channels_last, "optimizer.gradient_clip": 0.0}
        config = check(merge(to_dict(config), changes))
        env = RepFusionVectorEnv(config=config, ranks=self.ranks)
        env.reset(seed=0)
        backbone = env.trainer.student.backbone
        if double:
            backbone.double().register_forward_pre_hook(_in_double)
        env.step(random_batches(env, 1)[0])
        found = [p.grad for p in env.trainer.student.parameters() if p.grad is not None]
        return torch.cat([gradient.double().contiguous().view(-1) for gradient in found])


def experiment_of(name: str, worker: Worker) -> Any:
    """The configuration of one setting on the CPU."""
    return experiment(named(name), worker.material, worker.size, "cpu")


def random_batches(env: RepFusionVectorEnv, count: int) -> Tensor:
    """This rank's share of actions for so many steps, (count, n), the same lanes' on any number."""
    generator = torch.Generator().manual_seed(0)
    lanes = env.num_envs * env.ranks.count
    drawn = torch.randint(len(env.grid), (count, lanes), generator=generator)
    return env.ranks.share(drawn.T).T


def _in_double(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.double() for value in inputs)


def serve(worker: Worker, connection: Connection | None) -> None:
    """Do what rank 0 is told until it is told no more.

    Args:
        worker: On every rank.
        connection: Of rank 0.
    """

    def told() -> Any:
        assert connection is not None
        return connection.recv()

    while (task := worker.ranks.from_main(told)) is not None:
        kind, *arguments = task
        answer: Any
        if kind == "seconds":
            answer = worker.seconds(*arguments)
        else:
            answer = worker.gradient(*arguments).numpy()
        if connection is not None:
            connection.send(answer)


def main(argv: Sequence[str] | None = None) -> int:
    """The process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_worker")
    parser.add_argument("--address", required=True)
    parser.add_argument("--cores", required=True, help="one for each rank, with commas between")
    parser.add_argument("--material", required=True)
    parser.add_argument("--size", required=True)
    chosen = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):
        cores = [int(core) for core in chosen.cores.split(",")]
        os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", 0))]})
    torch.set_num_threads(1)
    ranks = connect()
    teacher, bank, parameters = json.loads(chosen.material)
    worker = Worker(
        ranks, Material(Path(teacher), Path(bank), parameters), Size(**json.loads(chosen.size))
    )
    key = bytes.fromhex(os.environ["REPFUSION_BENCHMARK_KEY"])
    connection = Client(chosen.address, authkey=key) if ranks.main else None
    serve(worker, connection)
    ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
