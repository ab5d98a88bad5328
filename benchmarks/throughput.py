"""Decisions per second: the published step, our environment, the bare trainer, SB3's adapter.

    python -m benchmarks.throughput                    # about ten minutes on four cores
    python -m benchmarks.throughput --json FILE        # the samples too
    python -m benchmarks.throughput --smoke            # does it run? seconds, figures mean nothing

All lines run in one process on the same images, taking turns (see :mod:`benchmarks.timing`). The
teacher is google/ddpm-cifar10-32's network with random weights, the student a CIFAR ResNet-18.
The shipped digits experiment runs along: its short steps would show an environment's cost most.

Shape letters: N lanes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.material import (
    CLASSES,
    DDPM_CIFAR10_UNET,
    LAYER,
    TINY_UNET,
    Material,
    make_material,
)
from benchmarks.published_step import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, PublishedStep
from benchmarks.timing import (
    Bystanders,
    Line,
    Timing,
    interleave,
    machine,
    machine_lines,
    ratios,
    spread,
)
from repfusion_env.actions.choice import Choice
from repfusion_env.atomic import write_text
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import check, load_config
from repfusion_env.data import load_data
from repfusion_env.devices import resolve_device
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.sb3 import RepFusionVecEnv
from repfusion_env.trainer import DistillationTrainer, StepResult

TIMESTEPS = 1000
DIGITS = "shipped digits"
PUBLISHED = {
    "published": "published step",
    "published without policy": "published step without policy",
}
LAYER_COST = "environment layer, % of the trainer inside its step"
PREPARED = 64  # batches of ids, actions and timesteps drawn before the clock starts


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        lanes: N.
        rounds: Samples per line.
        steps: Per sample.
        student: Name in the registry.
        smoke: Tiny networks, no meaning.
    """

    lanes: int
    rounds: int
    steps: int
    student: str
    smoke: bool = False


@dataclass(frozen=True)
class Setting:
    """One configuration of our side.

    Attributes:
        name: In the table.
        reward: ``reward.kind``.
        input: ``teacher.input``.
        fast: bf16 and channels-last for teacher and student.
    """

    name: str
    reward: str
    input: str
    fast: bool


SETTINGS = (
    Setting("published work, fp32", "teacher_probe", "clean", fast=False),
    Setting("published work, fast", "teacher_probe", "clean", fast=True),
    Setting("default reward, fp32", "student_lookahead", "noised", fast=False),
    Setting("default reward, fast", "student_lookahead", "noised", fast=True),
)


class WatchedTrainer(DistillationTrainer):
    """The trainer with a stopwatch on ``step``: what an environment's step takes beyond it."""

    seconds = 0.0

    def step(self, ids: Tensor, choice: Choice | Tensor, visits: Tensor) -> StepResult:
        """See the trainer. On CUDA the stopwatch sees the queueing alone."""
        started = time.perf_counter()
        result = super().step(ids, choice, visits)
        self.seconds += time.perf_counter() - started
        return result


def experiment(setting: Setting, material: Material, size: Size, device: str) -> ExperimentConfig:
    """The configuration of our side: everything that the published step does, by its settings."""
    precision = "bf16" if setting.fast else "fp32"
    form = {"precision": precision, "channels_last": setting.fast}
    width = (TINY_UNET if size.smoke else DDPM_CIFAR10_UNET)["block_out_channels"][-1]
    return check(
        {
            "device": device,
            "data": {"name": "npz", "path": str(material.bank)},
            "teacher": {
                "model": str(material.teacher),
                "layers": [LAYER],
                "input": setting.input,
                # Statistics of each of 1000 timesteps would take many times the measurement.
                "standardize": "grid",
                "standardize_images": 64,
                **form,
            },
            "timesteps": {"count": TIMESTEPS, "first": 0, "last": TIMESTEPS - 1},
            "student": {"name": size.student, "ema": 0.999, **form},
            "optimizer": {
                "name": "sgd",
                "learning_rate": LEARNING_RATE,
                "momentum": MOMENTUM,
                "weight_decay": WEIGHT_DECAY,
                "batch_size": size.lanes,
            },
            "reward": {"kind": setting.reward, "probe_hidden": width},
            # Pixels need no pass of the teacher over the bank, and are the largest observation.
            "observation": {"source": "pixels"},
            "env": {"num_envs": size.lanes},
        }
    )


def digits(size: Size, device: str) -> ExperimentConfig:
    """The shipped configuration, whose steps are so short that the environment could show."""
    changes: dict[str, Any] = {"device": device, "env.num_envs": size.lanes}
    if size.smoke:
        changes |= {"data.train_limit": 64, "teacher.standardize_images": 8}
    return load_config("digits", changes)


def our_lines(name: str, config: ExperimentConfig, repeat: int = 1) -> list[Line]:
    """Environment, bare trainer and SB3 adapter over one trainer; all inputs drawn beforehand."""
    trainer = WatchedTrainer(config, build_frozen_parts(config))
    env = RepFusionVectorEnv(trainer=trainer)
    env.reset(seed=0)
    adapter = RepFusionVecEnv(env)
    generator = torch.Generator().manual_seed(0)
    shape = (PREPARED, env.num_envs)
    actions = torch.randint(len(env.grid), shape, generator=generator)
    ids = torch.randint(len(trainer.parts.train), shape, generator=generator)
    visits = torch.arange(PREPARED * env.num_envs).view(shape)
    arrays = actions.numpy()
    actions, ids, visits = (part.to(trainer.device) for part in (actions, ids, visits))
    timesteps = env.grid.tensor[actions]

    def bare(step: int) -> StepResult:
        at = step % PREPARED
        return trainer.step(ids[at], timesteps[at], visits[at])

    return [
        Line(
            f"environment, {name}",
            lambda step: env.step(actions[step % PREPARED]),
            None if trainer.device.type == "cuda" else lambda: trainer.seconds,
            repeat,
        ),
        Line(f"trainer, {name}", bare, repeat=repeat),
        Line(
            f"SB3 adapter, {name}",
            lambda step: adapter.step(arrays[step % PREPARED]),
            repeat=repeat,
        ),
    ]


