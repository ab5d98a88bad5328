"""Seconds of an all-reduce between processes of this machine, by size and number of processes.

    python -m benchmarks.scaling.collectives --json FILE

By gloo over the loopback, whose time is one of bytes and hops as a network's is; and as the ranks
of a run do it here, through memory that they share (see ``docs/distributed.md``). Both say what
ranks of this machine cost, not what a network would.

Shape letters: W ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Bystanders, machine, spread
from repfusion_env.atomic import write_text
from repfusion_env.ranks import connect

WAYS = ("gloo", "ranks")
RANKS = (2, 4)
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 26)  # bytes; ResNet-18's gradient is 2 ** 25.4
ROUNDS = 9
IN_A_ROW = 1 << 22  # bytes


def measure(
    ranks: Sequence[int] = RANKS, sizes: Sequence[int] = SIZES, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Time all-reduces.

    Args:
        ranks: Each W to measure.
        sizes: Bytes of fp32 numbers.
        rounds: Samples of each.

    Returns:
        For each, ``by`` (of :data:`WAYS`), ``ranks``, ``bytes`` and ``seconds``, a spread over the
        rounds.
    """
    import torch.multiprocessing as processes

    found = []
    for count in ranks:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (count, _free_port(), folder, tuple(sizes), rounds)
            processes.spawn(_rank, arguments, nprocs=count)  # type: ignore[no-untyped-call]
            samples = json.loads((Path(folder) / "samples.json").read_text(encoding="utf-8"))
        found += [
            {"by": way, "ranks": count, "bytes": size, "seconds": spread(seconds)}
            for way in WAYS
            for size, seconds in zip(sizes, samples[way], strict=True)
        ]
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(rank: int, count: int, port: int, folder: str, sizes: Sequence[int], rounds: int) -> None:
    from torch import distributed

    torch.set_num_threads(1)
    # What torchrun says; the ranks are the CPU's on a machine with GPUs, too.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ranks = connect()
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "gloo": distributed.all_reduce,
        "ranks": lambda numbers: ranks.mean_([numbers]),
    }
    values = [torch.zeros(size // 4) for size in sizes]
    samples: dict[str, list[list[float]]] = {way: [[] for _ in sizes] for way in WAYS}
    # Ways and sizes take turns; the first round pays for connections and memory.
    for _ in range(rounds + 1):
        for way in WAYS:
            for numbers, seconds in zip(values, samples[way], strict=True):
                # Ranks do not wake up at once: short exchanges are timed many in a row.
                repeat = max(1, min(50, IN_A_ROW // numbers.nbytes))
                ranks.wait()
                started = time.perf_counter()
                for _ in range(repeat):
                    ways[way](numbers)
                seconds.append((time.perf_counter() - started) / repeat)
    if rank == 0:
        measured = {way: [seconds[1:] for seconds in samples[way]] for way in WAYS}
        write_text(Path(folder) / "samples.json", json.dumps(measured))
    ranks.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling.collectives",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures here")
    chosen = parser.parse_args(argv)
    if chosen.json is not None and not chosen.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder '{chosen.json.parent}'")
    bystanders = Bystanders()
    results = measure()
    for result in results:
        seconds = result["seconds"]["median"]
        print(
            f"{result['by']}: {result['ranks']} ranks, {result['bytes']:>9} bytes: "
            f"{1000 * seconds:.3f} ms"
        )
    if chosen.json is not None:
        facts = machine(torch.device("cpu")) | {"threads": 1, "others": bystanders.share()}
        found = {"machine": facts, "collectives": results}
        write_text(chosen.json, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
