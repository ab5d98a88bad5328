from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from repfusion_env.noise import derive_seed, keyed_noise


def _noise(ids, timesteps, visits, seed=3, shape=(2, 5, 3)):
    return keyed_noise(
        shape, seed, torch.as_tensor(ids), torch.as_tensor(timesteps), torch.as_tensor(visits)
    )


def _splitmix_box_muller(shape, seed, image_id, timestep, visit):
    """The documented recipe, one image at a time, in uint64 and float64."""
    step = np.uint64(0x9E3779B97F4A7C15)

    def finalise(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    with np.errstate(over="ignore"):
        key = np.uint64(seed)
        for part in (image_id, timestep, visit):
            key = finalise(key + step) ^ np.uint64(part)
        key = finalise(key)
        size = int(np.prod(shape))
        pairs = (size + 1) // 2
        bits = finalise(key + np.arange(2 * pairs, dtype=np.uint64) * step)
    uniform = ((bits >> np.uint64(40)).astype(np.float64) + 0.5) / 2**24
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
    return normal[:size].reshape(shape)


def test_noise_is_splitmix64_and_box_muller():
    seed = derive_seed(0, "noise")
    noise = _noise([7, 0], [400, 0], [12345, 0], seed=seed)
    for row, key in zip(noise, ((7, 400, 12345), (0, 0, 0)), strict=True):
        np.testing.assert_allclose(row, _splitmix_box_muller((2, 5, 3), seed, *key), atol=2e-3)


def test_noise_belongs_to_the_decision_and_not_to_the_lane():
    ids, timesteps, visits = torch.arange(40), torch.arange(40) * 20, torch.arange(40) + 5
    noise = _noise(ids, timesteps, visits)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_noise(ids[order], timesteps[order], visits[order]), noise[order])
    assert torch.equal(_noise([7], [140], [12])[0], noise[7])


def test_each_part_of_the_key_changes_the_noise():
    base = _noise([1], [2], [3])
    others = [
        _noise([2], [2], [3]),
        _noise([1], [3], [3]),
        _noise([1], [2], [4]),
        _noise([2], [1], [3]),
        _noise([3], [2], [1]),
        _noise([1], [2], [3], seed=4),
    ]
    for other in others:
        assert (base - other).abs().mean() > 0.3


def test_noise_is_standard_normal_and_uncorrelated_between_neighbours():
    ids = torch.arange(600)
    noise = _noise(ids, ids * 0 + 100, ids * 0, shape=(1, 16, 16)).double().flatten(1).numpy()
    assert np.isfinite(noise).all()
    sample = noise.ravel()  # 153,600 values: the mean's deviation is 0.0026
    assert abs(sample.mean()) < 0.012
    assert abs(sample.var() - 1) < 0.02
    assert abs(stats.skew(sample)) < 0.03
    assert abs(stats.kurtosis(sample)) < 0.06
    assert stats.kstest(sample, "norm").pvalue > 1e-3

    def correlation(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    assert abs(correlation(noise[:-1], noise[1:])) < 0.012
    assert abs(correlation(noise[:, :-1], noise[:, 1:])) < 0.012
    # Box-Muller's halves come from the same pair; their squares must not give that away.
    assert abs(correlation(noise[:, :128] ** 2, noise[:, 128:] ** 2)) < 0.02
    by_timestep = _noise(ids, ids * 0 + 101, ids * 0, shape=(1, 16, 16)).flatten(1).numpy()
    assert abs(correlation(noise, by_timestep)) < 0.012


def test_derived_seeds_differ_by_purpose_and_fit_int64():
    seeds = {derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(1, "a"), derive_seed(0, "a", 1)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
