"""Peak memory of each mode, and whether memory stays flat over thousands of steps.

    python -m benchmarks.memory                   # about six minutes on four cores
    python -m benchmarks.memory --only flat

Every mode runs in a fresh process. Peaks are those of a few steps on the networks of
:mod:`benchmarks.throughput`; for flatness small networks make 5,000 steps, through the SB3 adapter
and with metrics drained, as a training run does.

Shape letters: N lanes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.material import DDPM_CIFAR10_UNET, TINY_UNET, Material, make_material
from benchmarks.settings import SETTINGS, Size
from benchmarks.steps import PUBLISHED
from repfusion_env.atomic import write_text
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import check, merge, to_dict

Say = Callable[[str], None]
GIB, MIB = 2**30, 2**20
PEAKS = (
    "published step",
    "published work, fp32",
    "published work, fast",
    "published work, fast, compiled",
    "published work, cache in memory, fast, compiled",
    "published work, cache on disk, fast, compiled",
    "default reward, fp32",
    "default reward, fast, compiled",
    "default reward, training forward's student, fast, compiled",
    "default reward, groups of 4, fast, compiled",
)
STEPS = 5000
SAMPLES = 50
FLAT = ("on line", "on line, fast, compiled", "cache in memory", "cache on disk", "streamed images")
GROWTH = "of the largest value from the second fifth of the steps to the last"


def host_bytes(peak: bool = False) -> int:
    """Resident memory of this process, now or at its peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        # The kernel's own peak: getrusage's is that of the process that started this one, too.
        key = "VmHWM:" if peak else "VmRSS:"
        for row in status.read_text(encoding="utf-8").splitlines():
            if row.startswith(key):
                return int(row.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(name: str, material: Material, size: Size, device: str) -> dict[str, float]:
    """Build a mode and make a few steps; in a process that does nothing else.

    Args:
        name: Of a setting, or of a published line.
        material: Teacher and images.
        size: Lanes and student.
        device: As in configurations.

    Returns:
        ``host_gib`` and ``device_gib`` at their peak, and ``base_gib`` of the bare process.
    """
    import torch

    from benchmarks.settings import environment, experiment, published_step, random_actions
    from repfusion_env.devices import resolve_device

    where = resolve_device(device)
    base = host_bytes(peak=True)
    if name in PUBLISHED:
        step = published_step(material, size, device, policy=PUBLISHED[name])
    else:
        setting = next(one for one in SETTINGS if one.name == name)
        folder = material.bank.parent / "peaks"
        env, _ = environment(experiment(setting, material, size, device, folder))
        actions = random_actions(env, 3)

        def step(number: int) -> Any:
            return env.step(actions[number])

    for number in range(3):
        step(number)
    on_device = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0
    return {
        "host_gib": host_bytes(peak=True) / GIB,
        "device_gib": on_device / GIB,
        "base_gib": base / GIB,
    }


def small_experiment(mode: str, material: Material, device: str) -> ExperimentConfig:
    """The configuration of one of :data:`FLAT`."""
    folder = material.bank.parent
    changes: dict[str, Any] = {
        "device": device,
        "data": {"name": "npz", "path": str(material.bank)},
        "teacher": {"model": str(material.teacher), "standardize_images": 8},
        "timesteps": {"count": 5},
        "env": {"num_envs": 8},
        "optimizer": {"batch_size": 8},
    }
    if mode == "on line, fast, compiled":
        form = {"precision": "bf16", "channels_last": True}
        changes = merge(changes, {"teacher": form, "student": form, "speed": {"compile": "on"}})
    if mode.startswith("cache"):
        store = mode.rpartition(" ")[2]
        cache = {"store": store, "folder": str(folder / "flat")}
        changes = merge(changes, {"teacher": {"noise": "fixed"}, "cache": cache})
    if mode == "streamed images":
        data = {"name": "folder", "path": str(folder / "images"), "storage": "stream"}
        changes = merge(changes, {"data": data})
    return check(changes)


def flatness_of(experiment: Mapping[str, Any], steps: int, samples: int) -> dict[str, Any]:
    """Make many steps and look at memory now and then; in a process that does nothing else.

    Args:
        experiment: The configuration as nested dictionaries.
        steps: In all.
        samples: Looks, at equal distances.

    Returns:
        ``steps``, ``at``, ``host_mib`` and ``device_mib`` by sample, and ``growth``.
    """
    import torch

    from repfusion_env.sb3 import make_sb3_vec_env

    torch.set_num_threads(1)  # processes run side by side
    env = make_sb3_vec_env(config=dict(experiment))
    env.seed(0)
    env.reset()
    cuda = env.env.device.type == "cuda"
    every = max(1, steps // samples)
    generator = np.random.default_rng(0)
    at, host, device = [], [], []
    for step in range(1, steps + 1):
        env.step(generator.integers(len(env.env.grid), size=env.num_envs))
        if step % every == 0:
            env.env.drain_metrics()
            at.append(step)
            host.append(host_bytes() / MIB)
            device.append(torch.cuda.memory_allocated() / MIB if cuda else 0.0)
    return {
        "steps": steps,
        "at": at,
        "host_mib": host,
        "device_mib": device,
        "growth": max(growth(host), growth(device)),
    }


def growth(values: Sequence[float]) -> float:
    """By what part the largest value grows from the second fifth to the last; 0 of nothing."""
    fifth = max(1, len(values) // 5)
    early, late = max(values[fifth : 2 * fifth] or values), max(values[-fifth:])
    return (late - early) / early if early else 0.0


def measure(
    size: Size,
    device: str = "cpu",
    say: Say = lambda text: None,
    *,
    names: Iterable[str] = PEAKS,
    modes: Iterable[str] = FLAT,
) -> dict[str, Any]:
    """Run the part; its result is described in :mod:`benchmarks.throughput`.

    Args:
        size: Lanes and student of the peaks.
        device: As in configurations.
        say: Told of each mode.
        names: Of the lines of :mod:`benchmarks.steps` whose peak is wanted.
        modes: Of :data:`FLAT`.
    """
    names = list(names)
    modes = list(modes)
    found: dict[str, Any] = {"peaks": {}, "flat": {}}
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        if names:
            unet = TINY_UNET if size.smoke else DDPM_CIFAR10_UNET
            material = make_material(Path(one), unet, images=size.images)
            with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
                for name in names:
                    found["peaks"][name] = pool.submit(
                        peak_of, name, material, size, device
                    ).result()
                    say(f"memory: {name}")
        if modes:
            small = make_material(Path(other), TINY_UNET, images=256)
            if "streamed images" in modes:
                write_folder(Path(other) / "images", count=40)
            steps = 20 if size.smoke else STEPS
            with ProcessPoolExecutor(
                min(len(modes), os.cpu_count() or 1), context, max_tasks_per_child=1
            ) as pool:
                pending = {
                    mode: pool.submit(
                        flatness_of,
                        to_dict(small_experiment(mode, small, device)),
                        steps,
                        SAMPLES,
                    )
                    for mode in modes
                }
                for mode, run in pending.items():
                    found["flat"][mode] = run.result()
                    say(f"memory over {steps} steps: {mode}")
    return found


def write_folder(folder: Path, count: int) -> None:
    """Random 32x32 images in class folders, ``count`` to train on and a fifth held out."""
    from PIL import Image

    random = np.random.default_rng(0)
    for split, images in (("train", count), ("val", count // 5)):
        for number in range(images):
            where = folder / split / f"class{number % 2}"
            where.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(where / f"{number}.png")


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    rows = []
    if result["peaks"]:
        rows += [
            "| mode | host memory at its peak, GiB | of it libraries | device memory, GiB |",
            "| --- " * 4 + "|",
        ]
        for name, found in result["peaks"].items():
            rows.append(
                f"| {name} | {found['host_gib']:.2f} | {found['base_gib']:.2f} | "
                f"{found['device_gib']:.2f} |"
            )
        rows.append("")
    if result["flat"]:
        rows += [
            "| small networks | steps | host memory after a fifth, MiB | at the end | growth |",
            "| --- " * 5 + "|",
        ]
        for mode, found in result["flat"].items():
            host = found["host_mib"]
            rows.append(
                f"| {mode} | {found['steps']} | {host[len(host) // 5]:.0f} | {host[-1]:.0f} | "
                f"{found['growth']:+.2%} |"
            )
        rows += ["", f"Growth: {GROWTH}."]
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write figures and samples here")
    parser.add_argument("--only", choices=("peaks", "flat"), help="one of both")
    parser.add_argument("--smoke", action="store_true", help="tiny networks; seconds")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>")
    chosen = parser.parse_args(argv)
    if chosen.json is not None and not chosen.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder '{chosen.json.parent}'")
    size = Size(64, 1, 1, "resnet18")
    if chosen.smoke:
        size = replace(size, lanes=4, student="small_cnn", smoke=True)
    try:
        result = measure(
            size,
            chosen.device,
            lambda text: print(text, file=sys.stderr, flush=True),
            names=() if chosen.only == "flat" else PEAKS,
            modes=() if chosen.only == "peaks" else FLAT,
        )
    except ValueError as error:
        parser.error(str(error))
    print(table(result))
    if chosen.json is not None:
        write_text(chosen.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
