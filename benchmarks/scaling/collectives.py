"""Seconds of an all-reduce between processes of this machine, by size and number of processes.

    python -m benchmarks.scaling.collectives --json FILE

Gloo over the loopback; the processes share the machine's memory, so this says what its ranks cost,
not what a network would.

Shape letters: W ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Bystanders, machine, spread
from repfusion_env.atomic import write_text

RANKS = (2, 4)
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 26)  # bytes; ResNet-18's gradient is 2 ** 25.4
ROUNDS = 9


def measure(
    ranks: Sequence[int] = RANKS, sizes: Sequence[int] = SIZES, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Time all-reduces.

    Args:
        ranks: Each W to measure.
        sizes: Bytes of fp32 numbers.
        rounds: Samples of each.

    Returns:
        For each, ``ranks``, ``bytes`` and ``seconds``, a spread over the rounds.
    """
    import torch.multiprocessing as processes

    found = []
    for count in ranks:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (count, folder, tuple(sizes), rounds)
            processes.spawn(_rank, arguments, nprocs=count)  # type: ignore[no-untyped-call]
            samples = json.loads((Path(folder) / "samples.json").read_text(encoding="utf-8"))
        found += [
            {"ranks": count, "bytes": size, "seconds": spread(seconds)}
            for size, seconds in zip(sizes, samples, strict=True)
        ]
    return found


def _rank(rank: int, count: int, folder: str, sizes: Sequence[int], rounds: int) -> None:
    from torch import distributed

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    values = [torch.zeros(size // 4) for size in sizes]
    samples: list[list[float]] = [[] for _ in sizes]
    # Sizes take turns; the first round pays for connections and memory.
    for _ in range(rounds + 1):
        for numbers, seconds in zip(values, samples, strict=True):
            distributed.barrier()
            started = time.perf_counter()
            distributed.all_reduce(numbers)
            seconds.append(time.perf_counter() - started)
    if rank == 0:
        measured = [seconds[1:] for seconds in samples]
        write_text(Path(folder) / "samples.json", json.dumps(measured))
    distributed.destroy_process_group()


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
        print(f"{result['ranks']} ranks, {result['bytes']:>9} bytes: {1000 * seconds:.3f} ms")
    if chosen.json is not None:
        facts = machine(torch.device("cpu")) | {"threads": 1, "others": bystanders.share()}
        found = {"machine": facts, "collectives": results}
        write_text(chosen.json, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
