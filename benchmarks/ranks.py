"""Two processes under torchrun, a core each, against one process on one core.

    python -m benchmarks.ranks                     # about ten minutes
    python -m benchmarks.ranks --smoke             # does it run? the figures mean nothing

The same lanes are shared by two ranks, 64 each, or held by one process, each pinned to a core of
its own and with one thread, and they take turns: while one side steps, the other sleeps. Teacher
google/ddpm-cifar10-32's network with random weights, student a CIFAR ResNet-18. The gradients of
the two ranks are compared with those of the one process over the full batch, of 16 lanes at most.

The result; a spread is ``{"median", "min", "max"}`` over the rounds::

    {
      "lanes": 128,                               # N, of both ranks together
      "cores": [0, 1],                            # which were used
      "lines": {
        "default reward, fast": {                 # a name of benchmarks.settings.SETTINGS
          "one": spread, "two": spread,           # decisions/s
          "speedup": spread,                      # two over one, round by round
          "seconds_one": [...], "seconds_two": [...]          # of one step
        }
      },
      "speedup": spread,                          # of the line that gains least
      "gradient_error": 1e-7,                     # two against one, relative, student in float64
      "gradient_error_fp32": 3e-6,                # likewise in float32 throughout
      "layout_error_fp32": 5e-6,                  # one process against itself, channels-last
      "skipped": "..."                            # instead of all but cores: why
    }

In float32 a sum in another order moves values across the edges of ReLUs, and with them single
gradients by far more than rounding; ``layout_error_fp32`` is what that makes of one process alone.

Shape letters: N lanes.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.material import DDPM_CIFAR10_UNET, TINY_UNET, Material, make_material
from benchmarks.settings import Size
from benchmarks.timing import machine, machine_lines, shown, spread
from repfusion_env.atomic import write_text

LINES = ("published work, fp32", "published work, fast", "default reward, fast")
STEPS = 2
Say = Callable[[str], None]


def measure(
    size: Size, device: str = "cpu", say: Say = lambda text: None, lines: Sequence[str] = LINES
) -> dict[str, Any]:
    """Time both sides, and compare their gradients.

    Args:
        size: Lanes of one rank, rounds, steps and student.
        device: Not used; the ranks are on the CPU.
        say: Told how far it is.
        lines: Settings by name.

    Returns:
        See the module's docstring.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return {"cores": cores, "skipped": "two cores are needed"}
    size = replace(size, lanes=2 * size.lanes)
    # The last ones: whoever pins nothing tends to the first.
    cores = cores[-2:]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        unet = TINY_UNET if size.smoke else DDPM_CIFAR10_UNET
        material = make_material(folder, unet, images=size.images)
        sides = {
            count: stack.enter_context(_side(count, cores[:count], material, size, folder))
            for count in (1, 2)
        }
        found = {line: _compared(line, sides, size, say) for line in lines}
        gradients = {
            key: _ask(sides[count], "gradient", *options)
            for key, count, options in (
                ("one double", 1, (True, False)),
                ("two double", 2, (True, False)),
                ("one", 1, (False, False)),
                ("two", 2, (False, False)),
                ("one, other layout", 1, (False, True)),
            )
        }
    least = min(found.values(), key=lambda line: line["speedup"]["median"])
    return {
        "lanes": size.lanes,
        "cores": cores,
        "lines": found,
        "speedup": least["speedup"],
        "gradient_error": _error(gradients["two double"], gradients["one double"]),
        "gradient_error_fp32": _error(gradients["two"], gradients["one"]),
        "layout_error_fp32": _error(gradients["one, other layout"], gradients["one"]),
    }


