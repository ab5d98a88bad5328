"""Judging a policy on held-out images, beside random and every fixed action.

Shape letters: M held-out images, A arms (fixed actions), K grid length, k timesteps of a set,
D embedding, S student width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from repfusion_env.actions import arm_actions, build_actions
from repfusion_env.actions.choice import Choice
from repfusion_env.data.bank import ImageBank
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.features import chunks
from repfusion_env.noise import derive_seed
from repfusion_env.progress import watched
from repfusion_env.trainer import DistillationTrainer

Chooser = Callable[[Tensor], Tensor]
# Of random actions per image, where the arms are not all there is.
DRAWS = 8


@dataclass(frozen=True)
class Evaluation:
    """Rewards of all (held-out image, arm) pairs, and of a policy's choices.

    Attributes:
        rewards: (M, A) float64, with the same noise for every policy.
        learned_rewards: (M,) of the policy's deterministic choices.
        random_rewards: Of uniformly random open actions: (M, 8) seeded draws for each image; or,
            where the arms are all that can be chosen, the open columns of ``rewards``.
        arms: What the A arms are called.
        valid: (A,) bool, the arms that action masks leave open.
        timesteps: (M, k) the timesteps that the policy chose.
        layers: (M,) the teacher's layer that it chose; None where it chooses none.
        layer_names: The teacher's layers.
        chosen: (A,) how often the policy chose each arm; of a set the timestep of the arm, each
            counted; None where its choices are none of the arms.
        kind: The reward's name. A reward that looks back on an update has nothing to measure where
            nothing is trained; ``student_lookahead`` judges in its place.
        noun: What the arms are.
        pairs: Where the arms are all pairs of several timesteps and the layers, one timestep's
            layers after the other's: these timesteps; else empty.
        metrics: What the task's metric says of the student on all held-out images, by name.
    """

    rewards: np.ndarray
    learned_rewards: np.ndarray
    random_rewards: np.ndarray
    arms: tuple[str, ...]
    valid: np.ndarray
    timesteps: np.ndarray
    layers: np.ndarray | None
    layer_names: tuple[str, ...]
    chosen: np.ndarray | None
    kind: str
    noun: str
    pairs: tuple[int, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def learned(self) -> float:
        """Mean reward of the policy's choices."""
        return float(self.learned_rewards.mean())

    @property
    def random(self) -> float:
        """Mean reward of uniformly random open actions."""
        return float(self.random_rewards.mean())

    @property
    def by_arm(self) -> np.ndarray:
        """Mean reward of each arm, (A,)."""
        return self.rewards.mean(axis=0)

    @property
    def best_per_image(self) -> float:
        """Mean of each image's best open arm.

        No policy can exceed it where the arms are all that can be chosen; of sets and of timesteps
        between the grid's they are a part.
        """
        return float(self.rewards[:, self.valid].max(axis=1).mean())


def judge_choice(
    trainer: DistillationTrainer, bank: ImageBank, ids: Tensor, choice: Choice
) -> np.ndarray:
    """Rewards (M,) float64 of images ``ids`` (M,) under their choices, without training."""
    rewards = []
    for part in chunks(torch.arange(len(ids), device=ids.device)):
        layers = None if choice.layers is None else choice.layers[part]
        chosen = Choice(choice.timesteps[part], choice.indices[part], layers)
        visits = torch.zeros_like(part)
        rewards.append(trainer.judge(bank, ids[part], chosen, visits).reward)
    return torch.cat(rewards).double().cpu().numpy()


def reward_table(trainer: DistillationTrainer, bank: ImageBank, images: int) -> np.ndarray:
    """Reward of every (image, arm) pair without training, (images, A) float64."""
    parts = trainer.parts
    actions = build_actions(trainer.config, parts.grid, tuple(parts.teacher.layers))
    ids = torch.arange(images, device=trainer.device)
    columns = []
    arms = arm_actions(actions, trainer.device)
    passes = watched(
        [ids] * len(arms), images * len(arms), description="evaluate", unit="decisions"
    )
    for arm, _ in zip(arms, passes, strict=True):
        choice = actions.choice(arm.expand(images, *arm.shape))
        columns.append(judge_choice(trainer, bank, ids, choice))
    return np.stack(columns, axis=1)


def random_actions(env: RepFusionVectorEnv, count: int, generator: torch.Generator) -> Tensor:
    """Uniformly random open actions, (count, ...), drawn with ``generator``."""
    space = env.single_action_space
    if isinstance(space, spaces.Box):
        low, high = (torch.from_numpy(bound).to(env.device) for bound in (space.low, space.high))
        unit = torch.rand((count, *space.shape), generator=generator, device=env.device)
        return low + (high - low) * unit
    assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    sizes = [int(space.n)] if isinstance(space, spaces.Discrete) else space.nvec.tolist()
    columns = []
    for mask in np.split(env.action_masks()[0], np.cumsum(sizes)[:-1]):
        allowed = torch.from_numpy(np.flatnonzero(mask)).to(env.device)
        drawn = torch.randint(len(allowed), (count,), generator=generator, device=env.device)
        columns.append(allowed[drawn])
    actions = torch.stack(columns, dim=1) + torch.from_numpy(np.array(space.start)).to(env.device)
    return actions[:, 0] if isinstance(space, spaces.Discrete) else actions


