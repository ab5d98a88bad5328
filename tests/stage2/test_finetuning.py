"""Fine-tuning learns, goes on exactly, and says what is wrong with its settings."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from repfusion_env.stage2 import FinetuneConfig, finetune, labelled_subset
from repfusion_env.stage2.finetuning import Stopped, rate_factor
from repfusion_env.stage2.network import evaluate

SETTINGS = {"steps": 12, "batch_size": 16, "labels": 40, "evaluations": 4, "seed": 3}


def run(student, banks, folder=None, **settings):
    options = {key: settings.pop(key) for key in ("resume", "interrupted") if key in settings}
    config = FinetuneConfig(**(SETTINGS | settings))
    return finetune(student, *banks, config, checkpoint_folder=folder, progress=False, **options)


def weights(result):
    return list(result.model.state_dict().values())


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def test_it_learns_the_labels_and_leaves_the_student_as_it_is(student, banks):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    result = run(student, banks, steps=60, labels="100%", learning_rate=3e-3)
    assert result.accuracy > 0.6  # a tenth is chance
    assert result.curve[-1]["loss"] < 0.5 * result.curve[0]["loss"]
    assert result.labels == 96
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.training


def test_what_is_reported_is_what_the_returned_model_does(student, banks):
    result = run(student, banks, ema=0.9)
    loss, metrics = evaluate(result.model, banks[1])
    accuracy = metrics["accuracy"]
    assert (loss, accuracy) == (result.loss, result.accuracy)
    ids = torch.arange(60)
    with torch.no_grad():
        guesses = result.model(banks[1].pixels(ids)).argmax(1)
    assert accuracy == pytest.approx((guesses == banks[1].labels).float().mean().item())
    assert [row["step"] for row in result.curve] == [3, 6, 9, 12]


def test_an_interrupted_run_goes_on_bit_for_bit(student, banks, tmp_path):
    everything = {
        "mixup": 0.4,
        "cutmix": 1.0,
        "crop": 2,
        "flip": True,
        "resized_crop": 0.5,
        "ema": 0.9,
        "label_smoothing": 0.1,
        "checkpoint_every": 3,
    }
    whole = run(student, banks, **everything)
    asked = iter([False] * 4 + [True])
    with pytest.raises(Stopped, match="step 5 of 12"):
        run(student, banks, tmp_path, interrupted=lambda: next(asked), **everything)
    torch.rand(11)  # whatever else the process draws
    resumed = run(student, banks, tmp_path, resume=True, **everything)
    assert equal(resumed, whole)
    assert resumed.curve == whole.curve


def test_other_settings_or_weights_do_not_go_on(student, banks, tmp_path):
    run(student, banks, tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001, now 0\.01"):
        run(student, banks, tmp_path, resume=True, learning_rate=0.01)
    other = copy.deepcopy(student)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="other weights"):
        run(other, banks, tmp_path, resume=True)


def test_a_frozen_student_keeps_its_weights_and_statistics(student, banks):
    result = run(student, banks, frozen=True)
    state = result.model.backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    moved = run(student, banks).model.backbone.state_dict()
    assert not torch.equal(moved["stage1.0.weight"], student.state_dict()["stage1.0.weight"])


def test_only_the_chosen_labels_are_used(student, banks):
    train, heldout = banks
    chosen = labelled_subset(train.labels, 40, SETTINGS["seed"])
    others = torch.ones(len(train), dtype=torch.bool)
    others[chosen] = False
    first = run(student, (train, heldout))
    images = train.images.clone()
    images[others] = 0
    second = run(student, (type(train)(train.name, images, train.labels, train.classes), heldout))
    assert equal(first, second)


@pytest.mark.parametrize("schedule", ["cosine", "multistep", "constant"])
def test_schedules_follow_their_formula(schedule):
    config = FinetuneConfig(schedule=schedule, warmup=0.1)
    factors = [rate_factor(config, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    expected = {
        "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * (step - 10) / 90),
        "multistep": lambda step: 1 if step < 50 else 0.1 if step < 75 else 0.01,
        "constant": lambda step: 1,
    }[schedule]
    assert factors[10:] == pytest.approx([expected(step) for step in range(10, 100)])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optimizer": "admw"}, "Did you mean 'adamw'"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0 given"),
        ({"ema": 1.0}, "ema: 1.0 given; it must be 0 or more and below 1"),
        ({"labels": "ten"}, "labels: 'ten' given"),
        ({"nesterov": True}, "nesterov: it needs optimizer 'sgd'"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        FinetuneConfig(**settings)


def test_a_loss_that_is_not_finite_stops_with_a_sentence(student, banks):
    with pytest.raises(ValueError, match="try a lower learning_rate"):
        run(student, banks, optimizer="sgd", learning_rate=1e12, gradient_clip=0.0, warmup=0.0)
