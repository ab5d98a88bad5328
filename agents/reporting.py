"""What a run leaves at its end: summary.json, summary.png, predictions.png, and a short table."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from agents.command_line import script_of
from agents.evaluation import Evaluation, Predictor, linear_probe_accuracy
from repfusion_env.data.unreadable import unreadable_images
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.figures import reward_by_arm_figure, save_figure, summary_figure
from repfusion_env.layer_names import short_names
from repfusion_env.metric_names import metric_name
from repfusion_env.observations import SAMPLE
from repfusion_env.prediction_figure import draw_predictions, prediction_figure
from repfusion_env.runs import Run, writing
from repfusion_env.tasks import Task

# More arms than this are too many lines for a table, which then shows the best.
MOST_ARMS, BEST_ARMS = 50, 10


def report(
    run: Run, env: RepFusionVectorEnv, found: Evaluation, *, decisions: int, seconds: float
) -> dict[str, Any]:
    """Log the evaluation, write figures and summary into the run folder, and print the table.

    Args:
        run: The finished run.
        env: Its environment; the student in it is probed.
        found: The policy's evaluation on held-out images.
        decisions: Decisions made.
        seconds: Time spent on them.

    Returns:
        The summary as written.
    """
    trainer, accuracy = env.trainer, None
    if trainer.parts.train.judged.labelled:
        accuracy = linear_probe_accuracy(trainer, run.config.evaluation.probe_images)
    fixed = {arm: float(value) for arm, value in zip(found.arms, found.by_arm, strict=True)}
    timesteps = found.timesteps
    summary: dict[str, Any] = {
        "agent": run.agent,
        "reward": {
            "kind": found.kind,
            "learned": found.learned,
            "random": found.random,
            "fixed": fixed,
            "best_per_image": found.best_per_image,
        },
        "timestep": {"mean": float(timesteps.mean()), "deviation": float(timesteps.std())},
        "student": {
            "linear_probe_accuracy": accuracy,
            "headline": trainer.task.headline,
            "metrics": dict(found.metrics),
        },
        "heldout_images": len(found.timesteps),
        "decisions": decisions,
        "decisions_per_second": decisions / seconds,
        "seconds": seconds,
        "teacher_evaluations": teacher_evaluations(env, found.timesteps.shape[1], decisions),
    }
    if run.config.data.labels == "clusters" and trainer.parts.train.given is None:
        summary["student"]["probe_labels"] = "clusters"  # there are no others
    if found.layers is not None:
        shares = np.bincount(found.layers, minlength=len(found.layer_names)) / len(found.layers)
        summary["layer"] = dict(zip(found.layer_names, shares.tolist(), strict=True))
    caches = trainer.parts.features.caches
    if caches is not None:
        summary["cache"] = caches.summary()
    summary |= unreadable_images(trainer.parts.train, trainer.parts.heldout)
    _draw(run, env, found, decisions)
    run.write_summary(summary)
    _print(run, found, summary, metric_words(trainer.task, found.metrics))
    return summary


def teacher_evaluations(env: RepFusionVectorEnv, timesteps: int, decisions: int) -> dict[str, int]:
    """Images that went through the teacher's network for a run; those of its evaluation not.

    Args:
        env: Where the run trained.
        timesteps: k, of one decision.
        decisions: Made in all.

    Returns:
        ``setup``: the feature statistics, the clusters that are labels, and the embedding that the
        agent sees; ``training``, in which the agent's looks at streamed images count too.
    """
    config, train = env.config, len(env.trainer.parts.train)
    points = {*env.grid.timesteps, *config.fusion.timesteps}
    images = min(config.teacher.standardize_images, train)
    whole = config.teacher.standardize == "grid"
    setup = images if whole else len(points) * images
    looks = 0
    caches = env.trainer.parts.features.caches
    kept, embedded = env.trainer.parts.features.setup_computed
    setup = setup if kept is None else kept
    setup += caches is not None  # one image to learn the features' shapes from
    if embedded is not None:
        setup += embedded
    elif config.observation.source == "teacher" and env.trainer.parts.train.streamed:
        setup, looks = setup + min(SAMPLE, train), decisions
    elif config.observation.source == "teacher":
        setup += train
    if config.data.labels == "clusters":
        setup += train + len(env.trainer.parts.heldout)
    if caches is not None:
        return {"setup": setup, "training": looks + caches.summary()["computed"]}
    distilled = decisions * (timesteps + len(config.fusion.timesteps))
    return {"setup": setup, "training": looks + distilled}


def log_evaluation(
    run: Run, env: RepFusionVectorEnv, step: int, decisions: int, found: Evaluation
) -> None:
    """Log what policy and student are worth on held-out images, once for each step.

    Args:
        run: Where to.
        env: Its student's predictions are drawn.
        step: Steps done.
        decisions: Decisions made.
        found: What both are worth.
    """
    tags = {"evaluation/learned_reward": found.learned, "evaluation/random_reward": found.random}
    tags |= {f"evaluation/{name}": value for name, value in found.metrics.items()}
    metrics = run.metrics()
    logged = metrics.get("evaluation/learned_reward")
    if logged is not None and np.isfinite(logged[metrics["step"] == step]).any():
        return  # by an earlier process, or on the way at this very step
    figure = reward_by_arm_figure(**_arms(found))
    noun = found.noun.replace(", ", "_and_")
    figures = {f"evaluation/reward_by_{noun}": figure}
    figures["evaluation/predictions"] = predictions_of(
        env.trainer, env.trainer.task, f"after {decisions:,} decisions"
    )
    run.log(step, decisions, tags, figures=figures)


def predictions_of(trainer: Predictor, task: Task, title: str) -> Figure:
    """A few held-out images, with what the student that evaluation sees says of them."""
    student = trainer.evaluation_student
    shown = draw_predictions(
        task, lambda images: trainer.outputs(images, student), trainer.parts.heldout
    )
    return prediction_figure(shown, title)


def predictions_title(run: Run, task: Task, metrics: Mapping[str, float], images: int) -> str:
    """Which run it is, and what its student is worth."""
    worth = {task.headline: metrics.get(task.headline, math.nan)}
    return f"{run.folder.name}: {metric_words(task, worth)} on {images:,} held-out images"


def metric_words(task: Task, metrics: Mapping[str, float]) -> str:
    """A metric's values in a line, the headline first; those of single classes are left out."""
    others = (name for name in metrics if name != task.headline and "/" not in name)
    words = []
    for name in (task.headline, *others):
        value = metrics.get(name, math.nan)
        shown = f"{value:.1%}" if task.percent else f"{value:.4g}"
        words.append(f"{metric_name(name)} {shown if math.isfinite(value) else 'unknown'}")
    return ", ".join(words)