def _compared(line: str, sides: Mapping[int, Connection], size: Size, say: Say) -> dict[str, Any]:
    """One setting on both sides, which take turns."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for side in sides.values():
        _ask(side, "seconds", line, 1)  # builds, and warms up
    for round_ in range(size.rounds):
        for count in (1, 2) if round_ % 2 else (2, 1):
            seconds[count].append(_ask(sides[count], "seconds", line, size.steps) / size.steps)
        gain = seconds[1][-1] / seconds[2][-1]
        say(f"{line}: round {round_ + 1} of {size.rounds}, two over one {gain:.2f}")
    return {
        "one": spread([size.lanes / each for each in seconds[1]]),
        "two": spread([size.lanes / each for each in seconds[2]]),
        "speedup": spread([a / b for a, b in zip(seconds[1], seconds[2], strict=True)]),
        "seconds_one": seconds[1],
        "seconds_two": seconds[2],
    }


@contextmanager
def _side(
    count: int, cores: Sequence[int], material: Material, size: Size, folder: Path
) -> Iterator[Connection]:
    """A connection to rank 0 of so many ranks, each on one of the cores."""
    key = secrets.token_bytes(16)
    address = str(folder / f"ranks-{count}")
    module = ("-m", "benchmarks.rank_worker")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count))
    facts = [str(material.teacher), str(material.bank), material.parameters]
    options = ("--address", address, "--cores", ",".join(map(str, cores)))
    command = [sys.executable, *(launcher if count > 1 else ()), *module, *options]
    command += ["--material", json.dumps(facts), "--size", json.dumps(asdict(size))]
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        "OMP_NUM_THREADS": "1",
        "REPFUSION_BENCHMARK_KEY": key.hex(),
        # From wherever the command was started, the package is this one.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with Listener(address, "AF_UNIX", authkey=key) as listener:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            with _accepted(listener, process) as connection:
                yield connection
                connection.send(None)
                process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _accepted(listener: Listener, process: subprocess.Popen[bytes]) -> Connection:
    """The connection of a process that is still starting.

    Raises:
        RuntimeError: It ended before it called.
    """
    from multiprocessing.connection import wait

    socket = listener._listener._socket  # type: ignore[attr-defined]
    while not wait([socket], timeout=0.5):
        if process.poll() is not None:
            raise RuntimeError(f"a measured process ended at its start: {process.args!r}")
    return listener.accept()


def _ask(side: Connection, *task: Any) -> Any:
    side.send(task)
    try:
        return side.recv()
    except EOFError:
        raise RuntimeError(f"a measured process ended during {task}; see above") from None


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """Length of the difference over the length."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def table(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    if "skipped" in result:
        return f"Ranks were not measured: {result['skipped']}."
    rows = [
        "| line | one process, decisions/s | two ranks, decisions/s | two over one |",
        "| --- | --- | --- | --- |",
    ]
    for name, line in result["lines"].items():
        cells = [
            shown(line["one"], ".1f"),
            shown(line["two"], ".1f"),
            shown(line["speedup"], ".2f"),
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows += [
        "",
        f"{result['lanes']} lanes in all; one core and one thread for each process. Gradients of "
        f"two ranks against the full batch on one, relative error {result['gradient_error']:.1e} "
        f"with the student in float64, {result['gradient_error_fp32']:.1e} in float32, where one "
        "process in another memory layout differs from itself by "
        f"{result['layout_error_fp32']:.1e}.",
    ]
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything here")
    parser.add_argument("--smoke", action="store_true", help="tiny networks; seconds")
    parser.add_argument("--rounds", type=int, default=7, help="samples per line (default: 7)")
    parser.add_argument("--lanes", type=int, default=64, help="of each rank (default: 64)")
    chosen = parser.parse_args(argv)
    for name in ("rounds", "lanes"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name}: {getattr(chosen, name)} given; it must be 1 or more")
    if chosen.json is not None and not chosen.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder '{chosen.json.parent}'")
    size = Size(chosen.lanes, chosen.rounds, STEPS, "resnet18")
    if chosen.smoke:
        size = Size(2, 1, 1, "small_cnn", smoke=True)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{text} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)

    result = measure(size, say=say)
    facts = machine(torch.device("cpu"))
    print("\n".join([*machine_lines(facts), "", table(result)]))
    if chosen.json is not None:
        kept = {"machine": facts, "smoke": size.smoke} | result
        write_text(chosen.json, json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
