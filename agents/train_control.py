"""A student without a teacher, as a control of those that are distilled.

    python agents/train_control.py --method simclr                # views of the images alone
    python agents/train_control.py --method supervised            # labels alone
    python agents/train_control.py --method supervised --labels 10%
    python agents/train_control.py --resume runs/NAME             # after Ctrl-C or a kill

The same configuration as of the agents: the same backbone, images, order, optimizer and number of
image presentations (``run.decisions``). The teacher's weights are never loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agents.command_line import guarded, parse
from agents.control_options import OPTIONS, conflicts
from repfusion_env.config_loading import ConfigError

if TYPE_CHECKING:
    from agents.control_session import ControlSession

PROG = "train_control"
DESCRIPTION = (
    "Train a student without a teacher, as a control: by the views of its images (simclr) or by "
    "labels (supervised), with as many image presentations as the configuration has decisions."
)
# Of the configuration, what a control has no use for.
HIDDEN = (
    "teacher",
    "timesteps",
    "distillation",
    "fusion",
    "reward",
    "observation",
    "reinforce",
    "sb3",
    "bandit",
)


def train(session: ControlSession) -> None:
    """Train from where the session stands to the end of its image presentations."""
    trainer, config = session.trainer, session.config
    with session.progress(trainer.steps) as progress:
        while trainer.steps < config.total_steps:
            trainer.step()
            step, last = trainer.steps, trainer.steps >= config.total_steps
            if session.due(step, 1, config.run.log_every) or last:
                session.log(step, progress)
            if config.evaluation.every and session.due(step, 1, config.evaluation.every):
                session.evaluate(step)
            if session.due(step, 1, config.run.checkpoint_every) or session.interrupted or last:
                session.save(step, {"trainer": trainer.state_dict()})
    session.finish(trainer.steps)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def run() -> int:
        command = parse(argv, prog=PROG, description=DESCRIPTION, hidden=HIDDEN, own=OPTIONS)
        if command.config is not None:
            problems = conflicts(command.config, command.settings)
            if problems:
                raise ConfigError(problems)
        from agents.control_session import ControlSession
        from agents.session import run_session

        agent = "-".join(["control", command.settings.get("method", "")])
        return run_session(command, agent=agent, train=train, kind=ControlSession)

    return guarded(run, PROG)


if __name__ == "__main__":
    sys.exit(main())
