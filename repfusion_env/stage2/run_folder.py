"""What a finished run's folder must hold. Loads nothing heavy."""

from __future__ import annotations

from pathlib import Path

from repfusion_env.registry import did_you_mean


def check_finished(run_dir: str | Path) -> Path:
    """The folder of a finished run.

    Raises:
        ValueError: It is none; the sentence says what is missing.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
        hint = did_you_mean(folder.name, [path.name for path in siblings if path.is_dir()])
        raise ValueError(f"there is no run folder '{folder}'.{hint}")
    for name in ("config.yaml", "run.json"):
        if not (folder / name).is_file():
            raise ValueError(f"'{folder}' is no run folder: it has no {name}")
    for name in ("student.safetensors", "summary.json"):
        if not (folder / name).is_file():
            raise ValueError(
                f"run '{folder}' is not finished: it has no {name}; go on with it by --resume"
            )
    return folder
