"""What training never changes: image banks, teacher, timestep grid, feature statistics.

Shape letters: K grid length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from repfusion_env.config import ExperimentConfig
from repfusion_env.data import load_data
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.pseudo_labels import cluster_labels
from repfusion_env.devices import resolve_device
from repfusion_env.features import TeacherFeatures
from repfusion_env.tasks.build import check_task
from repfusion_env.teachers import check_fit, describe_teacher, load_teacher
from repfusion_env.teachers.base import Teacher
from repfusion_env.timesteps import TimestepGrid


@dataclass(frozen=True)
class FrozenParts:
    """Everything that training reads and never writes; shared by environments on one trainer.

    Attributes:
        device: Where all of it is.
        train: Images with the labels that the task is about: given ones or clusters.
        heldout: The same of the held-out images.
        teacher: The frozen model.
        grid: The timesteps that actions choose from.
        features: The teacher's standardised features.
        sources: Observations by their settings.
    """

    device: torch.device
    train: ImageBank
    heldout: ImageBank
    teacher: Teacher
    grid: TimestepGrid
    features: TeacherFeatures
    sources: dict[Any, Any] = field(default_factory=dict)

    def valid_actions(self, min_snr: float) -> Tensor:
        """(K,) bool: timesteps whose signal-to-noise ratio is at least ``min_snr``."""
        valid = self.teacher.snr(self.grid.tensor) >= min_snr
        if not bool(valid.any()):
            largest = float(self.teacher.snr(self.grid.tensor).max())
            raise ValueError(
                f"timesteps.min_snr: {min_snr} closes every timestep of the grid; the largest "
                f"signal-to-noise ratio on it is {largest:.3g}"
            )
        return valid


def build_frozen_parts(config: ExperimentConfig) -> FrozenParts:
    """Load banks and teacher, check that they fit, and measure the feature statistics.

    Raises:
        ValueError: With one sentence each for whatever does not fit.
    """
    device = resolve_device(config.device)
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            "a CUDA trainer cannot be built in a forked process; use lanes (num_envs) instead of "
            "worker processes, or the 'spawn' start method"
        )
    card = describe_teacher(config.teacher)
    train, heldout = load_data(config.data)
    check_task(config, train, heldout)
    check_fit(card, config, train.shape)
    train, heldout = train.to(device), heldout.to(device)
    teacher = load_teacher(config.teacher, device=device)
    if config.data.labels == "clusters":
        train, heldout = cluster_labels(config, teacher, train, heldout)
    grid = TimestepGrid(config.timesteps.grid(), device)
    features = TeacherFeatures(teacher, config, grid, train)
    return FrozenParts(device, train, heldout, teacher, grid, features)