def published_lines(material: Material, size: Size, device: str) -> list[Line]:
    """The published step, whole and without its policy network."""
    where = resolve_device(device)
    bank = load_data(experiment(SETTINGS[0], material, size, device).data)[0].to(where)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(bank), (PREPARED, size.lanes), generator=generator).to(where)
    lines = []
    for name, policy in zip(PUBLISHED.values(), (True, False), strict=True):
        published = PublishedStep(
            material.teacher,
            LAYER,
            student=size.student,
            shape=bank.shape,
            classes=CLASSES,
            device=where,
            policy=policy,
        )

        def step(number: int, published: PublishedStep = published) -> dict[str, float]:
            at = ids[number % PREPARED]
            return published.step(bank.pixels(at), bank.labels[at])

        lines.append(Line(name, step))
    return lines


def measure(size: Size, device: str = "cpu", *, quiet: bool = False) -> dict[str, Any]:
    """Run everything.

    Returns:
        JSON-able: ``machine``, ``size``, ``parameters`` of the teacher, ``lines`` (decisions/s and
        seconds per step by line) and ``ratios``.
    """

    def say(text: str) -> None:
        if not quiet:
            print(f"{text} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)

    started = time.monotonic()
    where = resolve_device(device)
    facts = machine(where)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        unet = TINY_UNET if size.smoke else DDPM_CIFAR10_UNET
        material = make_material(Path(folder), unet, images=64 if size.smoke else 2000)
        lines = published_lines(material, size, device)
        for setting in SETTINGS:
            lines += our_lines(setting.name, experiment(setting, material, size, device))
        lines += our_lines(DIGITS, digits(size, device), repeat=1 if size.smoke else 10)
        say(f"built {len(lines)} lines")
        bystanders = Bystanders()
        timings = interleave(
            lines, rounds=size.rounds, steps=size.steps, device=where, progress=say
        )
        facts["others"] = bystanders.share()
    return {
        "machine": facts,
        "size": asdict(size),
        "parameters": material.parameters,
        "seconds": time.monotonic() - started,
        "lines": {name: _line_record(timing, size.lanes) for name, timing in timings.items()},
        "ratios": {
            name: _comparisons(timings, name)
            for name in (*(setting.name for setting in SETTINGS), DIGITS)
        },
    }


def _line_record(timing: Timing, lanes: int) -> dict[str, Any]:
    return {
        "decisions_per_second": spread([lanes / seconds for seconds in timing.seconds]),
        "seconds_per_step": list(timing.seconds),
    }


def _comparisons(timings: dict[str, Timing], name: str) -> dict[str, dict[str, float]]:
    env, bare, adapter = (
        timings[f"{kind}, {name}"] for kind in ("environment", "trainer", "SB3 adapter")
    )
    found = {}
    if name != DIGITS:
        for title, line in PUBLISHED.items():
            found[f"environment / {title}"] = ratios(env, timings[line])
    found |= {
        "environment / trainer": ratios(env, bare),
        "SB3 adapter / trainer": ratios(adapter, bare),
    }
    if env.outside:
        found[LAYER_COST] = list(env.outside)
    return {key: spread(values) for key, values in found.items()}


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    size = result["size"]
    rows = [
        *machine_lines(result["machine"]),
        f"- teacher {result['parameters'] / 1e6:.1f} M parameters, student {size['student']}, "
        f"{size['lanes']} lanes; {size['rounds']} rounds of {size['steps']} steps per line, "
        f"{result['seconds']:.0f} s in all",
        "",
        "| line | decisions/s, median [min, max] |",
        "| --- | --- |",
    ]
    for name, record in result["lines"].items():
        rows.append(f"| {name} | {_shown(record['decisions_per_second'], '.1f')} |")
    names = list(next(iter(result["ratios"].values())))
    rows += ["", f"| within a round | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for setting, found in result["ratios"].items():
        cells = [
            _shown(found[name], ".2%" if name == LAYER_COST else ".3f") if name in found else ""
            for name in names
        ]
        rows.append(f"| {setting} | {' | '.join(cells)} |")
    if size["smoke"]:
        rows += ["", "Smoke run: tiny networks, the figures mean nothing."]
    return "\n".join(rows)


def _shown(found: dict[str, float], form: str) -> str:
    middle, low, high = (format(found[key], form) for key in ("median", "min", "max"))
    return f"{middle} [{low}, {high}]"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write figures and samples here")
    parser.add_argument("--smoke", action="store_true", help="tiny networks; seconds")
    parser.add_argument("--rounds", type=int, default=10, help="samples per line (default: 10)")
    parser.add_argument("--steps", type=int, default=2, help="steps per sample (default: 2)")
    parser.add_argument("--lanes", type=int, default=64, help="N (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>")
    chosen = parser.parse_args(argv)
    for name in ("rounds", "steps", "lanes"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name}: {getattr(chosen, name)} given; it must be 1 or more")
    if chosen.json is not None and not chosen.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder '{chosen.json.parent}'")
    size = Size(chosen.lanes, chosen.rounds, chosen.steps, "resnet18")
    if chosen.smoke:
        size = Size(4, 2, 1, "small_cnn", smoke=True)
    try:
        result = measure(size, chosen.device)
    except ValueError as error:
        parser.error(str(error))
    print(table(result))
    if chosen.json is not None:
        write_text(chosen.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
