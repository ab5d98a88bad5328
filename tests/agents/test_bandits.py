from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.bandits import ArmBandit, EpsilonGreedy, LinearThompson, Thompson, UpperConfidence
from repfusion_env.config import BanditConfig

LANES, WIDTH = 16, 6
OPEN = torch.ones(4, dtype=torch.bool)
ARM_BANDITS = {"epsilon_greedy": EpsilonGreedy, "ucb": UpperConfidence, "thompson": Thompson}


def make(name: str, valid: Tensor = OPEN, **settings: Any) -> Any:
    config = BanditConfig(algo=name, **settings)
    if name == "linear":
        return LinearThompson(valid, config, WIDTH, torch.Generator().manual_seed(0))
    return ARM_BANDITS[name](valid, config)


def play(
    policy: Any,
    value: Callable[[Tensor, Tensor, float], Tensor],
    steps: int,
    *,
    lanes: int = LANES,
    noise: float = 0.5,
    seed: int = 1,
) -> tuple[Tensor, Tensor]:
    """Observations and actions of all steps, (steps, lanes, ...); rewards are noisy ``value``."""
    generator = torch.Generator().manual_seed(seed)
    seen, chosen = [], []
    for step in range(steps):
        observations = torch.randn(lanes, WIDTH, generator=generator)
        progress = step / steps
        actions = policy.act(observations, progress, generator)
        rewards = value(observations, actions, progress)
        policy.learn(
            observations, actions, rewards + noise * torch.randn(lanes, generator=generator)
        )
        seen.append(observations)
        chosen.append(actions)
    return torch.stack(seen), torch.stack(chosen)


def of_arms(*values: float) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda observations, actions, progress: torch.tensor(values)[actions]


def of_context(observations: Tensor, actions: Tensor, progress: float) -> Tensor:
    """Arm 1 pays where the first number is positive, arm 2 where not; both are 0 on average."""
    return observations[:, 0] * torch.tensor([0.0, 1.0, -1.0, 0.0])[actions]


@pytest.mark.parametrize("lanes", [1, LANES])
@pytest.mark.parametrize("name", [*ARM_BANDITS, "linear"])
def test_the_best_arm_is_found_and_then_chosen(name: str, lanes: int):
    policy = make(name)
    steps = 150 if lanes > 1 else 600
    _, actions = play(policy, of_arms(0.0, 0.6, 0.0, -1.0), steps, lanes=lanes)
    assert (policy.greedy(torch.randn(50, WIDTH)) == 1).float().mean() > 0.9
    late = actions[steps // 2 :]
    assert (late == 1).float().mean() > 0.6
    assert (late == 3).float().mean() < 0.1


@pytest.mark.parametrize("name", [*ARM_BANDITS, "linear"])
def test_a_level_that_rises_for_all_arms_misleads_none(name: str):
    # Over the run it rises by 20 times what the best arm is better than the second.
    values = torch.tensor([0.3, 0.6, 0.0, 0.0])
    policy = make(name)
    play(policy, lambda observations, actions, progress: values[actions] + 6 * progress, 200)
    assert (policy.greedy(torch.randn(50, WIDTH)) == 1).float().mean() > 0.9


@pytest.mark.parametrize("name", [*ARM_BANDITS, "linear"])
def test_another_arm_that_becomes_the_best_is_found(name: str):
    def value(observations: Tensor, actions: Tensor, progress: float) -> Tensor:
        return (actions == (1 if progress < 0.4 else 2)).float()

    policy = make(name, discount=0.9)
    play(policy, value, 250)
    assert (policy.greedy(torch.randn(50, WIDTH)) == 2).float().mean() > 0.9


def test_the_linear_bandit_learns_which_arm_pays_for_which_image():
    policy = make("linear", discount=0.999)
    play(policy, of_context, 300)
    observations = torch.randn(400, WIDTH)
    best = torch.where(observations[:, 0] > 0, 1, 2)
    assert (policy.greedy(observations) == best).float().mean() > 0.85


def test_bandits_that_see_no_image_earn_nothing_where_it_decides():
    policy = make("ucb", discount=0.999)
    play(policy, of_context, 300)
    observations = torch.randn(400, WIDTH)
    earned = of_context(observations, policy.greedy(observations), 1.0).mean()
    assert abs(float(earned)) < 0.2  # choosing for each image earns 0.8


@pytest.mark.parametrize("name", [*ARM_BANDITS, "linear"])
def test_closed_arms_are_never_chosen(name: str):
    valid = torch.tensor([True, False, True, False])
    policy = make(name, valid)
    _, actions = play(policy, of_arms(0.0, 9.0, 0.5, 9.0), 30)
    assert set(actions.unique().tolist()) <= {0, 2}
    assert set(policy.greedy(torch.randn(20, WIDTH)).tolist()) == {2}


def test_means_are_discounted_and_free_of_the_level():
    policy = make("ucb", discount=0.5)
    observations = torch.zeros(2, WIDTH)
    level_total = level_weight = 0.0
    sums, counts = np.zeros(4), np.zeros(4)
    for actions, rewards in (([0, 1], [1.0, 3.0]), ([1, 2], [4.0, -2.0]), ([0, 1], [2.0, 8.0])):
        policy.learn(observations, torch.tensor(actions), torch.tensor(rewards))
        means = sums / np.maximum(counts, 1e-6)
        level_total = level_total * math.exp(-2 / 64) + (rewards - means[actions]).sum()
        level_weight = level_weight * math.exp(-2 / 64) + 2
        sums, counts = sums * 0.5, counts * 0.5
        for action, reward in zip(actions, rewards, strict=True):
            sums[action] += reward - level_total / level_weight
            counts[action] += 1
    np.testing.assert_allclose(policy.counts, counts, rtol=1e-6)
    np.testing.assert_allclose(policy.sums, sums, rtol=1e-5, atol=1e-6)


def filled(kind: type[ArmBandit], **settings: Any) -> Any:
    """A bandit of which all is known: means 0, 1, 0.5, 0.9 from 4, 9, 2, 1 rewards, spread 2."""
    policy = kind(OPEN, BanditConfig(**settings))
    policy.counts.copy_(torch.tensor([4.0, 9.0, 2.0, 1.0]))
    policy.sums.copy_(policy.counts * torch.tensor([0.0, 1.0, 0.5, 0.9]))
    policy.level.squares.fill_(400.0)
    policy.level.count.fill_(100.0)
    return policy


def test_ucb_chooses_as_lanes_one_after_the_other_would():
    policy = filled(UpperConfidence, exploration=0.7)
    counts, means = policy.counts.double().numpy().copy(), policy.means.double().numpy()
    horizon, expected = math.log(counts.sum() + LANES), np.zeros(4)
    for _ in range(LANES):
        arm = int(np.argmax(means + 0.7 * 2 * np.sqrt(2 * horizon / counts)))
        counts[arm] += 1
        expected[arm] += 1
    actions = policy.act(torch.zeros(LANES, WIDTH), 0.0, torch.Generator().manual_seed(0))
    assert np.bincount(actions, minlength=4).tolist() == expected.tolist()
    assert len(expected.nonzero()[0]) > 1


def test_epsilon_greedy_draws_any_arm_as_often_as_asked():
    policy = filled(EpsilonGreedy, epsilon=0.2)
    actions = policy.act(torch.zeros(20_000, WIDTH), 0.0, torch.Generator().manual_seed(0))
    shares = torch.bincount(actions, minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0.05, 0.85, 0.05, 0.05], atol=0.01)


