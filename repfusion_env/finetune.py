"""Fine-tune a distilled student: ``python -m repfusion_env.finetune RUN_DIR``.

python -m repfusion_env.finetune RUN_DIR --labels 10%
python -m repfusion_env.finetune RUN_DIR --labels 10% --resume        # after Ctrl-C or a kill
python -m repfusion_env.finetune RUN_DIR --labels 10% --from-scratch  # the control

The task is the run's: classes, masks, points or boxes. ``--frozen`` trains the head alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repfusion_env.command_line import (
    INTERRUPTED,
    Parser,
    device,
    guarded,
    number,
    stop_flag,
)
from repfusion_env.stage2.files import (
    check_new,
    folder_name,
    headline_of,
    open_new,
    read_settings,
    read_summary,
    write_metrics,
    write_summary,
)
from repfusion_env.stage2.run_folder import check_finished
from repfusion_env.stage2.settings import (
    AUGMENTATION,
    CHOICES,
    FREE_ON_RESUME,
    PRESETS,
    FinetuneConfig,
    augmentation_of,
)

if TYPE_CHECKING:
    from repfusion_env.config import ExperimentConfig
    from repfusion_env.data import ImageBank
    from repfusion_env.stage2.finetuning import FinetuneResult
    from repfusion_env.tasks import Task

PROG = "python -m repfusion_env.finetune"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 2 for a wrong use and 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(words))


def _run(words: list[str]) -> int:
    given = _parser().read(words)
    run = check_finished(given["run_dir"])
    preset = given["preset"]
    chosen = {item.name: given[item.name] for item in fields(FinetuneConfig) if item.name in given}
    FinetuneConfig(**(PRESETS[preset or "default"] | chosen))  # refused before anything loads

    from repfusion_env.config_loading import load_config

    experiment = load_config(run / "config.yaml")
    own = augmentation_of(experiment)
    config = FinetuneConfig(**(own | PRESETS[preset or "default"] | chosen))
    scratch = given["from_scratch"]
    folder = run / folder_name(config.labels, from_scratch=scratch, name=given["name"])
    if given["resume"]:
        config = _resumed(folder, PRESETS[preset] | chosen if preset else chosen)
        if (summary := read_summary(folder)) is not None:
            print(f"'{folder}' is finished: held-out {headline_of(summary)}")
            return 0
    else:
        check_new(folder)
    return _train(run, folder, experiment, config, given, shlex.join(words))


def _resumed(folder: Path, chosen: dict[str, Any]) -> FinetuneConfig:
    """The settings of ``folder``, refused where others are asked for."""
    stored = read_settings(folder)
    before = asdict(stored)
    changed = [
        f"{name} was {before[name]}, now {value}"
        for name, value in chosen.items()
        if before[name] != value and name not in FREE_ON_RESUME
    ]
    if changed:
        raise ValueError(f"--resume: '{folder}' was started otherwise: {', '.join(changed)}")
    free = {name: value for name, value in chosen.items() if name in FREE_ON_RESUME}
    return FinetuneConfig(**(before | free))


def _train(
    run: Path,
    folder: Path,
    experiment: ExperimentConfig,
    config: FinetuneConfig,
    given: dict[str, Any],
    words: str,
) -> int:
    from repfusion_env.data.unreadable import unreadable_images
    from repfusion_env.devices import resolve_device
    from repfusion_env.stage2 import finetune, label_count, load_banks, load_student
    from repfusion_env.stage2.finetuning import Stopped
    from repfusion_env.stage2.loading import fresh_backbone
    from repfusion_env.stage2.network import joint_augmentation, stage2_task

    place = resolve_device(given["device"] or experiment.device)
    train, heldout = load_banks(experiment, place)
    count = label_count(config.labels, len(train))
    task = stage2_task(experiment, train, config)
    joint_augmentation(config, train, task)  # what does not fit leaves no folder behind
    scratch = given["from_scratch"]
    backbone = (
        fresh_backbone(experiment, train.shape, seed=config.seed)
        if scratch
        else load_student(run, shape=train.shape).backbone
    )
    if not given["resume"]:
        open_new(folder, config, from_scratch=scratch)
    print(
        f"{experiment.student.name} {'with random weights' if scratch else 'of the run'}, "
        f"{count:,} of {len(train):,} {_noun(task)}, {config.total_steps(count):,} steps, {place}"
    )
    with stop_flag() as interrupted:
        try:
            result = finetune(
                backbone,
                train,
                heldout,
                config,
                experiment=experiment,
                checkpoint_folder=folder / "checkpoints",
                resume=given["resume"],
                interrupted=interrupted,
                watch=lambda curve: write_metrics(folder, curve),
            )
        except Stopped as stop:
            again = words if given["resume"] else f"{words} --resume"
            print(f"{stop}; go on with:\n  {PROG} {again}", file=sys.stderr)
            return INTERRUPTED
    summary = {
        "run": run.resolve().name,
        "student": experiment.student.name,
        "task": experiment.task,
        "from_scratch": scratch,
        "labels": config.labels,
        "labelled_images": result.labels,
        "training_images": len(train),
        "heldout_images": len(heldout),
        "headline": result.headline,
        "metrics": result.metrics,
        "higher_is_better": task.higher_is_better,
        "percent": task.percent,
        **({"accuracy": result.accuracy} if "accuracy" in result.metrics else {}),
        "loss": result.loss,
        "steps": result.steps,
        "seconds": result.seconds,
        "seed": config.seed,
        **unreadable_images(train, heldout),
    }
    _write(folder, result, summary, heldout)
    loss = "cross-entropy" if task.annotation == "labels" else "loss"
    print(
        f"held-out {headline_of(summary)}, {loss} {result.loss:.3f}, {result.seconds:.1f} s\n"
        f"wrote '{folder}' (summary.json, curve.png, predictions.png, model.safetensors)"
    )
    return 0


def _noun(task: Task) -> str:
    """What images are counted by."""
    return "labels" if task.annotation == "labels" else f"images with {task.annotation}"


def _write(
    folder: Path, result: FinetuneResult, summary: dict[str, Any], heldout: ImageBank
) -> None:
    from repfusion_env.figures import save_figure
    from repfusion_env.prediction_figure import draw_predictions, prediction_figure
    from repfusion_env.stage2.curve_figure import curve_figure
    from repfusion_env.weights import save_weights

    task = result.model.task

    save_weights(result.model, folder / "model.safetensors")
    start = "random weights" if summary["from_scratch"] else "the distilled student"
    title = (
        f"{summary['student']} fine-tuned from {start} on "
        f"{summary['labelled_images']:,} labelled images"
    )
    save_figure(curve_figure(result.curve, task=task, title=title), folder / "curve.png")
    shown = draw_predictions(task, result.model, heldout)
    save_figure(prediction_figure(shown, title), folder / "predictions.png")
    write_summary(folder, summary)


def _parser() -> Parser:
    made = Parser(
        PROG,
        "RUN_DIR [--labels 10%%] [options]",
        "Fine-tune the student of a finished run on few or all labels, masks, points or boxes: the "
        "run's task. Writes "
        "RUN_DIR/finetune-<labels>[-scratch][-name]; a stopped run goes on exactly with --resume.",
    )
    option = made.add_argument
    option("run_dir", metavar="RUN_DIR", help="folder of a finished run")
    option("--name", metavar="TEXT", help="end of the folder's name, to tell several apart")
    option("--resume", action="store_true", help="go on where it stopped, with its own settings")
    option(
        "--from-scratch",
        action="store_true",
        help="the same architecture with random weights, as a control",
    )
    option(
        "--preset",
        choices=[name for name in PRESETS if name != "default"],
        help="published: SGD 0.1, 200 epochs, a tenth from 1/2 and 3/4 on, crops and flips",
    )
    option("--device", type=device, metavar="NAME", help="default: the run's")
    group = made.add_argument_group("settings")
    for item in fields(FinetuneConfig):
        flag = "--" + item.name.replace("_", "-")
        default = None if item.default is MISSING else item.default
        if item.name in AUGMENTATION:
            default = "the run's augmentation"
        text = f"{item.metadata['help']} (default: {default})".replace("%", "%%")
        if item.type == "bool":
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
        else:
            names = CHOICES.get(item.name)
            group.add_argument(
                flag,
                type=_converter(str(item.type)),
                default=argparse.SUPPRESS,
                metavar="|".join(names) if names else "N",
                help=text,
            )
    return made


def _converter(kind: str) -> Callable[[str], Any]:
    if kind.startswith("str"):
        return str
    return number(float if kind == "float" else int, float("-inf"))


if __name__ == "__main__":
    raise SystemExit(main())
