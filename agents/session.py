"""One training session: run folder, environment, logging, checkpoints, interruption, summary.

Every agent trains inside a session, so that all of them leave the same things behind.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from agents.command_line import INTERRUPTED, Command, script_of
from agents.evaluation import Chooser, evaluate
from agents.rank_session import FollowingRun, about, build_alike, own_device
from agents.reporting import log_evaluation, report
from repfusion_env.checkpoint import CheckpointError, CheckpointWarning
from repfusion_env.config import ExperimentConfig
from repfusion_env.data.decoding_ahead import StreamError
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.progress import Progress
from repfusion_env.ranks import ALONE, OtherRankError, Ranks, say
from repfusion_env.runs import Run, RunError, writing
from repfusion_env.trainer import NonFiniteError
from repfusion_env.weights import save_weights

FAILED = 1
# Within so many seconds a second signal is the first one's echo by the launcher.
ECHO_SECONDS = 3.0


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived, and everything has been saved."""


class BaseSession:
    """What any training loop needs around it.

    Attributes:
        run: The run folder.
        config: The run's configuration.
        restored: (step, state) of the checkpoint to go on from, or None.
        interrupted: Whether the user asked this process to stop; the next save ends the session.
        ranks: The processes that train together.
    """

    ranks: Ranks = ALONE

    @staticmethod
    def build(config: ExperimentConfig, settings: Mapping[str, str]) -> Any:
        """Load and check all that is trained, before there is a run folder."""
        raise NotImplementedError

    def __init__(self, run: Run, built: Any, restored: tuple[int, dict[str, Any]] | None) -> None:
        """Go on with ``run`` after ``restored``; ``built`` is what :meth:`build` gave."""
        self.run = run
        self.config: ExperimentConfig = run.config
        self.restored = restored
        self.interrupted = False
        self._spent_before = float(restored[1]["seconds"]) if restored else 0.0
        self._started = time.monotonic()
        self._logged_at = (self._started, restored[0] if restored else 0)
        run.rewind(restored[0] if restored else 0)

    def close(self) -> None:
        """Leave nothing undone that the end of the process would wait for."""

    @property
    def seconds(self) -> float:
        """Time spent on the run, earlier sessions included."""
        return self._spent_before + time.monotonic() - self._started

    def decisions(self, step: int) -> int:
        """Decisions made after ``step`` steps of all lanes."""
        return step * self.config.env.num_envs

    @contextmanager
    def progress(self, step: int) -> Iterator[Progress]:
        """The progress bar, with Ctrl-C and SIGTERM turned into a save at the next step."""
        asked = 0.0

        def ask_to_stop(*_: object) -> None:
            nonlocal asked
            # A launcher passes on what the terminal has already said to every rank.
            echo = self.ranks.several and time.monotonic() - asked < ECHO_SECONDS
            if self.interrupted and not echo:
                raise KeyboardInterrupt
            if not self.interrupted:
                asked = time.monotonic()
            self.interrupted = True

        before = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        total = self.decisions(self.config.total_steps)
        try:
            with Progress(
                total, description=self.run.agent, initial=self.decisions(step)
            ) as progress:
                yield progress
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked_to_stop(self) -> bool:
        """Whether the user asked any rank to stop; asked of all ranks at the same step."""
        return self.ranks.any(self.interrupted)

    @staticmethod
    def due(step: int, advance: int, every: int) -> bool:
        """Whether a multiple of ``every`` lies in (step - advance, step]."""
        return step // every > (step - advance) // every

    def speed(self, step: int) -> dict[str, float]:
        """Decisions per second since the last call, under their tag."""
        now = time.monotonic()
        seconds, steps = now - self._logged_at[0], step - self._logged_at[1]
        self._logged_at = (now, step)
        return {"charts/decisions_per_second": self.decisions(steps) / max(seconds, 1e-9)}

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint; ends the session where the user asked for it.

        Args:
            step: Steps done.
            state: The same on all ranks; rank 0 writes it.

        Raises:
            Interrupted: After saving, when Ctrl-C or SIGTERM had arrived.
        """
        self.ranks.on_main(
            lambda: self.run.save_checkpoint(step, state | {"seconds": self.seconds})
        )
        if self.asked_to_stop() and step < self.config.total_steps:
            raise Interrupted


class Session(BaseSession):
    """What an agent's training loop needs around it.

    Attributes:
        env: The vector environment that trains.
    """

    @staticmethod
    def build(
        config: ExperimentConfig, settings: Mapping[str, str], ranks: Ranks = ALONE
    ) -> RepFusionVectorEnv:
        """The environment, with this rank's share of the lanes."""
        return RepFusionVectorEnv(config=own_device(config, ranks), ranks=ranks)

    def __init__(
        self, run: Run, built: RepFusionVectorEnv, restored: tuple[int, dict[str, Any]] | None
    ) -> None:
        """See :class:`BaseSession`."""
        super().__init__(run, built, restored)
        self.env = built
        self.ranks = built.ranks

    def close(self) -> None:
        """See :class:`BaseSession`: images of steps that will not come."""
        self.env.trainer.parts.train.close()

    def log(self, step: int, progress: Progress, extra: dict[str, float]) -> None:
        """Read the device's metrics and write one row under the tags all agents share."""
        metrics = self.env.drain_metrics() | extra
        metrics |= self.speed(step)
        counts = metrics.get("timestep/counts")
        histograms = {}
        if counts:
            histograms["timestep/histogram"] = np.repeat(self.env.grid.timesteps, counts)
        layers = metrics.get("layer/counts")
        if layers:
            histograms["layer/histogram"] = np.repeat(np.arange(len(layers)), layers)
        self.ranks.on_main(lambda: self.run.log(step, self.decisions(step), metrics, histograms))
        shown = {"reward": metrics["reward/mean"], "timestep": metrics["timestep/mean"]}
        chosen = metrics["timestep/entropy"] + metrics.get("layer/entropy", 0.0)
        shown["entropy"] = metrics.get("policy/entropy", chosen)
        progress.update(self.decisions(step), **shown)

    def evaluate(self, step: int, choose: Chooser) -> None:
        """Judge the policy on held-out images on the way and log the outcome."""

        def judge() -> None:
            found = evaluate(self.env, choose, self.config.evaluation.images)
            log_evaluation(self.run, self.env, step, self.decisions(step), found)

        self.ranks.on_main(judge)

    def finish(self, step: int, choose: Chooser, policy: nn.Module) -> None:
        """Evaluate, write weights, figure and summary, and print the table.

        The summary is written last: where there is one, the run is complete.
        """
        self.ranks.on_main(lambda: self._finish(step, choose, policy))

    def _finish(self, step: int, choose: Chooser, policy: nn.Module) -> None:
        seconds = self.seconds
        print("evaluating on held-out images ...", file=sys.stderr)
        found = evaluate(self.env, choose, self.config.evaluation.images)
        student, folder = self.env.trainer.evaluation_student, self.run.folder
        with writing(folder):
            save_weights(student, folder / "student.safetensors")
            save_weights(policy, folder / "policy.safetensors")
        report(self.run, self.env, found, decisions=self.decisions(step), seconds=seconds)


