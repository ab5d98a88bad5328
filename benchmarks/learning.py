"""Does the policy learn, and does the student gain? Over several seeds, with confidence intervals.

    python -m benchmarks.learning --seeds 5                     # digits; minutes
    python -m benchmarks.learning --seeds 3 --jobs 3 --json FILE --reward teacher_probe

Options beside those of ``--help`` are the training command's, ``--key value``.

For every seed, in a process of its own: the training command ``agents.train_reinforce`` runs as a
user runs it, and two more students are distilled with as many decisions, the same initial weights,
images and noise, but under random actions and under the best fixed one (a timestep, or whatever
``env.action`` chooses). That is the one with the highest held-out reward at the end of the learned
run: chosen in hindsight, which a sweep over all of them would have to pay for.

Shape letters: N lanes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.command_line import guarded, parse
from agents.train_reinforce import conflicts
from benchmarks.arguments import add_seeds, check_seeds
from repfusion_env.atomic import write_text
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import check, merge, to_dict, to_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from repfusion_env.envs import RepFusionVectorEnv

PROG = "python -m benchmarks.learning"
POLICIES = ("learned", "random", "best fixed")
Chooser = Callable[[int], "Tensor"]  # from N to actions (N, ...)
LABELS = (50, 200)  # of the linear probe, beside all that evaluation.probe_images allows


def run_seed(config: dict[str, Any], seed: int, folder: str, threads: int) -> dict[str, Any]:
    """One seed, all three students.

    Args:
        config: The experiment, as nested dictionaries.
        seed: Of student, data order, noise and policy.
        folder: For the run.
        threads: Of the arithmetic.

    Returns:
        JSON-able: ``seed``, ``seconds``, ``fixed`` (the best fixed action), ``reward`` by policy on
        the learned run's student, and ``accuracy`` by number of labels and policy.

    Raises:
        RuntimeError: The training command failed; the message holds what it said.
    """
    import torch

    from agents.evaluation import random_actions
    from repfusion_env.actions import arm_actions
    from repfusion_env.envs import RepFusionVectorEnv

    started = time.monotonic()
    torch.set_num_threads(threads)
    changes = {"seed": seed, "run.folder": folder, "run.name": f"seed-{seed}"}
    experiment = check(merge(config, changes))
    run = _train(experiment, Path(folder))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    fixed = summary["reward"]["fixed"]
    best = max(fixed, key=lambda label: fixed[label])

    env = RepFusionVectorEnv(config=experiment)
    accuracy = {"learned": _probe_saved(env, run / "student.safetensors")}
    generator = torch.Generator(env.device).manual_seed(seed)
    index = [arm.label for arm in env.actions.arms].index(best)
    arm = arm_actions(env.actions, env.device)[index]

    def random(lanes: int) -> Tensor:
        return random_actions(env, lanes, generator)

    def always(lanes: int) -> Tensor:
        return arm.expand(lanes, *arm.shape)

    accuracy["random"] = _distil(env, random, seed)
    accuracy["best fixed"] = _distil(env, always, seed)
    reward = {"learned": summary["reward"]["learned"], "random": summary["reward"]["random"]}
    return {
        "seed": seed,
        "seconds": time.monotonic() - started,
        "fixed": best,
        "chosen": summary["timestep"],
        "layers": summary.get("layer"),
        "training_seconds": summary["seconds"],
        "reward": reward | {"best fixed": fixed[best]},
        "accuracy": {
            labels: {policy: accuracy[policy][labels] for policy in POLICIES}
            for labels in accuracy["learned"]
        },
    }


def _train(experiment: ExperimentConfig, folder: Path) -> Path:
    """Run the training command; returns the run's folder."""
    from agents.train_reinforce import main

    name = str(experiment.run.name)
    file = folder / f"{name}.yaml"
    write_text(file, to_yaml(experiment))
    log = folder / f"{name}.log"
    with log.open("w", encoding="utf-8") as said, redirect_stdout(said), redirect_stderr(said):
        code = main(["--config", str(file)])
    if code:
        raise RuntimeError(f"training ended with {code}: {log.read_text(encoding='utf-8')[-2000:]}")
    return folder / name


def _distil(env: RepFusionVectorEnv, choose: Chooser, seed: int) -> dict[str, float]:
    """Distil a new student under a policy that does not look; its accuracy by labels."""
    env.reset(seed=seed)
    for _ in range(env.config.total_steps):
        env.step(choose(env.num_envs))
    return probe(env)


def _probe_saved(env: RepFusionVectorEnv, weights: Path) -> dict[str, float]:
    from safetensors.torch import load_file

    env.trainer.evaluation_student.load_state_dict(load_file(weights))
    return probe(env)