def _arms(found: Evaluation) -> dict[str, Any]:
    """What figures draw of the arms: of pairs one line for each layer over the timesteps."""
    shape = (len(found.pairs), len(found.layer_names)) if found.pairs else (len(found.arms),)
    counts = found.chosen
    if counts is not None and found.pairs:
        counts = counts.reshape(shape).sum(axis=1)
    return {
        "arms": found.pairs or found.arms,
        "reward": found.by_arm.reshape(shape),
        "counts": counts,
        "noun": found.noun,
        "layers": found.layer_names,
    }


def _draw(run: Run, env: RepFusionVectorEnv, found: Evaluation, decisions: int) -> None:
    metrics = run.metrics()
    log_evaluation(run, env, int(metrics["step"][-1]), decisions, found)
    arms = _arms(found)
    # Of SB3's policies it is not known; of what they chose it is.
    chosen = metrics["timestep/entropy"] + metrics.get("layer/entropy", 0.0)
    figure = summary_figure(
        decisions=metrics["decisions"],
        reward=metrics["reward/mean"],
        entropy=metrics.get("policy/entropy", chosen),
        entropy_of="policy" if "policy/entropy" in metrics else "choice",
        counts_over_time=metrics["timestep/counts"],
        grid=env.grid.timesteps,
        reward_by_arm=arms["reward"],
        learned_counts=arms["counts"],
        arms=arms["arms"],
        noun=found.noun,
        layers=found.layer_names,
        layer_counts_over_time=metrics.get("layer/counts"),
        learned_reward=found.learned,
        random_reward=found.random,
        title=f"{run.folder.name}: {decisions:,} decisions",
    )
    with writing(run.folder):
        save_figure(figure, run.figure_path)
    trainer = env.trainer
    title = predictions_title(run, trainer.task, found.metrics, len(trainer.parts.heldout))
    drawn = predictions_of(trainer, trainer.task, title)
    with writing(run.folder):
        save_figure(drawn, run.folder / "predictions.png")


