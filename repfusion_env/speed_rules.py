"""What can be said about speed from the configuration alone, before torch loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repfusion_env.config import ExperimentConfig


def conflicts(config: ExperimentConfig) -> list[str]:
    """One sentence for each combination that cannot be, headed by its dotted path."""
    speed, found = config.speed, []
    if speed.cuda_graphs and speed.compile == "off":
        found.append(
            "speed.cuda_graphs: what is compiled is replayed, but speed.compile is off; give "
            "speed.compile on or auto"
        )
    if speed.cuda_graphs and config.device == "cpu":
        found.append("speed.cuda_graphs: the CPU has none; leave it off, or give device cuda")
    if speed.compile == "on" and config.teacher.offload == "cpu":
        found.append(
            "speed.compile: weights that visit the device layer by layer cannot be compiled; give "
            "teacher.offload none, or speed.compile auto, which leaves that teacher as it is"
        )
    if config.reward.student == "training" and config.reward.kind != "student_lookahead":
        found.append(
            f"reward.student: 'training' is a start for reward.kind student_lookahead alone; "
            f"'{config.reward.kind}' is given"
        )
    return found
