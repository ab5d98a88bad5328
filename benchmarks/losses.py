"""Which distillation loss makes the better student? Over several seeds, at one timestep for all.

    OMP_NUM_THREADS=1 python -m benchmarks.losses --seeds 5 --jobs 2     # digits, t = 80
    OMP_NUM_THREADS=1 python -m benchmarks.losses --losses hint crd --timestep random

For each loss and seed a student is distilled on digits; a linear probe on its frozen feature says
what it is worth. All students of a seed begin with the same backbone and see the same images with
the same noise, so differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import numpy as np

from benchmarks.arguments import add_seeds, check_seeds
from benchmarks.lookahead import LOSSES
from repfusion_env.atomic import write_text

SUMMARY = "Which distillation loss makes the better student?"
LABELS = (50, 200, 1400)
GRID = range(0, 1000, 40)  # of configs/digits.yaml
REFERENCE = "hint"
UNTRAINED = "none: initial weights"
Accuracies = dict[str, list[dict[int, float]]]  # by loss, one per seed: accuracy by labels


def student_accuracy(
    name: str, seed: int, steps: int, timestep: int | None, config: str = "digits"
) -> dict[int, float]:
    """Distil one student; held-out accuracy of the linear probe by number of labels.

    Args:
        name: Key of :data:`benchmarks.lookahead.LOSSES`, or :data:`UNTRAINED`.
        seed: Of student, data order, noise and random timesteps.
        steps: Of all lanes.
        timestep: Of all decisions, one of the grid; None: random ones of the grid.
        config: Name of the configuration.
    """
    import torch

    from agents.evaluation import linear_probe_accuracy
    from repfusion_env.envs import RepFusionVectorEnv

    env = RepFusionVectorEnv(
        config=config,
        seed=seed,
        distillation=LOSSES[REFERENCE if name == UNTRAINED else name],
        observation={"source": "pixels"},  # nobody looks
    )
    env.reset(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(0 if name == UNTRAINED else steps):
        if timestep is None:
            actions = torch.randint(len(env.grid), (env.num_envs,), generator=generator)
        else:
            actions = torch.full((env.num_envs,), env.grid.timesteps.index(timestep))
        env.step(actions)
    return {labels: linear_probe_accuracy(env.trainer, labels) for labels in LABELS}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t-interval."""
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def table(accuracies: Accuracies) -> str:
    """The result in Markdown, in percent; the last column is the paired difference to hint."""
    head = " | ".join(f"{labels} labels" for labels in LABELS)
    rows = [
        f"| loss | {head} | minus {REFERENCE}, {LABELS[0]} labels |",
        "| --- " * (len(LABELS) + 2) + "|",
    ]
    reference = accuracies.get(REFERENCE)
    for name, runs in accuracies.items():
        cells = []
        for labels in LABELS:
            mean, half = interval([100 * run[labels] for run in runs])
            cells.append(f"{mean:.1f} ± {half:.1f}")
        if reference is None or name == REFERENCE:
            cells.append("")
        else:
            pairs = zip(runs, reference, strict=True)
            mean, half = interval([100 * (a[LABELS[0]] - b[LABELS[0]]) for a, b in pairs])
            cells.append(f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def measure(
    names: Sequence[str], seeds: int, steps: int, timestep: int | None, jobs: int
) -> Accuracies:
    """Every loss with every seed, ``jobs`` students at a time."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        pending = {
            pool.submit(student_accuracy, name, seed, steps, timestep): (name, seed)
            for seed in range(seeds)
            for name in names
        }
        for done in as_completed(pending):
            name, seed = pending[done]
            found[name, seed] = done.result()
            text = ", ".join(f"{value:.3f}" for value in found[name, seed].values())
            print(f"{name}, seed {seed}: {text}", file=sys.stderr, flush=True)
    return {name: [found[name, seed] for seed in range(seeds)] for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=SUMMARY)
    add_seeds(parser)
    parser.add_argument("--steps", type=int, default=400, help="of 64 lanes (default: 400)")
    parser.add_argument("--jobs", type=int, default=1, help="students at a time (default: 1)")
    parser.add_argument(
        "--timestep", default="80", help="one of the grid, or random (default: 80, a good one)"
    )
    names = (UNTRAINED, *LOSSES)
    parser.add_argument(
        "--losses", nargs="+", choices=names, default=names, metavar="LOSS", help="which"
    )
    chosen = parser.parse_args(argv)
    check_seeds(parser, chosen)
    if chosen.timestep != "random" and chosen.timestep not in map(str, GRID):
        allowed = ", ".join(map(str, GRID))
        parser.error(f"--timestep: {chosen.timestep!r} given; random or one of {allowed}")
    timestep = None if chosen.timestep == "random" else int(chosen.timestep)
    started = time.monotonic()
    accuracies = measure(chosen.losses, chosen.seeds, chosen.steps, timestep, chosen.jobs)
    print(f"{chosen.seeds} seeds, {time.monotonic() - started:.0f} s in all\n")
    print(table(accuracies))
    if chosen.json is not None:
        write_text(chosen.json, json.dumps(accuracies, indent=1) + "\n")


if __name__ == "__main__":
    main()
