"""One training session: run folder, environment, logging, checkpoints, interruption, summary.

Every agent trains inside a session, so that all of them leave the same things behind.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from agents.command_line import INTERRUPTED, Command
from agents.evaluation import Chooser, evaluate
from agents.reporting import report
from repfusion_env.checkpoint import CheckpointError
from repfusion_env.config import ExperimentConfig
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.progress import Progress
from repfusion_env.runs import Run, RunError
from repfusion_env.trainer import NonFiniteError
from repfusion_env.weights import save_weights

FAILED = 1


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived, and everything has been saved."""


class Session:
    """What an agent's training loop needs around it.

    Attributes:
        run: The run folder.
        config: The run's configuration.
        env: The vector environment that trains.
        restored: (step, state) of the checkpoint to go on from, or None.
        interrupted: Whether the user asked to stop; the next save ends the session.
    """

    def __init__(
        self, run: Run, env: RepFusionVectorEnv, restored: tuple[int, dict[str, Any]] | None
    ) -> None:
        self.run = run
        self.config: ExperimentConfig = run.config
        self.env = env
        self.restored = restored
        self.interrupted = False
        self._spent_before = float(restored[1]["seconds"]) if restored else 0.0
        self._started = time.monotonic()
        self._logged_at = (self._started, restored[0] if restored else 0)
        if restored is not None:
            run.rewind(restored[0])

    @property
    def seconds(self) -> float:
        """Time spent on the run, earlier sessions included."""
        return self._spent_before + time.monotonic() - self._started

    def decisions(self, step: int) -> int:
        """Decisions made after ``step`` steps of all lanes."""
        return step * self.env.num_envs

    @contextmanager
    def progress(self, step: int) -> Iterator[Progress]:
        """The progress bar, with Ctrl-C and SIGTERM turned into a save at the next step."""

        def ask_to_stop(*_: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
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

    @staticmethod
    def due(step: int, advance: int, every: int) -> bool:
        """Whether a multiple of ``every`` lies in (step - advance, step]."""
        return step // every > (step - advance) // every

    def log(self, step: int, progress: Progress, extra: dict[str, float]) -> None:
        """Read the device's metrics and write one row under the tags all agents share."""
        metrics = self.env.drain_metrics() | extra
        now = time.monotonic()
        seconds, steps = now - self._logged_at[0], step - self._logged_at[1]
        self._logged_at = (now, step)
        metrics["charts/decisions_per_second"] = self.decisions(steps) / max(seconds, 1e-9)
        counts = metrics.get("timestep/counts")
        histograms = {}
        if counts:
            histograms["timestep/histogram"] = np.repeat(self.env.grid.timesteps, counts)
        self.run.log(step, self.decisions(step), metrics, histograms)
        shown = {"reward": metrics["reward/mean"], "timestep": metrics["timestep/mean"]}
        shown["entropy"] = metrics.get("policy/entropy", metrics["timestep/entropy"])
        progress.update(self.decisions(step), **shown)

    def evaluate(self, step: int, choose: Chooser) -> None:
        """Judge the policy on held-out images on the way and log the outcome."""
        from repfusion_env.figures import reward_by_timestep_figure

        found = evaluate(self.env, choose, self.config.evaluation.images)
        self.run.log(
            step,
            self.decisions(step),
            {"evaluation/learned_reward": found.learned, "evaluation/random_reward": found.random},
            figures={
                "evaluation/reward_by_timestep": reward_by_timestep_figure(
                    found.grid, found.by_timestep, found.counts
                )
            },
        )

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint; ends the session where the user asked for it.

        Raises:
            Interrupted: After saving, when Ctrl-C or SIGTERM had arrived.
        """
        self.run.save_checkpoint(step, state | {"seconds": self.seconds})
        if self.interrupted and step < self.config.total_steps:
            raise Interrupted

    def finish(self, step: int, choose: Chooser, policy: nn.Module) -> None:
        """Evaluate, write weights, summary and figure, and print the table."""
        seconds = self.seconds
        print("evaluating on held-out images ...", file=sys.stderr)
        found = evaluate(self.env, choose, self.config.evaluation.images)
        save_weights(self.env.trainer.evaluation_student, self.run.folder / "student.safetensors")
        save_weights(policy, self.run.folder / "policy.safetensors")
        report(self.run, self.env, found, decisions=self.decisions(step), seconds=seconds)


def run_session(command: Command, *, agent: str, train: Callable[[Session], None]) -> int:
    """Open or make the run folder, train in it, and turn what can happen into exit codes."""
    run: Run | None = None
    restored: tuple[int, dict[str, Any]] | None = None
    if command.resume is not None:
        run = Run.resume(command.resume)
        family = run.agent.partition("-")[0]
        if family != agent.partition("-")[0]:
            run.close()
            script = "train_reinforce" if family == "reinforce" else "train_sb3"
            raise ValueError(
                f"--resume: '{command.resume}' was trained by {run.agent}; use {script} to go on"
            )
        restored = run.load_checkpoint()
        if restored is None:
            print("no checkpoint yet: starting from the beginning", file=sys.stderr)
            run.rewind(0)
        config = run.config
    else:
        assert command.config is not None
        config = command.config
    try:
        # Everything is loaded and checked first: what is refused leaves no empty run folder.
        env = RepFusionVectorEnv(config=config)
        if run is None:
            run = Run.create(config, agent=agent, label=command.label)
        train(Session(run, env, restored))
    except Interrupted:
        print(_how_to_resume(run, agent), file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint stands", file=sys.stderr)
        print(_how_to_resume(run, agent), file=sys.stderr)
        return INTERRUPTED
    except (NonFiniteError, CheckpointError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        print(_how_to_resume(run, agent), file=sys.stderr)
        return FAILED
    finally:
        if run is not None:
            run.close()
    return 0


def _how_to_resume(run: Run | None, agent: str) -> str:
    script = "train_reinforce" if agent == "reinforce" else "train_sb3"
    if run is None:
        return "nothing was started yet"
    return f"go on with: python -m agents.{script} --resume {shlex.quote(str(run.folder))}"
