"""What connects a Stable-Baselines3 training loop with a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from agents.evaluation import Chooser
from agents.session import Session
from repfusion_env.progress import Progress


class LatestValues(KVWriter):
    """Keeps the last value of each of SB3's own tags until a row of metrics takes them."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def write(
        self,
        key_values: dict[str, Any],
        key_excluded: dict[str, tuple[str, ...]],
        step: int = 0,
    ) -> None:
        """Called by SB3's logger at each dump."""
        for key, value in key_values.items():
            if "tensorboard" not in (key_excluded[key] or ()) and np.ndim(value) == 0:
                self.values[key] = float(value)

    def take(self) -> dict[str, float]:
        """The values since the last call."""
        values, self.values = self.values, {}
        return values

    def close(self) -> None:
        """Nothing is open."""


class SessionCallback(BaseCallback):
    """Logs, evaluates and saves at the session's pace.

    Checkpoints are written where a rollout starts: the policy has been updated, the rollout buffer
    is empty, and a new process can go on from there.

    Args:
        session: Whose run it is.
        progress: The bar to move.
        values: SB3's own figures.
        state: Gives what a checkpoint holds.
        greedy: The policy's deterministic choices.
        steps: Steps done by earlier sessions.
    """

    def __init__(
        self,
        session: Session,
        progress: Progress,
        values: LatestValues,
        state: Callable[[], dict[str, Any]],
        greedy: Chooser,
        steps: int,
    ) -> None:
        super().__init__()
        self.session, self.progress, self.values = session, progress, values
        self.state, self.greedy = state, greedy
        self.steps = self.saved_at = steps
        self.saves_at_rollouts = True

    def _on_step(self) -> bool:
        self.steps += 1
        config, session = self.session.config, self.session
        if session.due(self.steps, 1, config.run.log_every):
            session.log(self.steps, self.progress, self.values.take())
        if config.evaluation.every and session.due(self.steps, 1, config.evaluation.every):
            session.evaluate(self.steps, self.greedy)
        return True

    def _on_rollout_start(self) -> None:
        if self.saves_at_rollouts:
            self.save_if_due()

    def _on_training_end(self) -> None:
        if self.steps % self.session.config.run.log_every:
            self.session.log(self.steps, self.progress, self.values.take())

    def save_if_due(self) -> None:
        """Save where a checkpoint's time has come or the user asked to stop."""
        every = self.session.config.run.checkpoint_every
        if self.session.interrupted or self.steps - self.saved_at >= every:
            self.session.save(self.steps, self.state())
            self.saved_at = self.steps