def run_session(
    command: Command,
    *,
    agent: str,
    train: Callable[[Any], None],
    kind: type[BaseSession] = Session,
    ranks: Ranks = ALONE,
) -> int:
    """Open or make the run folder, train in it, and turn what can happen into exit codes.

    Args:
        command: What was asked for.
        agent: Name of the agent; of a resumed run only the family before ``-`` must be the same.
        train: The agent's training loop, given a ``kind``.
        kind: What it needs around it.
        ranks: The processes that do it together; all of them call this.

    Raises:
        ValueError: Something does not fit, said before training begins.
    """
    if ranks.several:
        session = _open_shared(command, agent, kind, ranks)
    else:
        session = _open(command, agent, kind)
    if session is None:
        ranks.close()
        return 0
    with session.run as run, closing(session):
        resume = f"--resume {shlex.quote(str(run.folder))}"
        go_on = f"go on with: {_command(run.agent, ranks)} {resume}"
        try:
            train(session)
        except Interrupted:
            ranks.close()
            say(go_on)
            return INTERRUPTED
        except KeyboardInterrupt:
            say(f"stopped at once; the last checkpoint stands; {go_on}")
            return INTERRUPTED
        except (NonFiniteError, CheckpointError, RunError, OtherRankError, StreamError) as error:
            if isinstance(error, StreamError) and ranks.local_index:
                # The others read other images; all that they see is that this rank ends.
                print(f"rank {ranks.index}: error: {error}", file=sys.stderr, flush=True)
            say(f"error: {error}\n{go_on}")
            return FAILED
        ranks.close()
    return 0


