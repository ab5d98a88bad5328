"""How much of each teacher is loaded, and how much faster the cut forward is than the full one.

    python -m benchmarks.teachers                    # a few minutes on four cores
    python -m benchmarks.teachers --family dit sd3
    python -m benchmarks.teachers --large            # memory at the size of Stable Diffusion 1.5

Each family is built with random weights, saved as it is on disk, and loaded twice: as far as its
default layer, and whole (its last layer). Both forwards take turns in one run; ratios are taken
within a round. ``--large`` loads a teacher of 860 M parameters in processes of their own and tells
their peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.teacher_material import MODELS, Model, stable_diffusion
from benchmarks.timing import (
    Bystanders,
    Line,
    interleave,
    machine,
    machine_lines,
    ratios,
    spread,
)
from repfusion_env.atomic import write_text
from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import describe_teacher, load_teacher
from repfusion_env.teachers.reading.network import NetworkTeacher

LARGE = (
    {"precision": "fp32"},
    {"precision": "bf16"},
    {"precision": "bf16", "batch_size": 1},
    {"precision": "bf16", "offload": "cpu"},
)


def measure(model: Model, folder: Path, *, rounds: int, device: torch.device) -> dict[str, Any]:
    """Load a model cut and whole, and time both.

    Args:
        model: What to build.
        folder: Empty; where it is saved.
        rounds: Samples of each.
        device: Where both run.

    Returns:
        Parameters loaded and in all, milliseconds per image, and how many times as fast the cut is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        where = str(model.make(folder))
    config = TeacherConfig(family=model.family, model=where, options=model.options)
    card = describe_teacher(config)
    assert card.trace is not None
    last = card.trace.last(card.trace.shapes)
    cut = load_teacher(config, device=device)
    whole = load_teacher(
        TeacherConfig(family=model.family, model=where, options=model.options, layers=(last,)),
        device=device,
    )
    assert isinstance(cut, NetworkTeacher)
    generator = torch.Generator().manual_seed(0)
    side = model.side or card.image_size
    shape = (model.images, card.channels, side, side)
    images = (torch.rand(shape, generator=generator) * 2 - 1).to(device)
    timesteps = torch.full((model.images,), min(100, card.num_timesteps - 1), device=device)
    clean = cut.encode(images)
    lines = [
        Line("cut", lambda _: cut.features(clean, timesteps)),
        Line("whole", lambda _: whole.features(clean, timesteps)),
    ]
    if cut.encoder is not None:
        lines.append(Line("encode", lambda _: cut.encode(images)))
    timings = interleave(lines, rounds=rounds, steps=1, device=device)
    return {
        "family": model.family,
        "model": model.name,
        "layer": cut.layers[0],
        "parameters_used": cut.parameters_used,
        "parameters_all": cut.parameters_all,
        "milliseconds_per_image": {
            name: spread([1000 * second / model.images for second in timing.seconds])
            for name, timing in timings.items()
        },
        "speedup": spread(ratios(timings["cut"], timings["whole"])),
    }


def row(found: dict[str, Any]) -> str:
    """One result as a row of the table."""
    used, total = found["parameters_used"], found["parameters_all"]
    each, speedup = found["milliseconds_per_image"], found["speedup"]
    encode = f"{each['encode']['median']:.1f}" if "encode" in each else ""
    return (
        f"| `{found['family']}` | {found['model']} | `{found['layer']}` | "
        f"{used / 1e6:.1f} of {total / 1e6:.1f} M ({used / total:.0%}) | "
        f"{each['cut']['median']:.1f} | {each['whole']['median']:.1f} | {encode} | "
        f"{speedup['median']:.2f} [{speedup['min']:.2f}, {speedup['max']:.2f}] |"
    )


def measure_large(folder: Path, images: int) -> list[dict[str, Any]]:
    """Peak memory of loading and reading a large teacher, each setting in a process of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stable_diffusion(folder)
    found = []
    for settings in LARGE:
        command = [sys.executable, "-m", "benchmarks.teachers", "--one", str(folder)]
        command += ["--settings", json.dumps(settings), "--images", str(images)]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(process.stdout.splitlines()[-1]))
    return found


def measure_one(folder: Path, settings: dict[str, Any], images: int) -> dict[str, Any]:
    """Load and read one teacher in this process."""
    from repfusion_env.teachers import unet2d_condition  # noqa: F401 (imports before the clock)

    before, started = _peak(), time.perf_counter()
    teacher = load_teacher(TeacherConfig(model=str(folder), **settings), device="cpu")
    assert isinstance(teacher, NetworkTeacher)
    loaded, seconds = _peak(), time.perf_counter() - started
    pixels = torch.zeros(images, 3, 256, 256)
    timesteps = torch.full((images,), 100)
    started = time.perf_counter()
    teacher.features(teacher.encode(pixels), timesteps)
    return {
        "settings": settings,
        "parameters_used": teacher.parameters_used,
        "parameters_all": teacher.parameters_all,
        "imports_gib": before,
        "loaded_gib": loaded,
        "peak_gib": _peak(),
        "load_seconds": seconds,
        "images_per_second": images / (time.perf_counter() - started),
    }


def _peak() -> float:
    """The largest resident memory of this process so far, GiB."""
    table = Path("/proc/self/status")
    if table.is_file():
        # getrusage would begin with what the parent held when it started this process.
        for line in table.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure what the cut of each teacher saves.")
    families = sorted({model.family for model in MODELS})
    parser.add_argument("--family", nargs="+", choices=families, help="default: all")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each forward")
    parser.add_argument("--threads", type=int, help="of torch; default: as it is")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the samples' medians and spreads there")
    parser.add_argument("--large", action="store_true", help="memory of a large teacher instead")
    parser.add_argument("--images", type=int, default=8, help="of one batch, with --large")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure_one(arguments.one, arguments.settings, arguments.images)))
        return 0
    device, bystanders = torch.device(arguments.device), Bystanders()
    found: list[dict[str, Any]] = []
    if arguments.large:
        with tempfile.TemporaryDirectory() as folder:
            found = measure_large(Path(folder), arguments.images)
        print("| setting | loaded, GiB | peak, GiB | load, s | images/s |")
        print("| --- | --- | --- | --- | --- |")
        for one in found:
            shown = ", ".join(f"{key} {value}" for key, value in one["settings"].items())
            print(
                f"| {shown} | {one['loaded_gib']:.2f} | {one['peak_gib']:.2f} | "
                f"{one['load_seconds']:.1f} | {one['images_per_second']:.2f} |"
            )
        print(f"\nparameters {found[0]['parameters_used']:,} of {found[0]['parameters_all']:,}")
    else:
        print(
            "| family | model | layer | parameters loaded | cut, ms per image | whole | VAE | "
            "whole / cut time |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for model in MODELS:
            if arguments.family and model.family not in arguments.family:
                continue
            with tempfile.TemporaryDirectory() as folder:
                one = measure(model, Path(folder), rounds=arguments.rounds, device=device)
            print(row(one), flush=True)
            found.append(one)
    facts = {**machine(device), "others": bystanders.share()}
    print("\n".join(["", *machine_lines(facts)]))
    if arguments.json:
        write_text(
            arguments.json, json.dumps({"machine": facts, "results": found}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
