"""What the command leaves behind: ``summary.json``, ``predictions.png`` and a table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from repfusion_env.atomic import atomic_file, write_text
from repfusion_env.tasks.pixel_probing.measuring import PixelProbeResult


def write_report(found: PixelProbeResult, told: dict[str, Any], folder: Path) -> list[Path]:
    """Write the files of a result.

    Args:
        found: The result.
        told: What the summary says first: data set, teacher and the like, JSON-able.
        folder: Made where it is not there.

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "summary.json"]
    write_text(files[0], json.dumps(told | summary(found), indent=2) + "\n")
    if found.predictions is not None:
        from repfusion_env.prediction_figure import prediction_figure

        percent = f"{headline(found)}, {found.images} labelled images"
        figure = prediction_figure(found.predictions, f"Pixel probe: {percent}")
        files.append(folder / "predictions.png")
        with atomic_file(files[1]) as file:
            figure.savefig(file, format="png")
    return files


def summary(found: PixelProbeResult) -> dict[str, Any]:
    """The result as plain values."""
    metrics = {
        name: {"mean": mean, "deviation": deviation(found, name), "draws": found.values(name)}
        for name, mean in found.metrics.items()
    }
    return {
        "layers": list(found.layers),
        "timesteps": list(found.timesteps),
        "vector_length": found.width,
        "labelled_images": found.images,
        "heldout_images": found.heldout_images,
        "members": found.members,
        "seeds": list(found.seeds),
        "headline": found.task.headline,
        "metrics": metrics,
        "seconds": round(found.seconds, 1),
    }


def deviation(found: PixelProbeResult, name: str) -> float | None:
    """Between draws; None with fewer than two."""
    values = found.values(name)
    return statistics.stdev(values) if len(values) > 1 else None


def headline(found: PixelProbeResult) -> str:
    """The metric by which students are compared, with its deviation."""
    return f"{_name(found.task.headline)} {_value(found, found.task.headline)}"


def print_table(found: PixelProbeResult) -> None:
    """All metrics on the console, the headline first."""
    from rich.console import Console
    from rich.table import Table

    title = (
        f"pixel probe on {found.images} labelled images, {found.heldout_images:,} held-out images"
    )
    table = Table(title=title, header_style="bold", box=None, padding=(0, 2))
    table.add_column("metric")
    table.add_column("value" if len(found.draws) == 1 else "mean", justify="right")
    names = list(found.metrics)
    for name in sorted(names, key=lambda name: name != found.task.headline):
        table.add_row(_name(name), _value(found, name))
    Console(width=max(Console().width, 80)).print(table)


def _value(found: PixelProbeResult, name: str) -> str:
    factor, unit = (100, " %") if found.task.percent else (1, "")
    spread = deviation(found, name)
    around = "" if spread is None else f" ± {factor * spread:.1f}"
    return f"{factor * found.metrics[name]:.1f}{around}{unit}"


def _name(metric: str) -> str:
    return {"miou": "mIoU"}.get(metric, metric.replace("_", " ").replace("iou/", "IoU of "))
