"""Bandits over the arms of the environment: which timestep pays, or which pays for such an image.

Rewards rise by themselves while the student learns, so that a bandit which compares today's arm
with last week's would prefer whatever it chose last. All bandits here therefore model a reward as
the level of the day, which is common to all arms, plus what the arm adds; and they forget with
``bandit.discount``. Values are compared in units of the noise that is left.

Shape letters: N lanes, A arms, D observation, d features of the linear bandit.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from repfusion_env.config import BanditConfig

# Decisions over which the level is averaged: less is noise, more lags behind the student.
LEVEL_MEMORY = 64
# The linear bandit inverts a matrix of this side for each arm at each step, at most.
MOST_FEATURES = 256


class Policy(Protocol):
    """What chooses actions, learns from rewards, and keeps all it knows in its ``state_dict``."""

    def act(self, observations: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """Actions to train with.

        Args:
            observations: (N, D) or (N, C, H, W).
            progress: Part of the run that is done.
            generator: All randomness.

        Returns:
            (N,) int64.
        """
        ...

    def learn(self, observations: Tensor, actions: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        """Take in one step's rewards (N,); gives scalars on the device for the log."""
        ...

    def greedy(self, observations: Tensor) -> Tensor:
        """The actions (N,) by which it is judged; deterministic."""
        ...


class Level(nn.Module):
    """What rewards have in common lately, and how far they scatter around their prediction.

    Args:
        discount: Of the scatter, for each step.
    """

    total: Tensor
    weight: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, discount: float) -> None:
        super().__init__()
        self.discount = discount
        for name in ("total", "weight", "squares", "count"):
            self.register_buffer(name, torch.zeros(()))

    def remove(self, rewards: Tensor, predicted: Tensor) -> Tensor:
        """Rewards (N,) without the level, given what their arms add by the estimate so far."""
        kept = math.exp(-len(rewards) / LEVEL_MEMORY)
        self.total.mul_(kept).add_((rewards - predicted).sum())
        self.weight.mul_(kept).add_(len(rewards))
        relative = rewards - self.value
        self.squares.mul_(self.discount).add_((relative - predicted).square().sum())
        self.count.mul_(self.discount).add_(len(rewards))
        return relative

    @property
    def value(self) -> Tensor:
        """The level; scalar."""
        return self.total / self.weight

    @property
    def spread(self) -> Tensor:
        """Standard deviation of what is left; scalar, 1 before anything is known."""
        known = (self.squares / self.count.clamp_min(1)).sqrt().clamp_min(1e-6)
        return torch.where(self.count > 0, known, 1.0)


