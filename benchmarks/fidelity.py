"""How far each fast path is from the plain fp32 path: features, gradients, rewards, learning.

    python -m benchmarks.fidelity --json FILE                        # about two minutes
    python -m benchmarks.fidelity --learning plain.json fast.json    # files of benchmarks.learning

A student is trained by the plain path for a while. From this state every path makes one step on the
same images, timesteps and noise, several times with other images; what comes out is compared with
what the plain path makes of them. Whether learning ends the same is another question: train with
:mod:`benchmarks.learning` and the settings of a path, and compare the files with ``--learning``.

Shape letters: N lanes, B batches, F feature width.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.arguments import check_seeds
from benchmarks.learning import gain_over
from benchmarks.settings import Size
from repfusion_env.atomic import write_text
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import load_config

if TYPE_CHECKING:
    from torch import Tensor

    from repfusion_env.trainer import DistillationTrainer

PROG = "python -m benchmarks.fidelity"
GROUP = 4
FAST = {
    "teacher.precision": "bf16",
    "teacher.channels_last": True,
    "student.precision": "bf16",
    "student.channels_last": True,
}
# Without these two the plain path's step is not a pure function of images, timesteps and state, or
# its gradient not the loss's.
PLAIN = {"teacher.noise": "fixed", "teacher.noise_seed": 0, "optimizer.gradient_clip": 0.0}


@dataclass(frozen=True)
class FastPath:
    """One fast path.

    Attributes:
        name: In the table.
        changes: Keys in which it differs from the plain path.
        twice: The step is made twice, and the second, whose features the cache has, is compared.
        grouped: The images of both paths come in groups of :data:`GROUP`.
    """

    name: str
    changes: Mapping[str, Any]
    twice: bool = False
    grouped: bool = False


def _cache(precision: str) -> dict[str, Any]:
    return {"cache.store": "memory", "cache.precision": precision}


PATHS = (
    FastPath("plain fp32, again", {}),
    FastPath("teacher channels-last", {"teacher.channels_last": True}),
    FastPath("teacher bf16", {"teacher.precision": "bf16"}),
    FastPath("teacher fp16", {"teacher.precision": "fp16"}),
    FastPath("student channels-last", {"student.channels_last": True}),
    FastPath("student bf16", {"student.precision": "bf16"}),
    FastPath("student fp16", {"student.precision": "fp16"}),
    FastPath("both bf16, channels-last (fast)", FAST),
    FastPath("compiled, fp32", {"speed.compile": "on"}),
    FastPath("fast, compiled", {**FAST, "speed.compile": "on"}),
    FastPath("cache in fp32", _cache("fp32"), twice=True),
    FastPath("cache in bf16", _cache("bf16"), twice=True),
    FastPath("cache in fp16", _cache("fp16"), twice=True),
    FastPath(
        "fast, compiled, cache in bf16", {**FAST, "speed.compile": "on"} | _cache("bf16"), True
    ),
    FastPath("images in groups", {"env.group_size": GROUP}, grouped=True),
    FastPath("reward.student training", {"reward.student": "training"}),
)


@dataclass(frozen=True)
class Outcome:
    """What one step came to.

    Attributes:
        features: Targets of all layers, (N, sum of F).
        gradient: Of backbone and projection, flat.
        reward: (N,).
    """

    features: Tensor
    gradient: Tensor
    reward: Tensor


def build(config: str, changes: Mapping[str, Any]) -> DistillationTrainer:
    """The trainer of a path."""
    from repfusion_env.frozen import build_frozen_parts
    from repfusion_env.trainer import DistillationTrainer

    experiment: ExperimentConfig = load_config(config, {**PLAIN, **changes})
    return DistillationTrainer(experiment, build_frozen_parts(experiment))


def outcome(
    trainer: DistillationTrainer, state: Mapping[str, Any], ids: Tensor, timesteps: Tensor
) -> Outcome:
    """One step from ``state``."""
    import torch

    # What is this path's own, such as the scale of fp16's loss, stays.
    shared = {key: state[key] for key in ("steps", "student", "optimizer")}
    trainer.load_state_dict({**trainer.state_dict(), **shared})
    kept: list[Any] = []
    handle = trainer.fusion.register_forward_hook(
        lambda _module, _inputs, found: kept.append(found)
    )
    group = trainer.config.env.group_size
    result = trainer.step(ids, timesteps, torch.zeros_like(ids), group)
    handle.remove()
    parameters = [
        *trainer.student.backbone.parameters(),
        *trainer.student.projections.parameters(),
    ]
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    features = torch.cat([layer.flatten(1) for layer in kept[0].features], dim=1)
    return Outcome(features.clone(), gradient.clone(), result.reward.clone())


def difference(found: Outcome, plain: Outcome) -> dict[str, float]:
    """Relative errors of one step against the plain path's.

    Returns:
        ``features mean`` and ``features max`` over the lanes (norm of the difference by the norm),
        ``gradient`` likewise as one vector, ``reward mean`` and ``reward max`` over the lanes (by
        the mean size of the plain path's rewards).
    """
    moved = (found.features - plain.features).norm(dim=1) / plain.features.norm(dim=1)
    gradient = (found.gradient - plain.gradient).norm() / plain.gradient.norm()
    reward = (found.reward - plain.reward).abs() / plain.reward.abs().mean()
    return {
        "features mean": float(moved.mean()),
        "features max": float(moved.max()),
        "gradient": float(gradient),
        "reward mean": float(reward.mean()),
        "reward max": float(reward.max()),
    }


def measure(
    size: Size, device: str = "cpu", say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Run the part of :mod:`benchmarks.throughput`: digits, or in a smoke run a smaller form of it.

    Args:
        size: Whether it is a smoke run.
        device: As in configurations.
        say: Told of each path.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = {"device": device, "cache.folder": folder}
        if size.smoke:
            paths = [path for path in PATHS if path.name == "both bf16, channels-last (fast)"]
            return compare("debug", overrides, paths=paths, batches=1, trained=1, say=say)
        return compare("digits", overrides, say=say)


def compare(
    config: str = "digits",
    overrides: Mapping[str, Any] | None = None,
    *,
    paths: Sequence[FastPath] = PATHS,
    batches: int = 4,
    trained: int = 100,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compare every path.

    Args:
        config: Name or file of the configuration.
        overrides: Keys in which plain and fast paths alike differ from it.
        paths: Which.
        batches: B, steps of each path.
        trained: Steps of the plain path before.
        say: Told of each path.

    Returns:
        JSON-able: ``config``, ``batches``, ``trained``, and ``paths`` by name with what
        :func:`difference` gives: means over batches, largest values for ``max``.
    """
    import torch

    from repfusion_env.stream import ImageStream

    overrides = dict(overrides or {})
    plain = build(config, overrides)
    lanes, generator = plain.config.env.num_envs, torch.Generator().manual_seed(0)
    stream = ImageStream(len(plain.parts.train), plain.device, shuffle=True)
    grid = plain.parts.grid.tensor

    def drawn(grouped: bool) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(grid), (lanes,), generator=generator).to(plain.device)
        ids = stream.take(lanes)
        return (ids[::GROUP].repeat_interleave(GROUP) if grouped else ids), grid[chosen]

    for _ in range(trained):
        ids, timesteps = drawn(False)
        plain.step(ids, timesteps, torch.zeros_like(ids))
    state = deepcopy(plain.state_dict())
    batch = {grouped: [drawn(grouped) for _ in range(batches)] for grouped in (False, True)}
    expected = {
        grouped: [outcome(plain, state, *pair) for pair in pairs]
        for grouped, pairs in batch.items()
    }
    found = {}
    for path in paths:
        trainer = build(config, {**overrides, **path.changes})
        rows = []
        for pair, target in zip(batch[path.grouped], expected[path.grouped], strict=True):
            if path.twice:
                outcome(trainer, state, *pair)
            rows.append(difference(outcome(trainer, state, *pair), target))
        found[path.name] = {
            key: float((np.max if key.endswith("max") else np.mean)([row[key] for row in rows]))
            for key in rows[0]
        }
        say(path.name)
    return {"config": config, "batches": batches, "trained": trained, "paths": found}


