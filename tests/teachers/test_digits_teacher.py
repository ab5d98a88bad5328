from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from repfusion_env.config import DataConfig, TeacherConfig
from repfusion_env.data import ImageBank, load_data
from repfusion_env.teachers import Teacher, check_fit, describe_teacher, load_teacher
from repfusion_env.teachers.files.model_files import SHIPPED

LAYER = "mid_block.resnets.1.conv2"


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(TeacherConfig(), device="cpu")


def probe_accuracy(teacher: Teacher, timestep: int) -> float:
    """Held-out accuracy of a linear classifier on pooled features of noised images, 50 labels."""
    train, heldout = load_data(DataConfig())
    generator = torch.Generator().manual_seed(0)

    def features(bank: ImageBank) -> torch.Tensor:
        ids = torch.arange(len(bank))
        timesteps = torch.full_like(ids, timestep)
        noise = torch.randn(len(bank), *bank.shape, generator=generator)
        noised = teacher.add_noise(bank.pixels(ids), noise, timesteps)
        return teacher.features(noised, timesteps)[LAYER].mean((2, 3))

    first = [train.labels.eq(label).nonzero().flatten()[:5] for label in range(10)]
    labelled = torch.cat(first)
    seen = features(train)
    scaler = StandardScaler().fit(seen)
    inputs, targets = scaler.transform(seen[labelled]), train.labels[labelled]
    classifier = LogisticRegression(max_iter=1000).fit(inputs, targets)
    return float(classifier.score(scaler.transform(features(heldout)), heldout.labels))


def test_it_fits_the_default_experiment(teacher):
    from repfusion_env.config import ExperimentConfig

    card = describe_teacher(TeacherConfig())
    check_fit(card, ExperimentConfig(), load_data(DataConfig())[0].shape)
    assert teacher.feature_shapes[LAYER][1:] == (4, 4)


def test_the_choice_of_the_timestep_matters(teacher):
    """An inner optimum near t = 50 to 200, and ruin where the noise drowns the image."""
    accuracy = {timestep: probe_accuracy(teacher, timestep) for timestep in (0, 100, 400, 800)}
    assert accuracy[100] > 0.82
    assert accuracy[100] > accuracy[0] + 0.01
    assert accuracy[400] < 0.65
    assert accuracy[800] < 0.2


@pytest.mark.parametrize("name", list(SHIPPED))
def test_its_folder_is_small_and_whole(name):
    files = {path.name: path.stat().st_size for path in SHIPPED[name].iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "samples.png",
        "scheduler_config.json",
    }
    assert sum(files.values()) < 2.5e6
    card = (SHIPPED[name] / "README.md").read_text()
    train, _ = load_data(DataConfig(name=name))
    # The card names the very images that the loader gives, so nothing held out was trained on.
    assert train.fingerprint in card
