"""What a configuration must be for several ranks; each rule is one sentence. Imports nothing heavy.

Shape letters: W ranks.
"""

from __future__ import annotations

from repfusion_env.config import ExperimentConfig


def conflicts(config: ExperimentConfig, ranks: int) -> list[str]:
    """One sentence for each value that cannot be shared by so many ranks, by its dotted path.

    Args:
        config: The experiment; its lanes and its batch are those of all ranks together.
        ranks: W; for 1 nothing is wrong.
    """
    if ranks == 1:
        return []
    found = []
    lanes, group, batch = config.env.num_envs, config.env.group_size, config.optimizer.batch_size
    if lanes % (ranks * group):
        together = f" in groups of {group}" if group > 1 else ""
        found.append(
            f"env.num_envs: {lanes} lanes{together} cannot be shared by {ranks} ranks; it must be "
            f"a multiple of {ranks * group}, such as {_nearest(lanes, ranks * group)}"
        )
    if batch > lanes and batch % lanes:
        found.append(
            f"optimizer.batch_size: {batch} given; under {ranks} ranks it must be at most "
            f"env.num_envs ({lanes}) or a multiple of it, such as {_nearest(batch, lanes)}"
        )
    return found


def device_conflicts(config: ExperimentConfig, ranks: int) -> list[str]:
    """The sentence about one GPU given for all ranks, before each gets its own."""
    if ranks == 1 or ":" not in config.device:
        return []
    return [
        f"device: '{config.device}' names one GPU, but {ranks} ranks need one each; give auto, "
        "cuda or cpu"
    ]


def _nearest(value: int, step: int) -> int:
    """The multiple of ``step`` nearest to ``value``, at least one."""
    return max(1, round(value / step)) * step
