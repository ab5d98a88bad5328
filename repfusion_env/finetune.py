"""Fine-tune a distilled student on labels: ``python -m repfusion_env.finetune RUN_DIR``.

python -m repfusion_env.finetune RUN_DIR --labels 10%
python -m repfusion_env.finetune RUN_DIR --labels 10% --resume        # after Ctrl-C or a kill
python -m repfusion_env.finetune RUN_DIR --labels 10% --from-scratch  # the control
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
    open_new,
    read_settings,
    read_summary,
    write_metrics,
    write_summary,
)
from repfusion_env.stage2.run_folder import check_finished
from repfusion_env.stage2.settings import CHOICES, FREE_ON_RESUME, PRESETS, FinetuneConfig

if TYPE_CHECKING:
    from repfusion_env.stage2.finetuning import FinetuneResult

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
    config = FinetuneConfig(**(PRESETS[preset or "default"] | chosen))
    scratch = given["from_scratch"]
    folder = run / folder_name(config.labels, from_scratch=scratch, name=given["name"])
    if given["resume"]:
        config = _resumed(folder, PRESETS[preset] | chosen if preset else chosen)
        if (summary := read_summary(folder)) is not None:
            print(f"'{folder}' is finished: held-out accuracy {100 * summary['accuracy']:.1f} %")
            return 0
    else:
        check_new(folder)
    return _train(run, folder, config, given, shlex.join(words))


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
    run: Path, folder: Path, config: FinetuneConfig, given: dict[str, Any], words: str
) -> int:
    from repfusion_env.config_loading import load_config
    from repfusion_env.devices import resolve_device
    from repfusion_env.stage2 import finetune, label_count, load_banks, load_student
    from repfusion_env.stage2.finetuning import Stopped
    from repfusion_env.stage2.loading import fresh_backbone

    experiment = load_config(run / "config.yaml")
    place = resolve_device(given["device"] or experiment.device)
    train, heldout = load_banks(experiment, place)
    count = label_count(config.labels, len(train))
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
        f"{count:,} of {len(train):,} labels, {config.total_steps(count):,} steps, {place}"
    )
    with stop_flag() as interrupted:
        try:
            result = finetune(
                backbone,
                train,
                heldout,
                config,
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
        "from_scratch": scratch,
        "labels": config.labels,
        "labelled_images": result.labels,
        "training_images": len(train),
        "heldout_images": len(heldout),
        "accuracy": result.accuracy,
        "loss": result.loss,
        "steps": result.steps,
        "seconds": result.seconds,
        "seed": config.seed,
    }
    _write(folder, result, summary)
    print(
        f"held-out accuracy {100 * result.accuracy:.1f} %, cross-entropy {result.loss:.3f}, "
        f"{result.seconds:.1f} s\nwrote '{folder}' (summary.json, curve.png, model.safetensors)"
    )
    return 0


def _write(folder: Path, result: FinetuneResult, summary: dict[str, Any]) -> None:
    from repfusion_env.figures import save_figure
    from repfusion_env.stage2.curve_figure import curve_figure
    from repfusion_env.weights import save_weights

    save_weights(result.model, folder / "model.safetensors")
    start = "random weights" if summary["from_scratch"] else "the distilled student"
    title = (
        f"{summary['student']} fine-tuned from {start} on "
        f"{summary['labelled_images']:,} labelled images"
    )
    save_figure(curve_figure(result.curve, title=title), folder / "curve.png")
    write_summary(folder, summary)


def _parser() -> Parser:
    made = Parser(
        PROG,
        "RUN_DIR [--labels 10%%] [options]",
        "Fine-tune the student of a finished run on few or all labels. Writes "
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