def table(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    rows = [
        "| path | features, mean | features, max | gradient | reward, mean | reward, max |",
        "| --- " * 6 + "|",
    ]
    for name, found in result["paths"].items():
        rows.append(f"| {name} | {' | '.join(f'{value:.1e}' for value in found.values())} |")
    rows += [
        "",
        f"Relative errors; configuration {result['config']}, {result['batches']} steps from a "
        f"student that the plain path has trained for {result['trained']}.",
    ]
    return "\n".join(rows)


def learning(plain: Mapping[str, Any], fast: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Paired differences of the learned policy's outcome, fast minus plain, seed by seed.

    Args:
        plain: What :func:`benchmarks.learning.measure` gave for the plain path.
        fast: And for another.

    Returns:
        By quantity ``mean``, ``low`` and ``high`` as :func:`benchmarks.learning.gain_over`, and the
        means ``plain`` and ``fast``.

    Raises:
        ValueError: They are of different seeds.
    """
    seeds = [[run["seed"] for run in one["runs"]] for one in (plain, fast)]
    if seeds[0] != seeds[1]:
        raise ValueError(f"--learning: files of the seeds {seeds[0]} and {seeds[1]} given")

    def values(one: Mapping[str, Any]) -> dict[str, list[float]]:
        found = {"held-out reward": [run["reward"]["learned"] for run in one["runs"]]}
        for labels in one["runs"][0]["accuracy"]:
            name = f"linear probe accuracy, {labels} labels"
            found[name] = [run["accuracy"][labels]["learned"] for run in one["runs"]]
        return found

    mine, other = values(fast), values(plain)
    return {
        name: gain_over(mine[name], other[name])
        | {"plain": float(np.mean(other[name])), "fast": float(np.mean(mine[name]))}
        for name in mine
    }


def learning_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """By file what :func:`learning` gave, in Markdown."""
    rows = [
        "| path | mean over seeds | plain | fast | fast - plain [95 %] | within the interval |",
        "| --- " * 6 + "|",
    ]
    for file, quantities in found.items():
        for name, one in quantities.items():
            same = "yes" if one["low"] <= 0 <= one["high"] else "**no**"
            rows.append(
                f"| {file} | {name} | {one['plain']:.4f} | {one['fast']:.4f} | {one['mean']:+.4f} "
                f"[{one['low']:+.4f}, {one['high']:+.4f}] | {same} |"
            )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog=PROG, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything here")
    parser.add_argument("--config", default="digits", metavar="FILE", help="default: digits")
    parser.add_argument("--steps", type=int, default=4, help="compared steps (default: 4)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>")
    parser.add_argument(
        "--learning",
        nargs="+",
        metavar="FILE",
        type=Path,
        help="files of benchmarks.learning --json: of the plain path, then of others",
    )
    chosen = parser.parse_args(argv)
    chosen.seeds = 2
    check_seeds(parser, chosen)
    try:
        if chosen.learning:
            plain, *others = (
                json.loads(file.read_text(encoding="utf-8")) for file in chosen.learning
            )
            names = [file.stem for file in chosen.learning[1:]]
            result: dict[str, Any] = {
                name: learning(plain, other) for name, other in zip(names, others, strict=True)
            }
            print(learning_table(result))
        else:
            with tempfile.TemporaryDirectory() as folder:
                result = compare(
                    chosen.config,
                    {"device": chosen.device, "cache.folder": folder},
                    batches=chosen.steps,
                    say=lambda text: print(text, file=sys.stderr, flush=True),
                )
            print(table(result))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if chosen.json is not None:
        write_text(chosen.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
