"""The landscape by a trained student's reward, and teachers that are no denoisers."""

from __future__ import annotations

import pytest
import torch

from repfusion_env.config_loading import load_config, to_yaml
from repfusion_env.data import load_data
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.landscapes import LandscapeSettings, measure
from repfusion_env.landscapes.denoising import measure_denoising
from repfusion_env.trainer import DistillationTrainer
from repfusion_env.weights import save_weights


def test_a_runs_rewards_are_those_that_its_trainer_judges(tiny, tmp_path):
    config = load_config("digits", tiny)
    trainer = DistillationTrainer(config, build_frozen_parts(config))
    ids = torch.arange(32)
    for step in range(5):
        trainer.step(ids, torch.full_like(ids, 200), torch.full_like(ids, step))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    save_weights(trainer.evaluation_student, tmp_path / "student.safetensors")

    found = measure(config, LandscapeSettings(images=40, draws=2), run=tmp_path)
    everyone = torch.arange(40)
    expected = [
        trainer.judge(
            trainer.parts.heldout, everyone, torch.full_like(everyone, 400), everyone * 0 + draw
        ).reward.mean()
        for draw in range(2)
    ]
    assert found.reward_kind == "student_lookahead"
    assert found.reward.shape == (1, 5)
    assert found.reward[0, 2] == pytest.approx(float(sum(expected)) / 2, rel=1e-4)
    assert expected[0] != expected[1]

    other = load_config("digits", {**tiny, "student": "resnet18"})
    with pytest.raises(ValueError, match="is not the student of this configuration"):
        measure(other, LandscapeSettings(images=40), run=tmp_path)
    with pytest.raises(ValueError, match="only the run's own layers"):
        measure(config, LandscapeSettings(images=40, layers=("conv_in",)), run=tmp_path)


def test_a_classifier_is_no_denoiser_and_a_sentence_says_so():
    overrides = {"teacher": {"family": "timm", "model": "resnet18.a1_in1k"}, "device": "cpu"}
    config = load_config("digits", overrides)
    found = measure_denoising(config, load_data(config.data)[1], (0, 10))
    assert isinstance(found, str)
    assert "'timm' has no denoiser" in found
