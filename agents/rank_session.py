"""What the ranks of one session need beside rank 0's run folder."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import ConfigError
from repfusion_env.data import load_data
from repfusion_env.rank_rules import device_conflicts
from repfusion_env.ranks import Ranks
from repfusion_env.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from repfusion_env.envs import RepFusionVectorEnv


class FollowingRun(Run):
    """The run as ranks other than 0 see it: known, but written by rank 0 alone.

    Args:
        folder: On rank 0's machine.
        config: The resolved configuration.
        agent: Name of the agent.
        settings: The agent's own options.
    """

    def __init__(
        self, folder: Path, config: ExperimentConfig, agent: str, settings: Mapping[str, str]
    ) -> None:
        self.folder, self.config, self.agent = folder, config, agent
        self.settings = dict(settings)

    def log(
        self,
        step: int,
        decisions: int,
        scalars: Mapping[str, float | Sequence[float]],
        histograms: Mapping[str, np.ndarray | Tensor] | None = None,
        figures: Mapping[str, Figure] | None = None,
    ) -> None:
        """Left to rank 0."""

    def rewind(self, step: int) -> None:
        """Left to rank 0."""

    def close(self) -> None:
        """There is nothing open."""


def about(run: Run) -> tuple[Path, ExperimentConfig, str, dict[str, str]]:
    """What :class:`FollowingRun` takes."""
    return run.folder, run.config, run.agent, run.settings


def own_device(config: ExperimentConfig, ranks: Ranks) -> ExperimentConfig:
    """The configuration with this rank's GPU, where the run is on GPUs.

    Raises:
        ConfigError: One GPU is named for all, or there are fewer than ranks.
    """
    if not ranks.several:
        return config
    if problems := device_conflicts(config, ranks.count):
        raise ConfigError(problems)
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return replace(config, device="cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if ranks.local_index >= count:
        raise ConfigError(
            [
                f"device: '{config.device}' given, but this machine has {count} usable CUDA "
                f"devices for {ranks.local_index + 1} or more ranks; start as many ranks as "
                "devices, or give cpu"
            ]
        )
    return replace(config, device=f"cuda:{ranks.local_index}")


def build_alike(
    build: Callable[..., RepFusionVectorEnv],
    config: ExperimentConfig,
    settings: Mapping[str, str],
    ranks: Ranks,
) -> RepFusionVectorEnv:
    """Build the environment on every rank, and see that all of them train the same.

    Args:
        build: Of the session's kind.
        config: The run's configuration.
        settings: The agent's own options.
        ranks: Whose lanes it has a share of.

    Raises:
        OtherRankError: It failed on another rank.
        ValueError: It failed here, or the ranks differ in their images or their student.
    """
    if config.data.download:
        # Two processes would write the same files.
        first = ranks.local_index == 0
        ranks.everywhere(lambda: load_data(config.data) if first else None)
    env = ranks.everywhere(lambda: build(config, settings, ranks))
    trainer = env.trainer
    marks = [
        len(trainer.parts.train),
        _checksum([trainer.parts.train.labels]),
        _checksum(trainer.student.state_dict().values()),
    ]
    mine = torch.tensor([marks], device=env.device)
    for index, other in enumerate(ranks.all(mine).tolist()):
        for mark, expected, what in zip(
            other, marks, ("number of images", "labels", "first student"), strict=True
        ):
            if mark != expected:
                raise ValueError(
                    f"the {what} of rank {index} is not that of rank {ranks.index}; give all "
                    "ranks the same data, configuration and versions of the libraries"
                )
    return env


def _checksum(tensors: Any) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), total)
    return total
