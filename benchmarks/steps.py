"""The published step and our environment's, taking turns; see :mod:`benchmarks.throughput`.

Shape letters: N lanes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.material import DDPM_CIFAR10_UNET, TINY_UNET, Material, make_material
from benchmarks.settings import (
    PREPARED,
    SETTINGS,
    Setting,
    Size,
    environment,
    experiment,
    flops_per_decision,
    published_step,
    random_actions,
)
from benchmarks.timing import Line, Timing, interleave, shown, spread
from repfusion_env.devices import resolve_device
from repfusion_env.envs import RepFusionVectorEnv

PUBLISHED = {
    "published step": True,
    "published step without policy": False,
}
SMOKE = tuple(
    next(setting for setting in SETTINGS if setting.name == name)
    for name in (
        "published work, fp32",
        "published work, cache in memory, fast",
        "published work, cache on disk, fast, compiled",
        "default reward, groups of 4, fast, compiled",
    )
)
BATCHES = (64, 128, 256, 512, 1024, 2048, 4096)  # among which the best is looked for on CUDA
Say = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """A line with what is known of it beside its time.

    Attributes:
        line: Its step.
        lanes: Decisions of one step.
        setting: None for the published step.
        first: Seconds of the first step, with the compilation.
        flops: Of one decision.
        env: Whose metrics tell how often the cache had what was asked for.
    """

    line: Line
    lanes: int
    setting: Setting | None = None
    first: float | None = None
    flops: float | None = None
    env: RepFusionVectorEnv | None = None


def build(setting: Setting, material: Material, size: Size, device: str, folder: Path) -> Way:
    """Our environment under one setting; its cache, where there is one, is warm."""
    env, _ = environment(experiment(setting, material, size, device, folder))
    batches = (size.rounds + 1) * size.steps
    actions = random_actions(env, batches if setting.cache != "off" else PREPARED)
    started = time.perf_counter()
    env.step(actions[0])
    if env.device.type == "cuda":
        torch.cuda.synchronize(env.device)
    first = time.perf_counter() - started
    if setting.cache != "off":
        # The same images meet the same actions later on: what is drawn starts over with the seed.
        env.reset(seed=0)
        for batch in actions:
            env.step(batch)
    env.reset(seed=0)
    env.drain_metrics()
    return Way(
        Line(setting.name, lambda step: env.step(actions[step % len(actions)])),
        size.lanes,
        setting,
        first,
        env=env,
    )


def counted(
    settings: Iterable[Setting], material: Material, size: Size, device: str
) -> dict[str, float]:
    """Floating-point operations of a decision by the setting's name; equal work is counted once."""
    found: dict[tuple[Any, ...], float] = {}
    by_name = {}
    for setting in settings:
        work = (setting.reward, setting.input, setting.start, setting.group)
        if setting.cache != "off":
            continue  # counting would need the cache; its step is the others' without the teacher
        if work not in found:
            found[work] = flops_per_decision(setting, material, size, device)
        by_name[setting.name] = found[work]
    return by_name


def best_batch(
    step_of: Callable[[int], Callable[[int], object]],
    device: torch.device,
    say: Say,
    sizes: Iterable[int] = BATCHES,
) -> int:
    """The batch size with most decisions/s, of those that fit into memory; CUDA alone.

    Args:
        step_of: From a batch size to a step.
        device: Where it runs.
        say: Told of each.
        sizes: Growing; the search ends where memory does.
    """

    def speed(lanes: int) -> float:
        (timing,) = interleave(
            [Line("", step_of(lanes))], rounds=3, steps=3, device=device
        ).values()
        return lanes / min(timing.seconds)

    best = (0.0, 0)
    for lanes in sizes:
        try:
            found = speed(lanes)
        except torch.cuda.OutOfMemoryError:
            break
        say(f"batch {lanes}: {found:.0f} decisions/s")
        best = max(best, (found, lanes))
        torch.cuda.empty_cache()  # what the last one had
    if not best[1]:
        raise ValueError(f"device: not even the batch {lanes} fits into the memory of '{device}'")
    return best[1]