def _print(run: Run, found: Evaluation, summary: dict[str, Any], words: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    count = len(found.timesteps)
    short = dict(zip(found.layer_names, short_names(found.layer_names, 20), strict=True))
    arms = [", ".join(short.get(part, part) for part in arm.split(", ")) for arm in found.arms]
    table = Table(box=box.SIMPLE_HEAD, title=f"{count} held-out images, same noise")
    table.add_column("policy")
    table.add_column(f"mean {found.kind}", justify="right")
    table.add_column(found.noun, justify="right")
    table.add_row(
        f"learned ({run.agent})", f"[bold]{found.learned:.4f}[/bold]", escape(_chosen(found, short))
    )
    table.add_row("random", f"{found.random:.4f}", "any")
    order = np.argsort(-found.by_arm, kind="stable")
    shown = range(len(order)) if len(order) <= MOST_ARMS else order[:BEST_ARMS].tolist()
    for index in shown:
        name = "fixed (best)" if index == order[0] else "fixed"
        table.add_row(name, f"{found.by_arm[index]:.4f}", escape(arms[index]))
    if len(shown) < len(order):
        table.caption = f"the best {len(shown)} of {len(order)}; all are in summary.json"
    console.print(table)
    config = shlex.quote(str(run.folder / "config.yaml"))
    again = f"python -m agents.{script_of(run.agent)} --config {config}"
    if run.config.run.name is not None:
        again += " --run.name null"  # that name is taken
    student = summary["student"]
    if student["linear_probe_accuracy"] is not None:
        clusters = " (of clusters)" if "probe_labels" in student else ""
        probe = f"linear probe accuracy {student['linear_probe_accuracy']:.1%}{clusters}"
        words = f"{probe}; its own head: {words}"
    lines = {
        "student": words,
        "speed": f"{summary['decisions_per_second']:,.0f} decisions/s, {summary['seconds']:.0f} s",
        "run": f"{run.folder}  (summary.json, summary.png, predictions.png, student.safetensors, "
        "metrics.jsonl)",
        "curves": f"tensorboard --logdir {shlex.quote(str(run.folder.parent))}",
        "again": again,
    }
    if "unreadable_images" in summary:
        count = len(summary["unreadable_images"])
        lines["skipped"] = f"{count:,} unreadable image(s), listed in summary.json"
    for name, text in lines.items():
        console.print(f"{name + ':':9}{text}", highlight=False, soft_wrap=True, markup=False)


def _chosen(found: Evaluation, short: dict[str, str]) -> str:
    """What the policy chose, in a few words."""
    words = []
    if found.noun != "layer":
        words.append(f"{found.timesteps.mean():.0f} ± {found.timesteps.std():.0f}")
    if found.layers is not None:
        shares = np.bincount(found.layers) / len(found.layers)
        name = found.layer_names[int(shares.argmax())]
        words.append(f"{short[name]} ({shares.max():.0%})")
    return ", ".join(words)