def _open(command: Command, agent: str, kind: type[BaseSession]) -> BaseSession | None:
    """A new session or one that goes on; None where the run is complete."""
    if command.resume is None:
        assert command.config is not None
        # Everything is loaded and checked first: what is refused leaves no empty run folder.
        built = kind.build(command.config, command.settings)
        return kind(_created(command, agent), built, None)
    run, restored = _resumed(command.resume, agent)
    if run is None:
        return None
    try:
        return kind(run, kind.build(run.config, run.settings), restored)
    except BaseException:
        run.close()
        raise


def _open_shared(command: Command, agent: str, kind: Any, ranks: Ranks) -> BaseSession | None:
    """:func:`_open` on every rank: rank 0 has the run folder, and reads what all go on from."""
    if not ranks.main:
        Progress.silence()
    opened: list[Run] = []
    if command.resume is None:
        config, settings = command.config, command.settings
        assert config is not None
        built = build_alike(kind.build, config, settings, ranks)

        def create() -> Any:
            opened.append(_created(command, agent))
            return about(opened[0])

        facts = ranks.from_main(create)
        return kind(opened[0] if ranks.main else FollowingRun(*facts), built, None)
    folder = command.resume

    def resume() -> Any:
        run, last = _resumed(folder, agent)
        opened.extend([] if run is None else [run])
        return None if run is None else (about(run), last)

    found = ranks.from_main(resume)
    if found is None:
        return None
    facts, restored = found
    run = opened[0] if ranks.main else FollowingRun(*facts)
    try:
        return kind(run, build_alike(kind.build, run.config, run.settings, ranks), restored)
    except BaseException:
        run.close()
        raise


def _created(command: Command, agent: str) -> Run:
    assert command.config is not None
    return Run.create(command.config, agent=agent, label=command.label, settings=command.settings)


def _resumed(folder: Path, agent: str) -> tuple[Run | None, tuple[int, dict[str, Any]] | None]:
    """The run in ``folder`` and its last checkpoint; (None, None) where the run is complete."""
    run = Run.resume(folder)
    try:
        if run.agent.partition("-")[0] != agent.partition("-")[0]:
            raise ValueError(
                f"--resume: '{run.folder}' was trained by {run.agent}; "
                f"use {_command(run.agent)} to go on"
            )
        if run.summary_path.is_file():
            print(f"the run is complete; see {run.summary_path}", file=sys.stderr)
            run.close()
            return None, None
        return run, _last_checkpoint(run)
    except BaseException:
        run.close()
        raise


def _last_checkpoint(run: Run) -> tuple[int, dict[str, Any]] | None:
    with warnings.catch_warnings(record=True) as passed_over:
        warnings.simplefilter("always", CheckpointWarning)
        restored = run.load_checkpoint()
    for warning in passed_over:
        print(f"warning: {warning.message}", file=sys.stderr)
    if restored is None:
        print("no checkpoint yet: starting from the beginning", file=sys.stderr)
    return restored


def _command(agent: str, ranks: Ranks = ALONE) -> str:
    launcher = "python"
    if ranks.several:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count))
        machines = f" --nnodes {ranks.count // here} ..." if here < ranks.count else ""
        launcher = f"torchrun{machines} --nproc_per_node {here}"
    return f"{launcher} -m agents.{script_of(agent)}"
