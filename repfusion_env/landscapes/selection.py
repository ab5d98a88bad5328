"""Whether choosing a timestep for each image can pay: spread of rewards, and oracle gaps.

Shape letters: D noise draws, T timesteps, M training images, M' held-out images, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from repfusion_env.landscapes.predictors import Predictor, choose_predictor

BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Gap:
    """A gain over the best fixed timestep, with its 95 % bootstrap interval over images."""

    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """Variance components of the reward of a (image, timestep, noise draw).

    Two-way random effects with replication by the method of moments: ``reward = mean + timestep +
    image + image x timestep + noise``; variances, in squared units of the reward.

    Attributes:
        timestep: Between timesteps, the same for all images: what a fixed choice can use.
        image: Between images, the same at all timesteps: difficulty, which no choice changes.
        interaction: What is left of a timestep's effect on one image: what a choice per image could
            use if it were known.
        noise: Between noise draws of one image at one timestep; 0 where there is one draw only, and
            then it is part of ``interaction``.
    """

    timestep: float
    image: float
    interaction: float
    noise: float

    @property
    def decision_snr(self) -> float:
        """Signal-to-noise of one decision's reward about which timestep is best on average."""
        return _ratio(self.timestep, self.image + self.interaction + self.noise)

    @property
    def sample_snr(self) -> float:
        """Signal-to-noise of one decision's reward about which timestep suits this image."""
        return _ratio(self.interaction, self.image + self.noise)

    @property
    def sample_snr_with_baseline(self) -> float:
        """The same where a perfect baseline takes each image's difficulty away."""
        return _ratio(self.interaction, self.noise)


@dataclass(frozen=True)
class Selection:
    """What choosing the timestep is worth, on the held-out images.

    Attributes:
        best_fixed: The timestep with the highest mean reward on the training images.
        fixed_reward: Its mean reward on the held-out images.
        random_reward: Of uniformly random timesteps.
        naive: The mean of each image's highest reward of one draw, above ``fixed_reward``; inflated
            by the noise, for which an image's best draw is mistaken for its best timestep.
        split_noise: Each image's best timestep by the other draws, scored on a draw that had no
            part in it: what knowing the image's rewards (from so many draws) is worth. An unbiased
            value of that choice, and so a lower bound of what perfect knowledge is worth. None with
            one draw.
        observable: What a predictor from the agent's observation gains, learned from the training
            images alone.
        predictor: How it predicts, chosen by cross-validation on the training images.
        agreement: Correlation over images between the best timesteps by two halves of the draws; 1:
            they are the images', 0: the noise's. None with one draw, or where one timestep is best
            for all.
        spread: Over the whole grid.
        spread_at_top: Over the quarter of the grid with the highest mean rewards, between which a
            policy chooses in earnest.
        top: That quarter.
        best_timesteps: (M',) each held-out image's best timestep by the mean over draws.
        predicted_timesteps: (M',) what the predictor chooses.
    """

    best_fixed: int
    fixed_reward: float
    random_reward: float
    naive: Gap
    split_noise: Gap | None
    observable: Gap
    predictor: Predictor
    agreement: float | None
    spread: Spread
    spread_at_top: Spread
    top: tuple[int, ...]
    best_timesteps: np.ndarray
    predicted_timesteps: np.ndarray


