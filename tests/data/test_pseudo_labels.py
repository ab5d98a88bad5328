"""Clusters of the shipped teacher's features of the digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score

from agents.evaluation import linear_probe_accuracy
from repfusion_env import ConfigError, load_config
from repfusion_env.config import ExperimentConfig
from repfusion_env.data import ImageBank, load_data
from repfusion_env.frozen import FrozenParts, build_frozen_parts
from repfusion_env.trainer import DistillationTrainer

SMALL = {
    "data.labels": "clusters",
    "data.train_limit": 200,
    "data.heldout_limit": 60,
    "teacher.standardize_images": 4,
    "timesteps.values": [0, 200],
    "device": "cpu",
}


def config(**options: object) -> ExperimentConfig:
    return load_config("digits", SMALL | {key.replace("__", "."): v for key, v in options.items()})


@pytest.fixture(scope="module")
def parts() -> FrozenParts:
    return build_frozen_parts(config())


def test_labels_are_clusters_and_the_given_ones_stay_beside_them(parts):
    given = load_data(config().data)
    for bank, original in zip((parts.train, parts.heldout), given, strict=True):
        assert bank.classes == tuple(f"cluster {number}" for number in range(10))
        assert bank.judged.fingerprint == original.fingerprint != bank.fingerprint
        assert bank.judged.images.data_ptr() == bank.images.data_ptr()
    assert set(parts.train.labels.tolist()) == set(range(10))


def test_clusters_know_the_digits_far_better_than_chance(parts):
    for bank in (parts.train, parts.heldout):
        found = normalized_mutual_info_score(bank.judged.labels, bank.labels)
        shuffled = bank.labels[torch.randperm(len(bank), generator=torch.Generator())]
        assert found > 0.5 > 2 * normalized_mutual_info_score(bank.judged.labels, shuffled)


def test_heldout_images_take_the_nearest_training_centre(parts):
    def pooled(bank: ImageBank) -> np.ndarray:
        timesteps = torch.full((len(bank),), parts_config.observation.timestep)
        maps = parts.teacher.features(bank.pixels(torch.arange(len(bank))), timesteps)
        return maps[parts.teacher.layers[0]].mean((2, 3)).double().numpy()

    parts_config = config()
    train, heldout = pooled(parts.train), pooled(parts.heldout)
    mean, deviation = train.mean(0), train.std(0)
    train, heldout = (train - mean) / deviation, (heldout - mean) / deviation
    labels = parts.train.labels.numpy()
    centres = np.stack([train[labels == number].mean(0) for number in range(10)])
    distances = ((heldout[:, None] - centres) ** 2).sum(2)
    assert (distances.argmin(1) == parts.heldout.labels.numpy()).mean() > 0.98


def test_labels_depend_on_no_seed_and_touch_no_random_state(parts):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    again = build_frozen_parts(config(seed=7))
    assert again.train.fingerprint == parts.train.fingerprint
    assert again.heldout.fingerprint == parts.heldout.fingerprint
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_the_probe_judges_by_the_given_labels(parts):
    trainer = DistillationTrainer(config(), parts)
    judged = linear_probe_accuracy(trainer, 200)
    blank = torch.zeros_like(parts.train.labels)
    blank[0] = 1
    wrong = parts.train.given
    assert wrong is not None
    original = wrong.labels.clone()
    wrong.labels.copy_(blank)
    try:
        assert linear_probe_accuracy(trainer, 200) < judged
    finally:
        wrong.labels.copy_(original)
    assert linear_probe_accuracy(trainer, 200) == judged


def test_parts_of_a_bank_keep_both_labels(parts):
    short = parts.train.head(5).to("cpu")
    assert short.labels.tolist() == parts.train.labels[:5].tolist()
    assert short.judged.labels.tolist() == parts.train.judged.labels[:5].tolist()
    assert short.judged.classes == tuple("0123456789")


def test_unlabelled_images_are_clustered_or_refused(tmp_path):
    bank = load_data(config().data)[0]
    for index in range(60):
        Image.fromarray(bank.images[index, 0].numpy()).save(tmp_path / f"{index}.png")
    there = {"data__name": "folder", "data__path": str(tmp_path), "data__clusters": 5}
    parts = build_frozen_parts(config(**there))
    assert parts.train.classes[-1] == "cluster 4"
    assert parts.train.judged is parts.train
    with pytest.raises(ValueError, match=r"have no labels, and .* data\.labels clusters"):
        build_frozen_parts(config(**there, data__labels="given"))


def test_impossible_numbers_of_clusters_are_refused():
    with pytest.raises(ConfigError, match=r"data\.clusters: 1 given; .* 2 or more"):
        config(data__clusters=1)
    with pytest.raises(ValueError, match=r"data\.clusters: 201 given, .* 200 training images"):
        build_frozen_parts(config(data__clusters=201))