def probe(env: RepFusionVectorEnv) -> dict[str, float]:
    """Linear-probe accuracy of the student as it stands, by number of labels."""
    from agents.evaluation import linear_probe_accuracy

    most = min(env.config.evaluation.probe_images, len(env.trainer.parts.train))
    counts = [*(labels for labels in LABELS if labels < most), most]
    return {str(labels): linear_probe_accuracy(env.trainer, labels) for labels in counts}


def measure(
    experiment: ExperimentConfig,
    seeds: Sequence[int],
    *,
    jobs: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run every seed.

    Args:
        experiment: Its seed is replaced.
        seeds: At least two, for an interval.
        jobs: Processes at a time; they share the processor's cores.
        say: Told of each finished seed.

    Returns:
        JSON-able: ``config``, ``runs`` by seed, and ``quantities`` as :func:`compare` gives them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (cores or 1) // jobs)
    started = time.monotonic()
    runs: dict[int, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        config = to_dict(experiment)
        pending = [pool.submit(run_seed, config, seed, folder, threads) for seed in seeds]
        for done in as_completed(pending):
            run = done.result()
            runs[run["seed"]] = run
            reward = run["reward"]
            say(
                f"seed {run['seed']}: reward {reward['learned']:.3f} learned, "
                f"{reward['random']:.3f} random ({run['seconds']:.0f} s)"
            )
    in_order = [runs[seed] for seed in seeds]
    quantities = {"held-out reward": compare([run["reward"] for run in in_order])}
    for labels in in_order[0]["accuracy"]:
        name = f"linear probe accuracy, {labels} labels"
        quantities[name] = compare([run["accuracy"][labels] for run in in_order])
    return {
        "config": config,
        "threads": threads,
        "seconds": time.monotonic() - started,
        "runs": in_order,
        "quantities": quantities,
    }


def compare(values: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds, and the paired differences of the learned policy to the others.

    Args:
        values: By policy, one entry per seed.

    Returns:
        ``mean`` by policy, and ``gain`` by the other policy, as :func:`gain_over` gives it.
    """
    learned = [value["learned"] for value in values]
    gains = {
        other: gain_over(learned, [value[other] for value in values]) for other in POLICIES[1:]
    }
    means = {policy: float(np.mean([value[policy] for value in values])) for policy in POLICIES}
    return {"mean": means, "gain": gains}


def gain_over(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Paired differences, one per seed.

    Returns:
        ``mean``, and the 95 % confidence interval ``low``, ``high`` of Student's t distribution.
    """
    from scipy import stats

    differences = np.array(values) - np.array(others)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1) / np.sqrt(len(differences)))
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    runs = result["runs"]
    steps = ", ".join(
        f"{run['chosen']['mean']:.0f} ± {run['chosen']['deviation']:.0f}" for run in runs
    )
    shares = [" / ".join(f"{x:.0%}" for x in (run["layers"] or {}).values()) for run in runs]
    rows = [
        f"- {len(runs)} seeds, {result['config']['run']['decisions']:,} decisions each; "
        f"{result['seconds']:.0f} s in all",
        f"- timesteps that the learned policies choose: {steps}",
        *([f"- their shares of the layers: {', '.join(shares)}"] if any(shares) else []),
        f"- best fixed action: {', '.join(run['fixed'] for run in runs)}",
        "",
        f"| mean over seeds | {' | '.join(POLICIES)} | learned - random [95 %] | "
        "learned - best fixed [95 %] |",
        "| --- " * 6 + "|",
    ]
    for name, found in result["quantities"].items():
        cells = [f"{found['mean'][policy]:.4f}" for policy in POLICIES]
        for other in POLICIES[1:]:
            gain = found["gain"][other]
            cells.append(f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=(__doc__ or "").split("\n")[0],
        epilog="Further options are those of agents.train_reinforce: --key value.",
        allow_abbrev=False,
    )
    add_seeds(parser)
    parser.add_argument("--config", default="digits", metavar="FILE", help="default: digits")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default: 1)")
    chosen, others = parser.parse_known_args(argv)
    check_seeds(parser, chosen)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def run() -> int:
        arguments = ["--config", chosen.config, *others]
        command = parse(arguments, prog=PROG, description="", conflicts=conflicts)
        assert command.config is not None
        result = measure(command.config, range(chosen.seeds), jobs=chosen.jobs, say=say)
        print(table(result))
        if chosen.json is not None:
            write_text(chosen.json, json.dumps(result, indent=1) + "\n")
        return 0

    return guarded(run, PROG)


if __name__ == "__main__":
    sys.exit(main())
