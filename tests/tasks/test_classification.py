from __future__ import annotations

import numpy as np
import torch

from repfusion_env.config_loading import load_config
from repfusion_env.data.bank import ImageBank
from repfusion_env.tasks.classification import ClassificationTask


def _task() -> tuple[ClassificationTask, ImageBank]:
    bank = ImageBank(
        "three",
        torch.zeros(6, 1, 4, 4, dtype=torch.uint8),
        torch.tensor([0, 1, 2, 2, 1, 0]),
        ("a", "b", "c"),
    )
    return ClassificationTask(load_config("digits"), bank), bank


def test_losses_are_cross_entropies_in_nats_even_of_half_precision_outputs():
    task, _ = _task()
    outputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 4
    targets = torch.tensor([0, 2, 1, 1, 0])
    logits = outputs.double().numpy()
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(5), targets.numpy()]
    np.testing.assert_allclose(task.losses(outputs, targets), expected, rtol=1e-5, atol=1e-6)
    half = task.losses(outputs.bfloat16(), targets)
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half, expected, atol=0.1)


def test_the_largest_logit_decides():
    task, _ = _task()
    outputs = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    assert task.correct(outputs, torch.tensor([1, 1])).tolist() == [True, False]


def test_targets_are_the_banks_labels():
    task, bank = _task()
    assert task.targets(bank, torch.tensor([3, 0, 3])).tolist() == [2, 0, 2]


def test_heads_are_linear_or_have_three_layers():
    task, _ = _task()
    linear, deep = task.head([(8, 1, 1)]), task.head([(8, 1, 1)], 5)
    assert linear(torch.zeros(2, 8)).shape == deep(torch.zeros(2, 8)).shape == (2, 3)
    assert sum(isinstance(m, torch.nn.Linear) for m in linear.modules()) == 1
    assert sum(isinstance(m, torch.nn.Linear) for m in deep.modules()) == 3


def test_the_metric_is_the_part_of_all_images_that_is_right():
    task, _ = _task()
    metric = task.metric()
    outputs = torch.eye(3)[[0, 1, 2, 2]]
    metric.update(outputs, torch.tensor([0, 1, 1, 2]))
    metric.update(outputs[:1], torch.tensor([2]))
    assert metric.compute() == {"accuracy": 3 / 5}
    assert task.predict(outputs).tolist() == [0, 1, 2, 2]


def test_a_picture_carries_the_name_of_its_class():
    task, _ = _task()
    image = np.full((4, 4, 3), 200, np.uint8)
    first, second = (task.draw(image, torch.tensor(label), 64) for label in (0, 2))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert (first[:32] == 200).all() and (first != second).any()
