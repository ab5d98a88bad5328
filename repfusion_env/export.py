"""Export a distilled student: ``python -m repfusion_env.export RUN_DIR --out FOLDER``.

The folder is loaded back by ``students.load_backbone`` and needs nothing else of this project.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repfusion_env.atomic import write_text
from repfusion_env.command_line import Parser, guarded
from repfusion_env.stage2.run_folder import check_finished

if TYPE_CHECKING:
    from repfusion_env.stage2 import SavedStudent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 2 for a wrong use and 130 after Ctrl-C."""
    return guarded(lambda: _run(argv))


def export_student(saved: SavedStudent, out: str | Path) -> None:
    """Write ``model.safetensors``, ``config.json`` and the model card ``README.md`` to ``out``.

    Args:
        saved: A run's student.
        out: A folder that is not there yet or is empty.

    Raises:
        ValueError: ``out`` holds something already. Nothing is overwritten.
    """
    from repfusion_env.stage2.model_card import model_card
    from repfusion_env.weights import save_weights

    folder = Path(out)
    _check_out(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backbone = saved.backbone
    config = {
        "student": saved.name,
        "in_channels": saved.in_channels,
        "image_size": saved.image_size,
        "pixel_range": [-1, 1],
        "stages": backbone.channels,
        "feature": backbone.stages[-1],
    }
    save_weights(backbone, folder / "model.safetensors")
    write_text(folder / "README.md", model_card(saved))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _check_out(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out: '{folder}' holds something already; choose another folder")


def _run(argv: Sequence[str] | None) -> int:
    given = _parser().read(argv)
    run, out = check_finished(given["run_dir"]), Path(given["out"])
    _check_out(out)

    from repfusion_env.stage2 import load_student

    saved = load_student(run)
    export_student(saved, out)
    print(
        f"wrote '{out}' (model.safetensors, config.json, README.md); load it with\n"
        "  from students import load_backbone\n"
        f'  backbone = load_backbone("{out}"{", own_code=True" if ":" in saved.name else ""})'
    )
    return 0


def _parser() -> Parser:
    made = Parser(
        "python -m repfusion_env.export",
        "RUN_DIR --out FOLDER",
        "Export the student of a finished run as a plain backbone with a model card.",
    )
    made.add_argument("run_dir", metavar="RUN_DIR", help="folder of a finished run")
    made.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    return made


if __name__ == "__main__":
    raise SystemExit(main())
