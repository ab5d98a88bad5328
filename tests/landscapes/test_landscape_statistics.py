"""Statistics of a landscape against closed forms, second implementations and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from repfusion_env.landscapes.heads import balanced_folds, fit_logistic, judge_features
from repfusion_env.landscapes.layers import spread_of_layers
from repfusion_env.landscapes.representation import effective_rank, linear_cka, spread_share
from repfusion_env.landscapes.selection import Gap, measure_selection, variance_components


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_effective_rank_counts_directions_of_equal_strength():
    directions = torch.linalg.qr(_normal(40, 3) - _normal(40, 3).mean(0))[0]
    features = (directions - directions.mean(0)) @ _normal(3, 8, seed=1)
    values = np.linalg.svd(features.numpy() - features.numpy().mean(0), compute_uv=False)
    shares = values / values.sum()
    expected = np.exp(-(shares[shares > 1e-12] * np.log(shares[shares > 1e-12])).sum())
    assert effective_rank(features) == pytest.approx(expected, rel=1e-4)
    eye = torch.cat((torch.eye(6), -torch.eye(6)))
    assert effective_rank(eye) == pytest.approx(6.0)
    assert effective_rank(_normal(20, 1) @ _normal(1, 9)) == pytest.approx(1.0, abs=1e-3)


def test_spread_share_is_what_the_mean_leaves():
    features = torch.tensor([[3.0, 4.0], [3.0, 4.0], [5.0, 4.0], [1.0, 4.0]])
    total = float(features.square().sum(1).mean())
    assert spread_share(features) == pytest.approx(2.0 / total)


def test_cka_is_kornbliths_formula_and_blind_to_rotation_and_scale():
    x, y = _normal(30, 5), _normal(30, 7, seed=1) + torch.cat((_normal(30, 5), _normal(30, 2)), 1)
    found = linear_cka([x, y, 3 * x @ torch.linalg.qr(_normal(5, 5, seed=2))[0]])
    a, b = (v.double() - v.double().mean(0) for v in (x, y))
    expected = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert found[0, 1] == pytest.approx(float(expected), rel=1e-5)
    assert found[0, 2] == pytest.approx(1.0, abs=1e-5)


def test_debiased_cka_is_the_unbiased_hsic_and_near_zero_for_unrelated_features():
    x, y = _normal(25, 60).double(), _normal(25, 60, seed=1).double()
    n = len(x)

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        k, m = a @ a.T, b @ b.T
        k, m = k - k.diag().diag(), m - m.diag().diag()
        ones = torch.ones(n, dtype=torch.float64)
        value = (k @ m).trace() + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return float(value - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
    assert linear_cka([x, y], debiased=True)[0, 1] == pytest.approx(expected, abs=1e-5)
    assert linear_cka([x, y])[0, 1] > 0.5 > abs(expected)


def test_heads_solve_the_problem_that_scikit_learn_solves():
    from sklearn.linear_model import LogisticRegression

    labels = torch.arange(90) % 3
    features = _normal(90, 4) + 1.5 * torch.nn.functional.one_hot(labels, 4)
    use = torch.ones(2, 90)
    use[1, :30] = 0
    found = fit_logistic(features, labels, 3, use, torch.tensor([0.05, 0.1]))
    for problem, strength in ((0, 0.05), (1, 0.1)):
        kept = use[problem].bool()
        # scikit-learn sums the losses, this takes their mean.
        other = LogisticRegression(C=1 / (strength * int(kept.sum())), max_iter=1000, tol=1e-8)
        other.fit(features[kept].numpy(), labels[kept].numpy())
        ours = torch.cat((features, torch.ones(90, 1)), 1) @ found[problem]
        theirs = other.predict_log_proba(features.numpy())
        np.testing.assert_allclose(ours.log_softmax(1).numpy(), theirs, atol=5e-3)


def test_training_images_are_judged_by_heads_that_never_saw_them():
    labels = torch.arange(60) % 2
    # Nothing to read, but wide enough to learn by heart: 200 random columns.
    train, heldout = _normal(1, 60, 200), _normal(1, 60, 200, seed=1)
    folds = balanced_folds(labels, None, seed=0)
    found = judge_features(train, labels, heldout, labels, folds, 2)
    assert float(found.train_losses.mean()) > 0.6  # log 2 is 0.69; by heart it would be near 0


def test_folds_are_balanced_and_only_labelled_images_have_one():
    labels = torch.arange(100) % 4
    folds = balanced_folds(labels, 40, seed=0)
    assert int((folds >= 0).sum()) == 40
    for label in range(4):
        assert torch.bincount(folds[(labels == label) & (folds >= 0)]).tolist() == [2] * 5


def _rewards(seed: int = 0, **deviations: float) -> np.ndarray:
    draws, places, images = 3, 12, 400
    generator = np.random.default_rng(seed)
    sizes = {"timestep": (1, places, 1), "image": (1, 1, images)}
    sizes |= {"interaction": (1, places, images), "noise": (draws, places, images)}
    parts = [deviations[name] * generator.normal(size=size) for name, size in sizes.items()]
    return np.zeros((draws, places, images)) + sum(parts)


def test_variance_components_recover_what_the_rewards_were_made_of():
    rewards = _rewards(timestep=2.0, image=1.5, interaction=0.5, noise=1.0)
    found = variance_components(rewards)
    assert found.image == pytest.approx(2.25, rel=0.2)
    assert found.interaction == pytest.approx(0.25, rel=0.15)
    assert found.noise == pytest.approx(1.0, rel=0.1)
    assert found.timestep == pytest.approx(4.0, rel=0.6)  # of twelve draws only
    assert found.sample_snr_with_baseline == pytest.approx(0.25, rel=0.2)


def test_noise_alone_fools_the_naive_oracle_and_not_the_split_one():
    train, heldout = (_rewards(s, timestep=0, image=1, interaction=0, noise=1) for s in (0, 1))
    looks = [np.random.default_rng(s).normal(size=(400, 6)) for s in (2, 3)]
    found = measure_selection(train, heldout, looks[0], looks[1], tuple(range(12)), seed=0)
    assert found.naive.low > 1.0  # the mean of the highest of 12 normals is 1.63
    assert found.split_noise is not None
    assert found.split_noise.low < 0 < found.split_noise.high
    assert found.observable.low <= 0.05
    assert abs(found.agreement or 0.0) < 0.2


def _split_gain(draws: int, seed: int, **deviations: float) -> tuple[Gap, float]:
    """The estimate, and what knowing the noiseless rewards would gain over the best fixed place."""
    generator = np.random.default_rng(seed)
    main = np.linspace(0.4, 0.0, 8)[:, None]
    banks = []
    for _ in range(2):
        own = main + deviations["own"] * generator.normal(size=(8, 500))
        own += generator.normal(size=(1, 500))  # difficulty
        banks.append((own, own + deviations["noise"] * generator.normal(size=(draws, 8, 500))))
    looks = generator.normal(size=(500, 3))
    found = measure_selection(banks[0][1], banks[1][1], looks, looks, tuple(range(8)), seed=0)
    assert found.split_noise is not None
    truth = banks[1][0]
    return found.split_noise, float((truth.max(0) - truth[found.best_fixed]).mean())


@pytest.mark.parametrize("draws", [2, 4])
def test_split_noise_recovers_a_large_gain_of_each_image(draws):
    found, truth = _split_gain(draws, seed=0, own=1.0, noise=0.3)
    assert truth > 1.0
    # Never above it beyond chance, and little below it: the noise is small beside the gain.
    assert 0.9 * truth < found.gain < 1.03 * truth
    assert found.low < found.gain < found.high


@pytest.mark.parametrize("draws", [2, 4])
def test_split_noise_is_nothing_where_no_image_has_a_timestep_of_its_own(draws):
    found = [_split_gain(draws, seed, own=0.0, noise=1.0) for seed in range(8)]
    # A choice without grounds may lose a little; it must not be told as a gain.
    assert abs(np.mean([gap.gain for gap, _ in found])) < 0.05
    assert sum(gap.low <= 0 for gap, _ in found) >= 7
    assert max(gap.gain for gap, _ in found) < 0.1  # the naive one is above 1


def test_a_best_timestep_that_the_observation_shows_is_found():
    generator = np.random.default_rng(0)
    rewards, looks = [], []
    for _ in range(2):
        group = generator.integers(2, size=300)
        mean = np.zeros((4, 300))
        mean[1, group == 0] = mean[3, group == 1] = 1.0
        rewards.append(mean + 0.3 * generator.normal(size=(2, 4, 300)))
        looks.append(np.stack((group, generator.normal(size=300)), axis=1))
    found = measure_selection(*rewards, *looks, (0, 10, 20, 30), seed=0)
    assert found.observable.low > 0.35
    assert found.observable.gain == pytest.approx(0.5, abs=0.1)
    assert set(found.predicted_timesteps.tolist()) == {10, 30}


def test_default_layers_are_blocks_over_the_whole_depth_with_the_teachers_own():
    available = ["conv_in", *(f"down.{i}{x}" for i in range(3) for x in (".conv", ".norm", ""))]
    available += ["mid.conv", "mid", "up.0.conv", "up.0", "up.0.upsampler", "up.1.conv", "up.1"]
    found = spread_of_layers(available, ("mid.conv",), count=4)
    assert found == ("down.0", "down.2", "mid.conv", "up.1")
