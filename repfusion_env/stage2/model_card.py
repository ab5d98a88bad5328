"""The model card of an exported student, from what its run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from repfusion_env.stage2.files import headline_of
from repfusion_env.stage2.loading import SavedStudent


def model_card(saved: SavedStudent) -> str:
    """The card as Markdown: what the network is, how it was trained, what was measured, its use."""
    config, backbone = saved.config, saved.backbone
    summary = json.loads((saved.folder / "summary.json").read_text(encoding="utf-8"))
    run = json.loads((saved.folder / "run.json").read_text(encoding="utf-8"))
    channels, size = saved.in_channels, saved.image_size
    parameters = sum(weight.numel() for weight in backbone.parameters())
    stages = ", ".join(f"`{name}` ({width})" for name, width in backbone.channels.items())
    own = ", own_code=True" if ":" in saved.name else ""
    usage = f"""```python
from students import load_backbone
backbone = load_backbone("FOLDER"{own})
maps = backbone(images)  # images (N, {channels}, {size}, {size}) in [-1, 1]
```"""
    return f"""---
library_name: repfusion-env
tags: [representation-distillation, image-feature-extraction]
---

# {saved.name}, stage 1 on {config.data.name}

A recognition backbone of {parameters:,} parameters for {size}x{size} images with {channels} \
channel(s), without a task head. {_origin(saved, run, summary)}

{usage}

`maps` holds the map of each stage by its name, shallow to deep: {stages}. The feature of an image \
is the average of the last one: `maps["{backbone.stages[-1]}"].mean((2, 3))`.

## Training

| | |
| --- | --- |
{_table(_training(saved, run, summary))}

## Measured

{_measured(saved, summary)}

## Limits

It has seen the images of one data set and one image size, and has not been tested on others. What \
the teacher's images lack, or show one-sidedly, this network has not learned either.
"""


def _origin(saved: SavedStudent, run: dict[str, Any], summary: dict[str, Any]) -> str:
    if _teacher_images(summary) == 0:
        return f"It was trained without a teacher, by `{run['agent']}`."
    return (
        f"It learned by matching features of the frozen teacher `{_teacher(saved)}` "
        f"at timesteps chosen by `{run['agent']}`."
    )


def _teacher(saved: SavedStudent) -> str:
    """The teacher's name; of a folder on this machine the last part, the rest being private."""
    model = saved.config.teacher.model
    return Path(model).name if Path(model).expanduser().is_absolute() else model


def _teacher_images(summary: dict[str, Any]) -> int | None:
    counts = summary.get("teacher_evaluations")
    return None if counts is None else int(sum(counts.values()))


def _training(
    saved: SavedStudent, run: dict[str, Any], summary: dict[str, Any]
) -> list[tuple[str, str]]:
    config = saved.config
    rows = [("data", f"{config.data.name}, training split")]
    if _teacher_images(summary) != 0:
        losses = ", ".join(
            f"{name} {weight:g}" for name, weight in config.distillation.losses.items()
        )
        rows += [
            ("teacher", f"{_teacher(saved)}, {config.teacher.input} input"),
            ("distillation losses", losses),
        ]
        if config.distillation.task_weight:
            rows.append(("weight of the task loss", f"{config.distillation.task_weight:g}"))
    if config.contrastive.weight:
        rows.append(("weight of the contrastive loss", f"{config.contrastive.weight:g}"))
    optimizer = config.optimizer
    rows += [
        ("agent", str(run["agent"])),
        ("image presentations", f"{summary.get('decisions', config.run.decisions):,}"),
        ("optimizer", f"{optimizer.name}, learning rate {optimizer.learning_rate:g}"),
        ("seed", str(config.seed)),
        ("run", f"{saved.folder.resolve().name}, {run['created']}"),
    ]
    return rows


def _measured(saved: SavedStudent, summary: dict[str, Any]) -> str:
    parts = []
    accuracy = (summary.get("student") or {}).get("linear_probe_accuracy")
    if accuracy is not None:
        most = saved.config.evaluation.probe_images
        parts.append(
            f"Linear probe at the end of the run, fitted to at most {most:,} training images: "
            f"{100 * accuracy:.1f} % of the held-out images."
        )
    path = saved.folder / "probe.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        lines = [
            f"| {row['labels']} ({row['images']:,}) | {_percent(row['linear'])} | "
            f"{_percent(row['knn'])} |"
            for row in found["rows"]
        ]
        parts.append(
            f"Frozen features, held-out accuracy on {found['heldout_images']:,} images, mean and "
            "deviation over draws of the labels:\n\n"
            "| labels | linear probe | nearest neighbours |\n| --- | --- | --- |\n"
            + "\n".join(lines)
        )
    tuned = sorted(saved.folder.glob("finetune-*/summary.json"))
    if tuned:
        parts.append("Fine-tuned as a whole (these weights are not in this folder):\n")
        parts[-1] += "".join(f"\n- {_tuned(path)}" for path in tuned)
    return "\n\n".join(parts) or "Nothing yet; see `python -m repfusion_env.probe`."


def _tuned(path: Path) -> str:
    found = json.loads(path.read_text(encoding="utf-8"))
    start = ", the same architecture from random weights" if found["from_scratch"] else ""
    labels = f"{found['labelled_images']:,} labels"
    if "headline" not in found or found["headline"] == "accuracy":
        return f"`{path.parent.name}`, {labels}{start}: {100 * found['accuracy']:.1f} %"
    return (
        f"`{path.parent.name}`, {found['task']}, {found['labelled_images']:,} images{start}: "
        f"{headline_of(found)}"
    )


def _percent(found: dict[str, Any]) -> str:
    deviation = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
    return f"{100 * found['accuracy']:.1f}{deviation} %"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows)