class ArmBandit(nn.Module):
    """A value for each arm, whatever the image: discounted means and counts.

    Args:
        valid: (A,) bool, the open arms.
        config: Settings.
    """

    valid: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, valid: Tensor, config: BanditConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("valid", valid)
        self.register_buffer("counts", torch.zeros(len(valid)))  # (A,)
        self.register_buffer("sums", torch.zeros(len(valid)))
        self.level = Level(config.discount)

    @property
    def means(self) -> Tensor:
        """What each arm adds, (A,); 0 where nothing is known."""
        return self.sums / self.counts.clamp_min(1e-6)

    def learn(self, observations: Tensor, actions: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        """See :class:`Policy`."""
        relative = self.level.remove(rewards, self.means[actions])
        for statistic in (self.counts, self.sums):
            statistic.mul_(self.config.discount)
        self.counts.index_add_(0, actions, torch.ones_like(relative))
        self.sums.index_add_(0, actions, relative)
        return {"policy/spread": self.level.spread}

    def greedy(self, observations: Tensor) -> Tensor:
        """The arm with the highest mean less its standard error: a lucky one does not win."""
        doubt = self.level.spread / self.counts.clamp_min(1e-6).sqrt()
        scores = (self.means - doubt).masked_fill(~self.valid, -torch.inf)
        return scores.argmax().expand(len(observations))


class EpsilonGreedy(ArmBandit):
    """The arm with the best mean, and with probability epsilon any other.

    Sutton and Barto, "Reinforcement Learning", 2018, section 2.4; arms that were never tried
    come first.
    """

    def act(self, observations: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """See :class:`Policy`."""
        n, device = len(observations), self.sums.device
        scores = self.means.masked_fill(self.counts == 0, torch.inf)
        scores = scores.masked_fill(~self.valid, -torch.inf)
        best = (scores == scores.max()).float()
        exploit = torch.multinomial(best, n, replacement=True, generator=generator)
        explore = torch.multinomial(self.valid.float(), n, replacement=True, generator=generator)
        chance = torch.rand(n, generator=generator, device=device)
        return torch.where(chance < self.config.epsilon, explore, exploit)


class UpperConfidence(ArmBandit):
    """Discounted UCB1, for many lanes at once.

    Auer, Cesa-Bianchi and Fischer, "Finite-time analysis of the multiarmed bandit problem", Machine
    Learning 47, 2002; the discount is Garivier and Moulines', "On upper-confidence bound policies
    for switching bandit problems", ALT 2011. Lanes choose one after the other, each counting the
    choices of those before it, whose rewards it does not know yet (Desautels, Krause and Burdick,
    "Parallelizing exploration-exploitation tradeoffs", JMLR 15, 2014).
    """

    def act(self, observations: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """See :class:`Policy`."""
        n, device = len(observations), self.sums.device
        # An arm's bound falls with each further lane that takes it, so that choosing one lane after
        # the other ends with the n largest of all bounds.
        taken = torch.arange(n, device=device)  # lanes before
        counts = self.counts[:, None] + taken  # (A, n)
        width = self.config.exploration * self.level.spread
        horizon = (self.counts.sum() + n).clamp_min(2).log()
        bounds = self.means[:, None] + width * (2 * horizon / counts).sqrt()
        bounds = bounds.masked_fill(counts == 0, torch.inf)
        bounds = bounds.masked_fill(~self.valid[:, None], -torch.inf)
        chosen = bounds.flatten().topk(n).indices // n
        return chosen[torch.randperm(n, generator=generator, device=device)]


class Thompson(ArmBandit):
    """Each lane takes the best arm of a draw from the beliefs about their values.

    Gaussian rewards of common variance, and a prior worth one reward; old rewards count less, so
    that beliefs widen again. Thompson, Biometrika 25, 1933; Russo et al., "A tutorial on Thompson
    sampling", 2018, section 6.3 on change.
    """

    def act(self, observations: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """See :class:`Policy`."""
        shape = (len(observations), len(self.counts))
        noise = torch.randn(shape, generator=generator, device=self.sums.device)
        width = self.config.exploration * self.level.spread
        draws = self.sums / (self.counts + 1) + noise * width / (self.counts + 1).sqrt()
        return draws.masked_fill(~self.valid, -torch.inf).argmax(dim=1)


class LinearThompson(nn.Module):
    """A ridge regression from observation to value for each arm: the best arm of *this* image.

    Agrawal and Goyal, "Thompson sampling for contextual bandits with linear payoffs", ICML 2013,
    with an arm's own weights as in Li et al., "A contextual-bandit approach to personalized news
    article recommendation", WWW 2010. Statistics are discounted as in Russac, Vernade and Cappé,
    "Weighted linear bandits for non-stationary environments", NeurIPS 2019. How hard an image is,
    whatever the arm, is common to all arms: one more regression, of what the level leaves.

    Args:
        valid: (A,) bool, the open arms.
        config: Settings.
        width: D; observations of more than 256 numbers are projected at random to so many.
        generator: Of that projection.
    """

    valid: Tensor
    moments: Tensor
    products: Tensor
    factors: Tensor
    weights: Tensor
    projection: Tensor | None

    def __init__(
        self, valid: Tensor, config: BanditConfig, width: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("valid", valid)
        projection = None
        if width > MOST_FEATURES:
            drawn = torch.randn(width, MOST_FEATURES, generator=generator, device=valid.device)
            projection = drawn / math.sqrt(width)
        self.register_buffer("projection", projection)
        d, regressions = min(width, MOST_FEATURES) + 1, len(valid) + 1  # the last one is common
        self.register_buffer("moments", torch.zeros(regressions, d, d))  # of features, (A+1, d, d)
        self.register_buffer("products", torch.zeros(regressions, d))  # of features and rewards
        unit = torch.eye(d) * math.sqrt(config.ridge)
        self.register_buffer("factors", unit.repeat(regressions, 1, 1))
        self.register_buffer("weights", torch.zeros(regressions, d))
        self.level = Level(config.discount)

    def features(self, observations: Tensor) -> Tensor:
        """1 and the observation, scaled so that both parts weigh alike; (N, d)."""
        flat = observations.flatten(1).float()
        if self.projection is not None:
            flat = flat @ self.projection
        scaled = flat / math.sqrt(flat.shape[1])
        return torch.cat((torch.ones_like(scaled[:, :1]), scaled), dim=1)

    def act(self, observations: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """See :class:`Policy`."""
        features = self.features(observations)
        scores = features @ self.weights[:-1].T  # (N, A)
        # A draw of the weights moves a score by so much; each lane draws its own.
        seen = torch.linalg.solve_triangular(self.factors[:-1], features.T, upper=False)
        doubt = seen.square().sum(dim=1).sqrt().T  # (N, A)
        noise = torch.randn(scores.shape, generator=generator, device=scores.device)
        scores = scores + self.config.exploration * self.level.spread * doubt * noise
        return scores.masked_fill(~self.valid, -torch.inf).argmax(dim=1)

    def learn(self, observations: Tensor, actions: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        """See :class:`Policy`."""
        features = self.features(observations)
        added = (features * self.weights[actions]).sum(dim=1)
        common = features @ self.weights[-1]
        relative = self.level.remove(rewards, added + common)
        n, regressions = len(rewards), len(self.weights)
        lanes = torch.zeros(regressions, n, device=features.device)
        lanes[actions, torch.arange(n, device=features.device)] = 1.0
        lanes[-1] = 1.0
        targets = (relative - common).expand(regressions, n).clone()
        targets[-1] = relative - added
        weighted = lanes[:, :, None] * features  # (A+1, N, d)
        self.moments.mul_(self.config.discount).add_(weighted.transpose(1, 2) @ features)
        self.products.mul_(self.config.discount)
        self.products.add_((weighted * targets[:, :, None]).sum(dim=1))
        unit = torch.eye(features.shape[1], device=features.device)
        factors, _ = torch.linalg.cholesky_ex(self.moments + self.config.ridge * unit)
        self.factors.copy_(factors)
        solved = torch.cholesky_solve(self.products[:, :, None], factors)
        self.weights.copy_(solved[:, :, 0])
        return {"policy/spread": self.level.spread}

    def greedy(self, observations: Tensor) -> Tensor:
        """The arm of the highest predicted value for each observation, (N,) int64."""
        scores = self.features(observations) @ self.weights[:-1].T
        return scores.masked_fill(~self.valid, -torch.inf).argmax(dim=1)
