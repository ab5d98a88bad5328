"""A run's folder: its configuration, metrics, TensorBoard events, checkpoints and summary.

    runs/<name>/config.yaml      the resolved configuration; the run can be repeated from it
                run.json         agent, label, time of creation, the agent's settings
                metrics.jsonl    one line per logging point
                events.out.*     the same for TensorBoard, at global step = decisions
                checkpoints/     see :mod:`repfusion_env.checkpoint`
                summary.json, summary.png

One process at a time writes to a run; a lock that the system drops with its process sees to it.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repfusion_env.atomic import remove_leftovers, write_text
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import load_config, to_yaml
from repfusion_env.folder_lock import FolderTaken, lock_folder
from repfusion_env.metrics import columns, plain, read_rows, write_lines
from repfusion_env.registry import did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from repfusion_env.events import EventFile


class RunError(ValueError):
    """A run folder that cannot be made, opened or written."""


class Run:
    """One run folder, open for writing. Made by :meth:`create` or :meth:`resume`.

    Attributes:
        folder: The run's folder.
        config: The resolved configuration.
        agent: Name of the agent that the run trains.
        settings: What the agent's command was told beside the configuration.
    """

    def __init__(
        self,
        folder: Path,
        config: ExperimentConfig,
        agent: str,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Lock ``folder``, which must be a complete run folder, and open its metrics."""
        self.folder = folder
        self.config = config
        self.agent = agent
        self.settings = dict(settings or {})
        self._events: EventFile | None = None
        self._purge_step: int | None = None
        self._lock = _lock(folder)
        try:
            remove_leftovers(folder, "*")
            rows = read_rows(self.metrics_path)
            if rows.torn:
                write_lines(self.metrics_path, rows.lines)
            self._metrics = self.metrics_path.open("ab")
        except BaseException:
            os.close(self._lock)
            raise

    @classmethod
    def create(
        cls,
        config: ExperimentConfig,
        *,
        agent: str,
        label: str,
        settings: Mapping[str, str] | None = None,
    ) -> Run:
        """Make a new run folder under ``config.run.folder``.

        Args:
            config: The resolved configuration; saved with the run.
            agent: Name of the agent, for instance ``"reinforce"``.
            label: What the run is named after where ``config.run.name`` is None: the folder is then
                ``<label>-<agent>-<YYYYmmdd-HHMMSS>``, with ``-2``, ``-3``, ... where that is taken.
            settings: What the agent's command was told beside it; saved with the run.

        Raises:
            RunError: The folder exists already or cannot be made. Nothing is overwritten.
        """
        folder = _make_folder(config, f"{label}-{agent}")
        about = {
            "agent": agent,
            "label": label,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **({"settings": dict(settings)} if settings else {}),
        }
        with writing(folder):
            write_text(folder / "config.yaml", to_yaml(config))
            write_text(folder / "run.json", json.dumps(about, indent=2) + "\n")
            return cls(folder, config, agent, settings)

    @classmethod
    def resume(cls, folder: str | Path) -> Run:
        """Open an existing run folder to go on with it.

        Raises:
            RunError: ``folder`` is no run folder, or another process writes to it.
            ConfigError: The run's configuration was edited into something that cannot be used.
        """
        folder = Path(folder)
        if not folder.is_dir():
            siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
            hint = did_you_mean(folder.name, [path.name for path in siblings if path.is_dir()])
            raise RunError(f"there is no run folder '{folder}'.{hint}")
        for name in ("run.json", "config.yaml"):
            if not (folder / name).is_file():
                raise RunError(f"'{folder}' is no run folder: it has no {name}")
        try:
            about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            agent, settings = about["agent"], dict(about.get("settings", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"'{folder / 'run.json'}' does not name the run's agent") from error
        config = load_config(folder / "config.yaml")
        with writing(folder):
            return cls(folder, config, str(agent), settings)

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logging point."""
        return self.folder / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """What :meth:`write_summary` writes."""
        return self.folder / "summary.json"

    @property
    def figure_path(self) -> Path:
        """Where the summary figure belongs."""
        return self.folder / "summary.png"

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints are."""
        return self.folder / "checkpoints"

    def log(
        self,
        step: int,
        decisions: int,
        scalars: Mapping[str, float | Sequence[float]],
        histograms: Mapping[str, np.ndarray | Tensor] | None = None,
        figures: Mapping[str, Figure] | None = None,
    ) -> None:
        """Append one row to ``metrics.jsonl`` and the same to TensorBoard.

        Args:
            step: Steps done so far.
            decisions: Decisions made so far; TensorBoard's global step.
            scalars: Numbers by tag. A list of numbers (counts over the grid) goes to the row alone;
                NaN and infinity become null there.
            histograms: Samples by tag, for TensorBoard alone.
            figures: Figures by tag, for TensorBoard alone.

        Raises:
            RunError: The disk is full or cannot be written.
        """
        row: dict[str, Any] = {"step": int(step), "decisions": int(decisions)}
        if taken := row.keys() & scalars.keys():
            raise ValueError(f"'{min(taken)}' is a column of every row and no tag")
        row |= {tag: plain(value) for tag, value in scalars.items()}
        line = json.dumps(row, allow_nan=False).encode("utf-8") + b"\n"
        with writing(self.folder):
            self._metrics.write(line)
            self._metrics.flush()
            events = self._event_file()
            for tag, value in scalars.items():
                if np.ndim(value) == 0:
                    events.add_scalar(tag, float(value), decisions)  # type: ignore[arg-type]
            for tag, samples in (histograms or {}).items():
                if math.prod(samples.shape):
                    events.add_histogram(tag, samples, decisions)
            for tag, figure in (figures or {}).items():
                events.add_image(tag, _pixels(figure), decisions)
            events.flush()

    def rewind(self, step: int) -> None:
        """Forget what was logged after ``step``, so that going on from there leaves no duplicates.

        Args:
            step: The step of the checkpoint that the run goes on from.
        """
        with writing(self.folder):
            self._metrics.close()
            rows = read_rows(self.metrics_path)
            kept = [
                (line, row)
                for line, row in zip(rows.lines, rows.rows, strict=True)
                if row["step"] <= step
            ]
            write_lines(self.metrics_path, [line for line, _ in kept])
            self._metrics = self.metrics_path.open("ab")
            self._close_events()
        # TensorBoard drops the events of earlier files from this global step on.
        self._purge_step = max((row["decisions"] + 1 for _, row in kept), default=0)

    def metrics(self) -> dict[str, np.ndarray]:
        """What was logged, an array per column; see :func:`repfusion_env.metrics.columns`."""
        return columns(read_rows(self.metrics_path).rows)

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint and keep the last ``config.run.keep_checkpoints``.

        What was logged up to here is on the disk before the checkpoint is, so that a run never
        goes on after a gap. Raises what :func:`repfusion_env.checkpoint.save_checkpoint` raises.
        """
        from repfusion_env.checkpoint import save_checkpoint

        with writing(self.folder):
            if self._events is not None:
                self._events.flush()
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        return save_checkpoint(
            self.checkpoint_folder,
            step,
            state,
            kind=self.agent,
            keep=self.config.run.keep_checkpoints,
        )

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """The newest usable ``(step, state)``, or None; see :mod:`repfusion_env.checkpoint`."""
        from repfusion_env.checkpoint import load_latest

        return load_latest(self.checkpoint_folder, kind=self.agent)

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write ``summary.json``: nested mappings, lists, numbers (NaN becomes null) and text."""
        text = json.dumps(plain(summary), indent=2, allow_nan=False, ensure_ascii=False)
        with writing(self.folder):
            write_text(self.summary_path, text + "\n")
        return self.summary_path

    def close(self) -> None:
        """Let another process write to the run; every row is on its way to the disk already.

        May be called twice. Does not raise: what could not be written has been said before.
        """
        if self._lock < 0:
            return
        for close in (self._metrics.close, self._close_events):
            with suppress(OSError):
                close()
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _event_file(self) -> EventFile:
        if self._events is None:
            from repfusion_env.events import EventFile

            self._events = EventFile(self.folder, self._purge_step)
            self._purge_step = None
        return self._events

    def _close_events(self) -> None:
        if self._events is not None:
            events, self._events = self._events, None
            events.close()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        raise RunError(f"run '{folder}' cannot be written: {error.strerror or error}") from error


def name_problem(config: ExperimentConfig) -> str | None:
    """What is wrong with ``run.name``, as a sentence: no plain name, or taken; else None."""
    name = config.run.name
    if name is None:
        return None
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        return f"run.name: {name!r} given; it must be the plain name of a folder"
    folder = Path(config.run.folder) / name
    if folder.exists():
        return (
            f"run.name: '{folder}' exists already; go on with it by --resume {folder}, or choose "
            "another name"
        )
    return None


def _make_folder(config: ExperimentConfig, stem: str) -> Path:
    root = Path(config.run.folder)
    name = config.run.name
    problem = name_problem(config)
    if problem is not None:
        raise RunError(problem)
    stem = re.sub(r"[^\w.-]+", "-", stem) + time.strftime("-%Y%m%d-%H%M%S")
    try:
        root.mkdir(parents=True, exist_ok=True)
        attempt = 1
        while True:
            folder = root / (name or (stem if attempt == 1 else f"{stem}-{attempt}"))
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                if name is not None:  # made by another process since it was looked for
                    raise RunError(name_problem(config)) from None
                attempt += 1
    except OSError as error:
        raise RunError(f"run.folder: '{root}' cannot be written: {error.strerror}") from error


def _lock(folder: Path) -> int:
    """Hold ``folder/.lock`` until the returned descriptor is closed or the process ends."""
    try:
        return lock_folder(folder, what="run")
    except FolderTaken as error:
        raise RunError(
            f"run '{folder}' is being written by {error}; "
            f"wait for it to end, or choose another run.name"
        ) from None


def _pixels(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
