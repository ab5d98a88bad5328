"""Everything that the bars of speed need, measured in one run.

    python -m benchmarks.throughput --json FILE              # all parts; half an hour
    python -m benchmarks.throughput --only steps,costs       # some of them
    python -m benchmarks.throughput --smoke                  # does it run? the figures mean nothing

Ways of doing the work take turns in one process (see :mod:`benchmarks.timing`), so that ratios hold
on a machine that others use. The teacher is google/ddpm-cifar10-32's network with random weights,
the student a CIFAR ResNet-18. Parts, each a module with ``measure(size, device, ...)``:

- ``steps``: the published step, and our environment's with and without everything that is fast.
- ``costs``: environment layer and SB3 adapter over the bare trainer, and where a step's time goes.
- ``device``: matrix peak of the device and what of it the on-line step reaches.
- ``memory``: peak by mode, and whether memory stays flat over 5,000 steps.
- ``fidelity``: how far the fast paths' features, gradients and rewards are from the plain path's.
- ``ranks``: two processes under torchrun against one.
- ``streaming``: images that are decoded while training goes on.

The file of ``--json``; a spread is ``{"median", "min", "max"}`` over the rounds, seconds are those
of one step, shares are parts of 1::

    {
      "format": 1,
      "seed": 0,
      "smoke": false,
      "seconds": 1234.5,                           # of the whole run
      "machine": {"cpu", "cores", "bf16_instructions", "threads", "gpu", "system", "python",
                  "torch", "date", "others"},
      "size": {"lanes", "rounds", "steps", "student", "smoke", "published_lanes"},
      "parts": {                                   # those that were run
        "steps": {
          "parameters": 35746307,                  # of the whole teacher
          "lines": {
            "published step": {...}, "published step without policy": {...},
            "published work, fast": {              # a name of benchmarks.settings.SETTINGS
              "lanes": 64,
              "setting": {"name", "reward", "input", "fast", "compiled", "cache", "start", "group"},
              "flops_per_decision": 1.2e10,        # null for the published step
              "first_step_seconds": 30.1,          # with the compilation; null likewise
              "hit_rate": 1.0,                     # of a warm cache; else null
              "decisions_per_second": spread,
              "seconds_per_step": [one for each round]
            }
          },
          "ratios": {"published work, fast": {"published step": spread,
                                              "published step without policy": spread}}
        },
        "costs": {
          "lanes": 256,
          "settings": {
            "published work, fast": {              # and "shipped digits"
              "trainer_seconds": spread,           # of the bare step inside the environment's
              "environment": spread,               # time beyond it, as a share of it
              "adapter": spread,                   # likewise of the SB3 adapter's step
              "profile": {"teacher forward": 0.41, ...}  # seconds of one adapter's step, by part;
            }                                      # parts exclude one another and sum to the step
          }
        },
        "device": {
          "peak_flops_per_second": {"bf16": spread, "fp32": spread},    # large matrix products
          "copy_bytes_per_second": spread,         # read and written
          "utilisation": {"published work, fast": 0.2}   # of the bf16 peak; on-line settings of
        },                                         # "steps" (absent where that was not run)
        "memory": {
          "peaks": {"published step": {"host_gib", "device_gib", "base_gib"}, ...},
          "flat": {"digits on line": {"steps": 5000, "growth": 0.001, "host_mib": [...],
                                      "device_mib": [...], "at": [steps]}, ...}
        },
        "fidelity": {
          "config": "digits", "batches": 4, "trained": 100,
          "paths": {"teacher bf16": {"features mean", "features max", "gradient", "reward mean",
                                     "reward max"}, ...}   # relative errors
        },
        "ranks": {...}, "streaming": {...}         # see these modules
      },
      "bars": [{"name", "needs", "limit", "value", "from", "met", "shown"}]   # null: not measured
    }
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import bars
from benchmarks.device import utilisation
from benchmarks.settings import Size
from benchmarks.timing import Bystanders, machine, machine_lines
from repfusion_env.atomic import write_text
from repfusion_env.devices import resolve_device
from repfusion_env.registry import did_you_mean

FORMAT = 1
# The modules that measure; each has ``measure(size, device, say)`` and ``table(result)``.
PARTS: dict[str, str] = {
    "steps": "benchmarks.steps",
    "costs": "benchmarks.costs",
    "device": "benchmarks.device",
    "memory": "benchmarks.memory",
    "fidelity": "benchmarks.fidelity",
    "ranks": "benchmarks.ranks",
    "streaming": "benchmarks.streaming",
}


def measure(
    size: Size,
    device: str = "cpu",
    parts: Iterable[str] = tuple(PARTS),
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run the parts one after another.

    Args:
        size: How large everything is.
        device: As in configurations.
        parts: Of :data:`PARTS`.
        say: Told how far it is.
        keep: Given the result so far after each part.

    Returns:
        What the module's docstring describes.
    """
    started = time.monotonic()
    where = resolve_device(device)
    facts = machine(where)
    bystanders = Bystanders()
    found: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for part in parts:
        began = time.monotonic()
        found[part] = importlib.import_module(PARTS[part]).measure(size, device, say)
        gc.collect()
        say(f"part {part}: {time.monotonic() - began:.0f} s")
        if {"device", "steps"} <= found.keys():
            found["device"]["utilisation"] = utilisation(found["device"], found["steps"])
        result = {
            "format": FORMAT,
            "seed": 0,
            "smoke": size.smoke,
            "seconds": time.monotonic() - started,
            "machine": facts | {"others": bystanders.share()},
            "size": asdict(size),
            "parts": found,
            "bars": bars.judge(found, cuda=where.type == "cuda"),
        }
        keep(result)
    return result


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    blocks = [
        "\n".join([*machine_lines(result["machine"]), f"- {result['seconds']:.0f} s in all"]),
        bars.table(result["bars"]),
        *(
            importlib.import_module(PARTS[part]).table(found)
            for part, found in result["parts"].items()
        ),
    ]
    if result["smoke"]:
        blocks.append("Smoke run: tiny networks, the figures mean nothing.")
    return "\n\n".join(blocks)


def _parts(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(
                f"'{name}' given.{did_you_mean(name, PARTS)} Allowed: {', '.join(PARTS)}"
            )
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write figures and samples here")
    parser.add_argument(
        "--only",
        metavar="PART,...",
        type=_parts,
        default=list(PARTS),
        help=f"some of {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny networks; two minutes")
    parser.add_argument("--rounds", type=int, default=10, help="samples per line (default: 10)")
    parser.add_argument(
        "--steps", type=int, help="steps per sample (default: 2 on a CPU, 20 on CUDA)"
    )
    parser.add_argument(
        "--lanes", type=int, default=64, help="N on a CPU (default: 64); on CUDA the best is found"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>")
    chosen = parser.parse_args(argv)
    for name in ("rounds", "steps", "lanes"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            parser.error(f"--{name}: {getattr(chosen, name)} given; it must be 1 or more")
    if chosen.json is not None and not chosen.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder '{chosen.json.parent}'")
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{text} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)

    def keep(result: dict[str, Any]) -> None:
        if chosen.json is not None:
            write_text(chosen.json, json.dumps(result, indent=1) + "\n")

    try:
        steps = chosen.steps or {"cpu": 2, "cuda": 20}[resolve_device(chosen.device).type]
        size = Size(chosen.lanes, chosen.rounds, steps, "resnet18")
        if chosen.smoke:
            size = Size(4, 2, 1, "small_cnn", smoke=True)
        result = measure(size, chosen.device, chosen.only, say, keep)
    except ValueError as error:
        parser.error(str(error))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
