"""What environment layer and SB3 adapter cost over the trainer, and where a step's time goes.

Both are measured inside the very step: time of ``env.step`` that is not in ``trainer.step``. Two
lines that are timed for themselves would differ by the noise of the machine, which is larger.

Shape letters: N lanes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.material import DDPM_CIFAR10_UNET, TINY_UNET, make_material
from benchmarks.settings import (
    DIGITS,
    PREPARED,
    SETTINGS,
    Setting,
    Size,
    digits,
    environment,
    experiment,
    random_actions,
)
from benchmarks.stopwatch import watching
from benchmarks.timing import Line, interleave, shown, spread
from repfusion_env.config import ExperimentConfig
from repfusion_env.devices import resolve_device
from repfusion_env.sb3 import RepFusionVecEnv

LANES = 256
ON_LINE = tuple(
    setting
    for setting in SETTINGS
    if setting.cache == "off" and setting.group == 1 and setting.start == "updated"
)


def costs(config: ExperimentConfig, size: Size, repeat: int = 1) -> dict[str, Any]:
    """One configuration: both shares, and the profile of the adapter's step."""
    env, trainer = environment(config)
    adapter = RepFusionVecEnv(env)
    actions = random_actions(env, PREPARED)
    arrays = actions.cpu().numpy()
    lines = [
        Line("environment", lambda step: env.step(actions[step % PREPARED]), trainer.seconds),
        Line("adapter", lambda step: adapter.step(arrays[step % PREPARED]), trainer.seconds),
    ]
    timings = interleave(
        [replace(line, repeat=repeat) for line in lines],
        rounds=size.rounds,
        steps=size.steps,
        device=env.device,
    )
    steps = size.steps * repeat
    with watching(env.device) as watch:
        for step in range(steps):
            adapter.step(arrays[step % PREPARED])
    inside = [
        seconds / (1 + share)
        for seconds, share in zip(
            timings["environment"].seconds, timings["environment"].outside, strict=True
        )
    ]
    return {
        "trainer_seconds": spread(inside),
        **{line: spread(timing.outside) for line, timing in timings.items()},
        "profile": {
            part: seconds / steps
            for part, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1])
        },
    }


def measure(
    size: Size,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
    settings: Iterable[Setting] | None = None,
) -> dict[str, Any]:
    """Run the part; its result is described in :mod:`benchmarks.throughput`."""
    if settings is None:
        settings = ON_LINE[:1] if size.smoke else ON_LINE
    size = replace(size, lanes=size.lanes if size.smoke else LANES)
    found = {}
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng():
        torch.manual_seed(0)
        unet = TINY_UNET if size.smoke else DDPM_CIFAR10_UNET
        material = make_material(Path(name), unet, images=size.images)
        for setting in settings:
            config = experiment(setting, material, size, device)
            # On a CPU a step of 256 lanes takes seconds; the share does not need many.
            cpu = resolve_device(device).type == "cpu"
            few = replace(size, rounds=min(size.rounds, 5), steps=1) if cpu else size
            found[setting.name] = costs(config, few)
            say(f"costs: {setting.name}")
        repeat = 1 if size.smoke else 5
        found[DIGITS] = costs(digits(size, device), size, repeat)
    return {"lanes": size.lanes, "settings": found}


def table(result: dict[str, Any]) -> str:
    """The result in Markdown: the shares, then the profiles in percent of the adapter's step."""
    rows = [
        f"| {result['lanes']} lanes | trainer's step, s | environment layer, % of it | "
        "SB3 adapter with it, % |",
        "| --- " * 4 + "|",
    ]
    for name, found in result["settings"].items():
        shares = [shown(found[line], ".2%") for line in ("environment", "adapter")]
        rows.append(f"| {name} | {shown(found['trainer_seconds'], '.3f')} | {' | '.join(shares)} |")
    profiles = {name: found["profile"] for name, found in result["settings"].items()}
    parts = dict.fromkeys(part for profile in profiles.values() for part in profile)
    rows += [
        "",
        f"| % of the adapter's step | {' | '.join(profiles)} |",
        "| --- " * (len(profiles) + 1) + "|",
    ]
    for part in parts:
        cells = [
            f"{profile[part] / sum(profile.values()):.1%}" if part in profile else ""
            for profile in profiles.values()
        ]
        rows.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(rows)