def on_cuda(size: Size, material: Material, device: str, say: Say) -> Size:
    """The size with the best batch of the published step, and the best number of lanes of ours."""
    where = resolve_device(device)
    published = best_batch(
        lambda lanes: published_step(material, size, device, policy=True, lanes=lanes), where, say
    )
    ours = next(setting for setting in SETTINGS if setting.fast and not setting.compiled)

    def step_of(lanes: int) -> Callable[[int], object]:
        env, _ = environment(experiment(ours, material, replace(size, lanes=lanes), device))
        actions = random_actions(env, PREPARED)
        return lambda step: env.step(actions[step % PREPARED])

    return replace(size, lanes=best_batch(step_of, where, say), published_lanes=published)


def ratios(above: Way, below: Way, timings: dict[str, Timing]) -> list[float]:
    """How many times the decisions/s of ``below`` the other makes, round by round."""
    pairs = zip(timings[above.line.name].seconds, timings[below.line.name].seconds, strict=True)
    return [(above.lanes / a) / (below.lanes / b) for a, b in pairs]


def measure(
    size: Size,
    device: str = "cpu",
    say: Say = lambda text: None,
    settings: Iterable[Setting] | None = None,
) -> dict[str, Any]:
    """Run the part; its result is described in :mod:`benchmarks.throughput`.

    Args:
        size: How large everything is.
        device: As in configurations.
        say: Told how far it is.
        settings: Of our side; default: all, or in a smoke run one of a kind.
    """
    where = resolve_device(device)
    unet = TINY_UNET if size.smoke else DDPM_CIFAR10_UNET
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(0)
        folder = Path(name)
        # A compiler that finds its earlier work would hide what the first step costs.
        compiled = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
        stack.enter_context(patch.dict(os.environ, compiled))
        if where.type == "cuda" and not size.smoke:
            material = make_material(folder, unet, images=size.images)
            size = on_cuda(size, material, device, say)
        material = make_material(folder, unet, images=size.images)
        if settings is None:
            settings = SMOKE if size.smoke else SETTINGS
        settings = list(settings)
        flops = counted(settings, material, size, device)
        ways = [
            Way(Line(title, published_step(material, size, device, policy=policy)), size.published)
            for title, policy in PUBLISHED.items()
        ]
        for setting in settings:
            way = build(setting, material, size, device, folder)
            ways.append(replace(way, flops=flops.get(setting.name)))
            say(f"{setting.name}: first step {way.first:.1f} s")
        timings = interleave(
            [way.line for way in ways],
            rounds=size.rounds,
            steps=size.steps,
            device=where,
            progress=say,
        )
        published, ours = ways[: len(PUBLISHED)], ways[len(PUBLISHED) :]
        return {
            "size": asdict(size),
            "parameters": material.parameters,
            "lines": {way.line.name: _record(way, timings[way.line.name]) for way in ways},
            "ratios": {
                way.line.name: {
                    other.line.name: spread(ratios(way, other, timings)) for other in published
                }
                for way in ours
            },
        }


def _record(way: Way, timing: Timing) -> dict[str, Any]:
    rate = None
    if way.env is not None and way.setting is not None and way.setting.cache != "off":
        rate = way.env.drain_metrics().get("cache/hit_rate")
    return {
        "lanes": way.lanes,
        "setting": None if way.setting is None else asdict(way.setting),
        "flops_per_decision": way.flops,
        "first_step_seconds": way.first,
        "hit_rate": rate,
        "decisions_per_second": spread([way.lanes / seconds for seconds in timing.seconds]),
        "seconds_per_step": list(timing.seconds),
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    rows = [
        "| line | decisions/s, median [min, max] | times the published step | without its policy | "
        "first step, s |",
        "| --- " * 5 + "|",
    ]
    for name, record in result["lines"].items():
        found = result["ratios"].get(name, {})
        cells = [shown(found[title], ".2f") if found else "" for title in PUBLISHED]
        first = record["first_step_seconds"]
        cells.append("" if first is None else f"{first:.1f}")
        speed = shown(record["decisions_per_second"], ".1f")
        rows.append(f"| {name} | {speed} | {' | '.join(cells)} |")
    size = result["size"]
    published = size["published_lanes"] or size["lanes"]
    rows += [
        "",
        f"Teacher {result['parameters'] / 1e6:.1f} M parameters, student {size['student']}, "
        f"{size['lanes']} lanes, published step {published}; {size['rounds']} rounds of "
        f"{size['steps']} steps per line.",
    ]
    rates = {
        record["hit_rate"] for record in result["lines"].values() if record["hit_rate"] is not None
    }
    if rates:
        rows[-1] += f" Hit rate of the warm caches: {', '.join(f'{rate:.3f}' for rate in rates)}."
    return "\n".join(rows)
