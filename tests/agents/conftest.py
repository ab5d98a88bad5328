"""Small experiments for the training commands, and readers of what a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from repfusion_env.config_loading import check, merge, read_config_file, to_yaml


@pytest.fixture
def experiment(tiny: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes ``tiny`` with further overrides as a configuration file; its runs go beside it."""

    def write(name: str = "small", **overrides: Any) -> Path:
        base = merge(merge(read_config_file("digits"), tiny), {"run.folder": str(tmp_path)})
        path = tmp_path / f"{name}.yaml"
        path.write_text(to_yaml(check(merge(base, overrides))), encoding="utf-8")
        return path

    return write


@pytest.fixture
def logged() -> Callable[[Path], list[dict[str, Any]]]:
    """Rows of a run's metrics without those that tell the time."""

    def read(run: Path) -> list[dict[str, Any]]:
        rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [
            {tag: value for tag, value in row.items() if not tag.startswith(("charts/", "time/"))}
            for row in rows
        ]

    return read


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Makes a context whose runs end without their pictures, which take as long as the runs."""

    @contextmanager
    def saved_nowhere() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr("agents.reporting.save_figure", lambda figure, path: None)
            yield

    return saved_nowhere


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons run their jobs here, as starting others takes longer than all of them."""
    from agents.comparison import progress
    from agents.comparison.workers import DONE, FAILED, STOPPED, Outcome, Stop

    def here(work: Callable[[Any], Any], jobs: Any, *where: Any, started: Any) -> Any:
        for job in jobs:
            started(job)
            try:
                yield Outcome(job, DONE, work(job))
            except Stop:
                yield Outcome(job, STOPPED, None)
                return
            except Exception as error:
                yield Outcome(job, FAILED, str(error))

    monkeypatch.setattr(progress, "run_on", here)