def test_thompson_chooses_an_arm_as_often_as_it_is_best_under_its_belief():
    policy = filled(Thompson, exploration=0.5)
    actions = policy.act(torch.zeros(50_000, WIDTH), 0.0, torch.Generator().manual_seed(0))
    counts = np.array([4.0, 9.0, 2.0, 1.0])
    centre = counts * [0.0, 1.0, 0.5, 0.9] / (counts + 1)
    draws = np.random.default_rng(0).normal(centre, 0.5 * 2 / np.sqrt(counts + 1), (50_000, 4))
    expected = np.bincount(draws.argmax(axis=1), minlength=4) / 50_000
    np.testing.assert_allclose(torch.bincount(actions, minlength=4) / 50_000, expected, atol=0.015)


def test_linear_weights_are_those_of_discounted_ridge_regressions():
    discount, ridge = 0.8, 0.5
    policy = make("linear", discount=discount, ridge=ridge)
    generator = torch.Generator().manual_seed(3)
    # Features, regression, target; the regression after those of the arms is common to all.
    history: list[tuple[np.ndarray, int, float]] = []
    for _ in range(5):
        observations = torch.randn(LANES, WIDTH, generator=generator)
        actions = torch.randint(4, (LANES,), generator=generator)
        rewards = torch.randn(LANES, generator=generator)
        features = np.c_[np.ones(LANES), observations.numpy() / math.sqrt(WIDTH)]
        before = policy.weights.double().numpy().copy()
        policy.learn(observations, actions, rewards)
        relative = rewards.numpy() - float(policy.level.value)
        for row, arm, left in zip(features, actions.tolist(), relative, strict=True):
            history.append((row, arm, left - row @ before[4]))
            history.append((row, 4, left - row @ before[arm]))
    for regression in range(5):
        x, y, w = [], [], []
        for place, (row, which, target) in enumerate(history):
            if which == regression:
                x.append(row)
                y.append(target)
                w.append(discount ** (4 - place // (2 * LANES)))
        design, weights = np.array(x), np.array(w)
        moments = (design.T * weights) @ design + ridge * np.eye(WIDTH + 1)
        expected = np.linalg.solve(moments, (design.T * weights) @ np.array(y))
        np.testing.assert_allclose(policy.weights[regression], expected, rtol=1e-3, atol=1e-4)


def test_wide_observations_are_projected_and_all_parts_of_them_matter():
    generator = torch.Generator().manual_seed(0)
    policy = LinearThompson(OPEN, BanditConfig(), 3 * 16 * 16, generator)
    images = torch.randn(5, 3, 16, 16)
    features = policy.features(images)
    assert features.shape == (5, 257)
    changed = images.clone()
    changed[:, 2, 15, 15] += 1
    assert (policy.features(changed) != features).any(dim=1).all()
    assert set(policy.greedy(images).tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize("name", [*ARM_BANDITS, "linear"])
def test_a_restored_bandit_goes_on_exactly(name: str):
    policy, other = make(name), make(name)
    play(policy, of_arms(0.0, 0.2, 0.1, 0.0), 20)
    other.load_state_dict(policy.state_dict())
    found = [play(each, of_arms(0.0, 0.2, 0.1, 0.0), 10, seed=5)[1] for each in (policy, other)]
    assert torch.equal(*found)
    for name, value in policy.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
