"""Judging a policy on held-out images, beside random and every fixed timestep.

Shape letters: M held-out images, K grid length, D embedding, S student width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repfusion_env.data.bank import ImageBank
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.features import chunks
from repfusion_env.trainer import DistillationTrainer

Chooser = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Rewards of all (held-out image, timestep) pairs, and what a policy makes of them.

    Attributes:
        rewards: (M, K) float64, with the same noise for every policy.
        actions: (M,) the policy's deterministic choices.
        grid: The K timesteps.
        kind: The reward's name. A reward that looks back on an update has nothing to measure where
            nothing is trained; ``student_lookahead`` judges in its place.
        valid: (K,) bool, the timesteps that action masks leave open.
    """

    rewards: np.ndarray
    actions: np.ndarray
    grid: tuple[int, ...]
    kind: str
    valid: np.ndarray

    @property
    def learned(self) -> float:
        """Mean reward of the policy's choices."""
        return float(self.rewards[np.arange(len(self.actions)), self.actions].mean())

    @property
    def random(self) -> float:
        """Mean reward of uniformly random choices among the open timesteps, exactly."""
        return float(self.rewards[:, self.valid].mean())

    @property
    def by_timestep(self) -> np.ndarray:
        """Mean reward of each fixed timestep, (K,)."""
        return self.rewards.mean(axis=0)

    @property
    def best_per_image(self) -> float:
        """Mean of each image's best reward: what no policy can exceed."""
        return float(self.rewards[:, self.valid].max(axis=1).mean())

    @property
    def counts(self) -> np.ndarray:
        """How often the policy chose each timestep, (K,)."""
        return np.bincount(self.actions, minlength=len(self.grid))


def reward_table(trainer: DistillationTrainer, bank: ImageBank, images: int) -> np.ndarray:
    """Reward of every (image, timestep) pair without training, (images, K) float64."""
    ids = torch.arange(images, device=trainer.device)
    columns = []
    for timestep in trainer.parts.grid.timesteps:
        rewards = [
            trainer.judge(
                bank, part, torch.full_like(part, timestep), torch.zeros_like(part)
            ).reward
            for part in chunks(ids)
        ]
        columns.append(torch.cat(rewards))
    return torch.stack(columns, dim=1).double().cpu().numpy()


def evaluate(env: RepFusionVectorEnv, choose: Chooser, limit: int | None = None) -> Evaluation:
    """Judge a policy on held-out images.

    Args:
        env: Its trainer's student is judged as it stands; nothing is trained.
        choose: From observations (M, D) to grid indices (M,).
        limit: Use only the first so many held-out images.
    """
    bank = env.trainer.parts.heldout
    images = min(limit or len(bank), len(bank))
    ids = torch.arange(images, device=env.device)
    actions = torch.cat([choose(env.observer(bank, part)) for part in chunks(ids)])
    rewards = reward_table(env.trainer, bank, images)
    return Evaluation(
        rewards,
        actions.cpu().numpy(),
        env.grid.timesteps,
        env.trainer.heldout_reward,
        env.action_masks()[0],
    )


def linear_probe_accuracy(trainer: DistillationTrainer, train_images: int) -> float:
    """Held-out accuracy of a logistic regression on the student's frozen features.

    Features (M, S) are pooled and standardised; L2-regularised with scikit-learn's default C = 1.

    Args:
        trainer: Whose student is probed (the averaged one where there is one).
        train_images: Use at most so many training images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, heldout = trainer.parts.train, trainer.parts.heldout
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(*_features(trainer, train, min(train_images, len(train))))
    return float(probe.score(*_features(trainer, heldout, len(heldout))))


def _features(
    trainer: DistillationTrainer, bank: ImageBank, images: int
) -> tuple[np.ndarray, np.ndarray]:
    ids = torch.arange(images, device=trainer.device)
    pooled = [
        trainer.embed(bank.pixels(part), trainer.evaluation_student)[1] for part in chunks(ids)
    ]
    return torch.cat(pooled).cpu().numpy(), bank.labels[:images].cpu().numpy()