def measure_selection(
    train: np.ndarray,
    heldout: np.ndarray,
    train_observations: np.ndarray,
    heldout_observations: np.ndarray,
    timesteps: tuple[int, ...],
    seed: int,
) -> Selection:
    """All of :class:`Selection`.

    Args:
        train: Rewards (D, T, M).
        heldout: Rewards (D, T, M').
        train_observations: (M, E), or of any shape per image; flattened.
        heldout_observations: (M', E).
        timesteps: The T timesteps.
        seed: Of folds and bootstrap.
    """
    draws, _, images = heldout.shape
    mean = heldout.mean(0)  # (T, M')
    order = np.argsort(-train.mean((0, 2)), kind="stable")
    fixed = int(order[0])
    top = np.sort(order[: max(2, -(-len(order) // 4))]) if len(order) > 1 else order
    everyone = np.arange(images)

    naive = heldout.max(1).mean(0) - mean[fixed]
    split = np.zeros(images)
    if draws > 1:
        for draw in range(draws):
            others = np.delete(heldout, draw, 0)
            # The draw that is scored has no part in the choice. One draw alone does not tell its
            # noise; then that of the training images stands in for it.
            noise = (others if draws > 2 else train).var(0, ddof=1).mean(1)  # (T,)
            best = _without_noise(others.mean(0), noise / (draws - 1)).argmax(0)
            split += (heldout[draw][best, everyone] - heldout[draw][fixed]) / draws
    predictor, chosen = choose_predictor(
        train.mean(0).T,
        train_observations.reshape(len(train_observations), -1),
        heldout_observations.reshape(images, -1),
        seed,
    )
    observable = mean[chosen, everyone] - mean[fixed]
    grid = np.asarray(timesteps)
    return Selection(
        best_fixed=int(grid[fixed]),
        fixed_reward=float(mean[fixed].mean()),
        random_reward=float(mean.mean()),
        naive=gap(naive, seed),
        split_noise=gap(split, seed) if draws > 1 else None,
        observable=gap(observable, seed),
        predictor=predictor,
        agreement=_agreement(heldout, grid),
        spread=variance_components(heldout),
        spread_at_top=variance_components(heldout[:, top]),
        top=tuple(grid[top].tolist()),
        best_timesteps=grid[mean.argmax(0)],
        predicted_timesteps=grid[chosen],
    )


def gap(gains: np.ndarray, seed: int) -> Gap:
    """Mean of gains (M,) with a percentile bootstrap interval over images."""
    generator = np.random.default_rng(seed)
    means = np.array(
        [gains[generator.integers(len(gains), size=len(gains))].mean() for _ in range(BOOTSTRAPS)]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Gap(float(gains.mean()), float(low), float(high))


def variance_components(rewards: np.ndarray) -> Spread:
    """Variance components of rewards (D, T, M); see :class:`Spread`. Estimates below 0 become 0."""
    draws, places, images = rewards.shape
    cells = rewards.mean(0)  # (T, M)
    rows, columns, grand = cells.mean(1), cells.mean(0), cells.mean()
    noise = float(rewards.var(0, ddof=1).mean()) if draws > 1 else 0.0
    rest = cells - rows[:, None] - columns[None] + grand
    freedom = max((places - 1) * (images - 1), 1)
    mixed = float(np.square(rest).sum()) / freedom  # interaction + noise / D
    between_rows = float(rows.var(ddof=1)) if places > 1 else 0.0
    between_columns = float(columns.var(ddof=1)) if images > 1 else 0.0
    return Spread(
        timestep=max(between_rows - mixed / images, 0.0),
        image=max(between_columns - mixed / places, 0.0),
        interaction=max(mixed - noise / draws, 0.0) if places > 1 else 0.0,
        noise=noise,
    )


def _without_noise(rewards: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """What rewards (T, M) are without their noise, of variance (T,) at each timestep.

    The best linear prediction of the noiseless rewards, with the covariance between timesteps that
    is left when the noise is taken away (empirical Bayes; Efron & Morris, 1975). Without it a
    timestep that is ruinous and noisy wins some images by luck, and knowing rewards would look
    worse than not knowing them.
    """
    means = rewards.mean(1, keepdims=True)
    deviations = rewards - means
    total = deviations @ deviations.T / max(rewards.shape[1] - 1, 1)
    values, vectors = np.linalg.eigh(total - np.diag(noise))
    own = (vectors * values.clip(0.0)) @ vectors.T
    kept: np.ndarray = own @ np.linalg.pinv(own + np.diag(noise), hermitian=True) @ deviations
    return means + kept


def _agreement(rewards: np.ndarray, grid: np.ndarray) -> float | None:
    draws = len(rewards)
    if draws < 2:
        return None
    half = draws // 2
    first, second = (
        grid[part.mean(0).argmax(0)].astype(float) for part in (rewards[:half], rewards[half:])
    )
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ratio(signal: float, noise: float) -> float:
    return signal / noise if noise > 0 else float("inf") if signal > 0 else 0.0
