"""Probe a distilled student: ``python -m repfusion_env.probe RUN_DIR``.

A linear classifier and nearest neighbours on its frozen features, with few and with all labels. No
hyper-parameter is chosen by a held-out label; see docs/stage2.md for the protocol.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repfusion_env.atomic import write_text
from repfusion_env.command_line import Parser, device, guarded, number
from repfusion_env.stage2.labels import label_count
from repfusion_env.stage2.run_folder import check_finished

if TYPE_CHECKING:
    from repfusion_env.data import ImageBank
    from students import Backbone

LABELS = ("1%", "10%", "100%")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 2 for a wrong use and 130 after Ctrl-C."""
    return guarded(lambda: _run(argv))


def probe_table(
    backbone: Backbone,
    train: ImageBank,
    heldout: ImageBank,
    *,
    labels: Sequence[str | int | float] = LABELS,
    repeats: int = 5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Probe ``backbone`` with several numbers of labels, several draws of each.

    Args:
        backbone: Any student.
        train: Images of which some keep their labels.
        heldout: Images to test on.
        labels: Percentages or numbers of labels.
        repeats: Draws of labels; all labels are drawn once.
        seed: Of the first draw and its validation split; the next draws count on from it.

    Returns:
        A row for each entry of ``labels``: labels, images, and of "linear" and "knn" each the mean
        accuracy, the deviation between draws (None for one), and the single draws.

    Raises:
        ValueError: More labels than images, or too few to validate on.
    """
    from repfusion_env.stage2 import embed, knn_probe, labelled_subset, linear_probe

    counts = [label_count(given, len(train)) for given in labels]
    for given, count in zip(labels, counts, strict=True):
        if count < 2:
            raise ValueError(
                f"labels: {given} of {len(train):,} training images is {count}; a probe needs 2 or "
                "more to validate its settings"
            )
    train_x, test_x = embed(backbone, train), embed(backbone, heldout)
    rows = []
    for given, count in zip(labels, counts, strict=True):
        draws: dict[str, list[dict[str, Any]]] = {"linear": [], "knn": []}
        for draw in range(seed, seed + (1 if count == len(train) else repeats)):
            ids = labelled_subset(train.labels, count, draw)
            data = (train_x[ids], train.labels[ids], test_x, heldout.labels)
            draws["linear"].append(asdict(linear_probe(*data, seed=draw)))
            draws["knn"].append(asdict(knn_probe(*data, seed=draw)))
        rows.append(
            {"labels": str(given), "images": count}
            | {kind: _summary(found) for kind, found in draws.items()}
        )
    return rows


def _summary(draws: list[dict[str, Any]]) -> dict[str, Any]:
    import statistics

    accuracies = [draw["accuracy"] for draw in draws]
    deviation = statistics.stdev(accuracies) if len(draws) > 1 else None
    return {"accuracy": statistics.fmean(accuracies), "deviation": deviation, "draws": draws}


def _run(argv: Sequence[str] | None) -> int:
    given = _parser().read(argv)
    folder = check_finished(given["run_dir"])
    for labels in given["labels"]:
        label_count(labels, 10**12)  # how it is written is checked before anything loads

    from repfusion_env.config_loading import load_config
    from repfusion_env.devices import resolve_device
    from repfusion_env.stage2 import load_banks, load_student
    from repfusion_env.stage2.loading import fresh_backbone

    config = load_config(folder / "config.yaml")
    if config.task != "classification":
        raise ValueError(
            f"run '{folder}' was made for task '{config.task}', and a probe tells classes of whole "
            f"images apart; train its head alone by python -m repfusion_env.finetune {folder} "
            "--frozen"
        )
    place = resolve_device(given["device"] or config.device)
    train, heldout = load_banks(config, place)
    if given["train_images"] is not None:
        train = train.head(given["train_images"])
    scratch = given["from_scratch"]
    backbone = (
        fresh_backbone(config, train.shape, seed=given["seed"])
        if scratch
        else load_student(folder, shape=train.shape).backbone
    )
    rows = probe_table(
        backbone,
        train,
        heldout,
        labels=given["labels"],
        repeats=given["repeats"],
        seed=given["seed"],
    )
    path = folder / ("probe-scratch.json" if scratch else "probe.json")
    found = {
        "student": config.student.name,
        "from_scratch": scratch,
        "data": train.name,
        "training_images": len(train),
        "heldout_images": len(heldout),
        "seed": given["seed"],
        "rows": rows,
    }
    write_text(path, json.dumps(found, indent=2) + "\n")
    _print(found, path)
    return 0


def _print(found: dict[str, Any], path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{found['student']}, held-out accuracy on {found['heldout_images']:,} images"
    if found["from_scratch"]:
        title += ", random weights"
    table = Table(title=title, header_style="bold", box=None, padding=(0, 2))
    for name in ("labels", "images", "draws", "linear", "strength", "kNN", "neighbours"):
        table.add_column(name, justify="left" if name == "labels" else "right")
    for row in found["rows"]:
        linear, knn = row["linear"], row["knn"]
        table.add_row(
            row["labels"],
            f"{row['images']:,}",
            str(len(linear["draws"])),
            _percent(linear),
            _span([draw["strength"] for draw in linear["draws"]]),
            _percent(knn),
            _span([draw["neighbours"] for draw in knn["draws"]]),
        )
    # As wide as it needs to be: in a log file rich would squeeze it into 80 columns.
    Console(width=max(Console().width, 110)).print(table)
    print(f"wrote '{path}'")


def _percent(found: dict[str, Any]) -> str:
    deviation = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
    return f"{100 * found['accuracy']:.1f}{deviation} %"


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _parser() -> Parser:
    made = Parser(
        "python -m repfusion_env.probe",
        "RUN_DIR [options]",
        "Probe a distilled student: a linear classifier and nearest neighbours on its frozen "
        "features. Regularisation and neighbours are chosen on a validation split of the training "
        "labels.",
    )
    option = made.add_argument
    option("run_dir", metavar="RUN_DIR", help="folder of a finished run")
    option(
        "--labels",
        nargs="+",
        default=list(LABELS),
        metavar="N",
        help="percentages or numbers of labelled images (default: 1%% 10%% 100%%)",
    )
    option(
        "--repeats",
        type=number(int, 1),
        default=5,
        metavar="N",
        help="draws of the labels; all labels are drawn once (default: 5)",
    )
    option("--seed", type=number(int, 0), default=0, metavar="N", help="of the draws (default: 0)")
    option(
        "--train-images",
        type=number(int, 2),
        metavar="N",
        help="use only the first so many training images",
    )
    option(
        "--from-scratch",
        action="store_true",
        help="probe the same architecture with random weights, as a control",
    )
    option("--device", type=device, metavar="NAME", help="default: the run's")
    return made


if __name__ == "__main__":
    raise SystemExit(main())