def evaluate(env: RepFusionVectorEnv, choose: Chooser, limit: int | None = None) -> Evaluation:
    """Judge a policy on held-out images.

    Random is the mean of the open arms where these are all that can be chosen. Elsewhere it is
    estimated by 8 actions for each image, drawn with a generator that depends on the
    configuration's seed alone, so that every policy and every repetition meets the same draws.

    Args:
        env: Its trainer's student is judged as it stands; nothing is trained.
        choose: From observations (M, D) to actions (M, ...) of the environment.
        limit: Judge the policy on the first so many held-out images only.
    """
    trainer, bank = env.trainer, env.trainer.parts.heldout
    images = min(limit or len(bank), len(bank))
    ids = torch.arange(images, device=env.device)
    given = torch.cat([choose(env.observer(bank, part)) for part in chunks(ids)]).to(env.device)
    choice = env.actions.choice(given)
    arms = env.actions.choice(arm_actions(env.actions, env.device))
    rewards = reward_table(trainer, bank, images)
    valid = env.valid_timesteps[arms.indices.cpu().numpy()].all(axis=1)
    which = _arms_of(choice, arms)
    if env.actions.exhaustive and which is not None:
        learned, random = rewards[np.arange(images), which], rewards[:, valid]
    else:
        learned = judge_choice(trainer, bank, ids, choice)
        random = _judge_random(env, bank, ids)
    return Evaluation(
        rewards=rewards,
        learned_rewards=learned,
        random_rewards=random,
        arms=tuple(arm.label for arm in env.actions.arms),
        valid=valid,
        timesteps=choice.timesteps.cpu().numpy(),
        layers=None if choice.layers is None else choice.layers.cpu().numpy(),
        layer_names=tuple(trainer.parts.teacher.layers),
        chosen=_counts(choice, arms, which),
        kind=trainer.heldout_reward,
        noun=env.actions.noun,
        pairs=_pairs(arms, len(trainer.parts.teacher.layers)),
        metrics=trainer.heldout_metrics(),
    )


def _judge_random(env: RepFusionVectorEnv, bank: ImageBank, ids: Tensor) -> np.ndarray:
    """Rewards of random actions, (M, DRAWS)."""
    seed = derive_seed(env.config.seed, "random actions")
    generator = torch.Generator(env.device).manual_seed(seed)
    columns = [
        judge_choice(
            env.trainer,
            bank,
            ids,
            env.actions.choice(random_actions(env, len(ids), generator)),
        )
        for _ in range(DRAWS)
    ]
    return np.stack(columns, axis=1)


def _keys(choice: Choice) -> list[tuple[int, ...]]:
    """What tells choices apart: a set's timesteps in their order, then the layer."""
    columns = [choice.timesteps] + ([] if choice.layers is None else [choice.layers[:, None]])
    return [tuple(row) for row in torch.cat(columns, dim=1).tolist()]


def _arms_of(choice: Choice, arms: Choice) -> np.ndarray | None:
    """Which arm each of M choices is, (M,); None where some are none of them."""
    places = {key: index for index, key in enumerate(_keys(arms))}
    found = [places.get(key, -1) for key in _keys(choice)]
    return None if -1 in found else np.array(found)


def _pairs(arms: Choice, layers: int) -> tuple[int, ...]:
    """See :attr:`Evaluation.pairs`."""
    rows = tuple(dict.fromkeys(arms.timesteps[:, 0].tolist()))
    expected = [(timestep, layer) for timestep in rows for layer in range(layers)]
    whole = arms.layers is not None and len(rows) > 1 and _keys(arms) == expected
    return rows if whole else ()


def _counts(choice: Choice, arms: Choice, which: np.ndarray | None) -> np.ndarray | None:
    """How often each arm was chosen, (A,)."""
    count = len(arms.indices)
    if which is not None:
        return np.bincount(which, minlength=count) * choice.indices.shape[1]
    # Arms of one timestep each, as those of sets and of the whole range, count for their own.
    entries = arms.indices.cpu().numpy()
    if choice.layers is not None or (entries != entries[:, :1]).any():
        return None
    chosen = np.bincount(choice.indices.cpu().numpy().ravel(), minlength=entries.max() + 1)
    return chosen[entries[:, 0]] if len(set(entries[:, 0])) == count else None


class Banks(Protocol):
    """Images that a student learned from, and others."""

    @property
    def train(self) -> ImageBank: ...

    @property
    def heldout(self) -> ImageBank: ...


class Embedder(Protocol):
    """Whatever trains a student, with a teacher or without one."""

    @property
    def device(self) -> torch.device: ...

    @property
    def parts(self) -> Banks: ...

    @property
    def evaluation_student(self) -> Any: ...

    def embed(self, images: Tensor, student: Any = None) -> tuple[Tensor, Tensor]: ...


class Predictor(Embedder, Protocol):
    """Whatever trains a student with a head."""

    def outputs(self, images: Tensor, student: Any = None) -> Any: ...


def linear_probe_accuracy(trainer: Embedder, train_images: int) -> float:
    """Held-out accuracy of a logistic regression on the student's frozen features.

    Features (M, S) are pooled and standardised; L2-regularised with scikit-learn's default C = 1.
    Labels are the given ones, also where the student learned from clusters (``data.labels``); of
    images that came without labels they are the clusters. Where all training images have one
    class, it is the answer for every held-out one.

    Args:
        trainer: Whose student is probed (the averaged one where there is one).
        train_images: Use at most so many training images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, heldout = trainer.parts.train.judged, trainer.parts.heldout.judged
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    features, labels = _features(trainer, train, min(train_images, len(train)))
    if (labels == labels[0]).all():
        return float((heldout.labels == int(labels[0])).float().mean())
    probe.fit(features, labels)
    return float(probe.score(*_features(trainer, heldout, len(heldout))))


def _features(trainer: Embedder, bank: ImageBank, images: int) -> tuple[np.ndarray, np.ndarray]:
    ids = torch.arange(images, device=trainer.device)
    pooled = [
        trainer.embed(bank.pixels(part), trainer.evaluation_student)[1]
        for part in bank.announced(chunks(ids))
    ]
    return torch.cat(pooled).cpu().numpy(), bank.labels[:images].cpu().numpy()
