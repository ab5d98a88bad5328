"""The folder that fine-tuning leaves inside a run: ``RUN/finetune-<labels>[-scratch][-name]``.

config.json      settings; --resume reads them
checkpoints/     see :mod:`repfusion_env.checkpoint`
metrics.jsonl    a line per evaluation
curve.png        the same, drawn
predictions.png  held-out images beside what is known and what the student says
model.safetensors, summary.json (last)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from repfusion_env.atomic import atomic_file, remove_leftovers, write_text
from repfusion_env.metric_names import metric_name, metric_text
from repfusion_env.metrics import plain
from repfusion_env.stage2.settings import FinetuneConfig


def folder_name(labels: str | int | float, *, from_scratch: bool, name: str | None) -> str:
    """The folder's name: ``finetune-10pct``, ``finetune-140-scratch``, ``finetune-1pct-sgd``.

    Raises:
        ValueError: ``name`` is no plain part of a folder's name.
    """
    if name is not None and not re.fullmatch(r"[\w][\w.-]*", name):
        raise ValueError(
            f"--name: {name!r} given; it must be made of letters, digits, '-', '_' and '.'"
        )
    parts = ["finetune", str(labels).strip().replace(" ", "").replace("%", "pct")]
    return "-".join([*parts, *(["scratch"] if from_scratch else []), *([name] if name else [])])


def check_new(folder: Path) -> None:
    """Refuse a folder that holds something; an empty one is what a kill left at the very start.

    Raises:
        ValueError: See above.
    """
    if folder.exists():
        if not folder.is_dir() or any(item.suffix != ".tmp" for item in folder.iterdir()):
            raise ValueError(
                f"'{folder}' exists already; go on with it by --resume, or choose another --name"
            )
        remove_leftovers(folder, "config.json")


def open_new(folder: Path, config: FinetuneConfig, *, from_scratch: bool) -> None:
    """Make ``folder`` and write the settings.

    Raises:
        ValueError: It exists already. Nothing is overwritten.
    """
    check_new(folder)
    folder.mkdir(exist_ok=True)
    about = {"from_scratch": from_scratch, "settings": asdict(config)}
    write_text(folder / "config.json", json.dumps(about, indent=2) + "\n")


def read_settings(folder: Path) -> FinetuneConfig:
    """The settings that ``folder`` was started with.

    Raises:
        ValueError: There is no such folder, or its ``config.json`` cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        begun = sorted(item.parent.name for item in folder.parent.glob("finetune-*/config.json"))
        there = f"; there are {', '.join(begun)}" if begun else ""
        raise ValueError(f"--resume: there is no '{folder}' to go on with{there}")
    try:
        return FinetuneConfig(**json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' cannot be used: {error}") from error


def write_metrics(folder: Path, curve: list[dict[str, float]]) -> None:
    """Replace ``metrics.jsonl`` by ``curve``; a resumed run leaves no duplicates."""
    remove_leftovers(folder, "metrics.jsonl")
    with atomic_file(folder / "metrics.jsonl") as file:
        file.writelines(json.dumps(plain(row)).encode() + b"\n" for row in curve)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``, whose presence says that fine-tuning is finished."""
    write_text(folder / "summary.json", json.dumps(plain(summary), indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """``summary.json``, or None where fine-tuning is not finished."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def headline_of(summary: Mapping[str, Any]) -> str:
    """The metric by which students are compared, in words: ``accuracy 94.2 %``.

    Args:
        summary: Of a finished fine-tuning; those of classification once named no metric.
    """
    name = summary.get("headline", "accuracy")
    value = summary["metrics"][name] if "metrics" in summary else summary[name]
    text = metric_text(value, percent=summary.get("percent", True))
    return f"{metric_name(name)} {text}"
