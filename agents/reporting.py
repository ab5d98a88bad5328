"""What a run leaves at its end: summary.json, summary.png, and a short table."""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np

from agents.evaluation import Evaluation, linear_probe_accuracy
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.figures import reward_by_timestep_figure, save_figure, summary_figure
from repfusion_env.runs import Run, writing


def report(
    run: Run, env: RepFusionVectorEnv, found: Evaluation, *, decisions: int, seconds: float
) -> dict[str, Any]:
    """Log the evaluation, write figure and summary into the run folder, and print the table.

    Args:
        run: The finished run.
        env: Its environment; the student in it is probed.
        found: The policy's evaluation on held-out images.
        decisions: Decisions made.
        seconds: Time spent on them.

    Returns:
        The summary as written.
    """
    accuracy = linear_probe_accuracy(env.trainer, run.config.evaluation.probe_images)
    fixed = {str(t): float(value) for t, value in zip(found.grid, found.by_timestep, strict=True)}
    chosen = np.array(found.grid)[found.actions]
    summary: dict[str, Any] = {
        "agent": run.agent,
        "reward": {
            "kind": found.kind,
            "learned": found.learned,
            "random": found.random,
            "fixed": fixed,
            "best_per_image": found.best_per_image,
        },
        "timestep": {"mean": float(chosen.mean()), "deviation": float(chosen.std())},
        "student": {"linear_probe_accuracy": accuracy},
        "heldout_images": len(found.actions),
        "decisions": decisions,
        "decisions_per_second": decisions / seconds,
        "seconds": seconds,
    }
    _draw(run, env, found, decisions)
    run.write_summary(summary)
    _print(run, found, summary)
    return summary


def log_evaluation(run: Run, step: int, decisions: int, found: Evaluation) -> None:
    """Log what a policy is worth on held-out images, once for each step."""
    tags = {"evaluation/learned_reward": found.learned, "evaluation/random_reward": found.random}
    metrics = run.metrics()
    logged = metrics.get("evaluation/learned_reward")
    if logged is not None and np.isfinite(logged[metrics["step"] == step]).any():
        return  # by an earlier process, or on the way at this very step
    figure = reward_by_timestep_figure(found.grid, found.by_timestep, found.counts)
    run.log(step, decisions, tags, figures={"evaluation/reward_by_timestep": figure})


def _draw(run: Run, env: RepFusionVectorEnv, found: Evaluation, decisions: int) -> None:
    metrics = run.metrics()
    log_evaluation(run, int(metrics["step"][-1]), decisions, found)
    figure = summary_figure(
        decisions=metrics["decisions"],
        reward=metrics["reward/mean"],
        entropy=metrics.get("policy/entropy", metrics["timestep/entropy"]),
        counts_over_time=metrics["timestep/counts"],
        grid=found.grid,
        reward_by_timestep=found.by_timestep,
        learned_counts=found.counts,
        learned_reward=found.learned,
        random_reward=found.random,
        title=f"{run.folder.name}: {decisions:,} decisions",
    )
    with writing(run.folder):
        save_figure(figure, run.figure_path)


def _print(run: Run, found: Evaluation, summary: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, title=f"{len(found.actions)} held-out images, same noise")
    table.add_column("policy")
    table.add_column(f"mean {found.kind}", justify="right")
    table.add_column("timestep", justify="right")
    table.add_row(
        f"learned ({run.agent})",
        f"[bold]{found.learned:.4f}[/bold]",
        f"{summary['timestep']['mean']:.0f} ± {summary['timestep']['deviation']:.0f}",
    )
    table.add_row("random", f"{found.random:.4f}", "any")
    best = int(found.by_timestep.argmax())
    for index, (timestep, reward) in enumerate(zip(found.grid, found.by_timestep, strict=True)):
        name = "fixed (best)" if index == best else "fixed"
        table.add_row(name, f"{reward:.4f}", str(timestep))
    console.print(table)
    script = "train_reinforce" if run.agent == "reinforce" else "train_sb3"
    again = f"python -m agents.{script} --config {shlex.quote(str(run.folder / 'config.yaml'))}"
    if run.config.run.name is not None:
        again += " --run.name null"  # that name is taken
    lines = {
        "student": f"linear probe accuracy {summary['student']['linear_probe_accuracy']:.1%}",
        "speed": f"{summary['decisions_per_second']:,.0f} decisions/s, {summary['seconds']:.0f} s",
        "run": f"{run.folder}  (summary.json, summary.png, student.safetensors, metrics.jsonl)",
        "curves": f"tensorboard --logdir {shlex.quote(str(run.folder.parent))}",
        "again": again,
    }
    for name, text in lines.items():
        console.print(f"{name + ':':9}{text}", highlight=False, soft_wrap=True, markup=False)
