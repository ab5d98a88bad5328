"""Losses against the papers' formulas in float64 numpy, written with plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from repfusion_env.registry import LOSSES, look_up

POOLED = ("hint", "l1", "normalized_l2", "cosine", "rkd_distance", "rkd_angle")


def _pair(dense, seed=0, batch=4, width=3):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, width, 2, 3) if dense else (batch, width)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


def _unit(x):
    return x / np.linalg.norm(x)


def _huber(x):
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def _relative_distances(points):
    n = len(points)
    d = np.array([[np.linalg.norm(points[i] - points[j]) for j in range(n)] for i in range(n)])
    return d / (d.sum() / (n * (n - 1)))  # eq. 5: mean over all pairs of different points


def _rkd_distance(student, teacher):
    a, b = _relative_distances(student), _relative_distances(teacher)
    n = len(student)
    return [np.mean([_huber(a[i, j] - b[i, j]) for j in range(n)]) for i in range(n)]


def _rkd_angle(student, teacher):
    def angle(points, i, j, k):
        if i in (j, k):
            return 0.0
        return float(_unit(points[j] - points[i]) @ _unit(points[k] - points[i]))

    n = len(student)
    pairs = list(itertools.product(range(n), repeat=2))
    return [
        np.mean([_huber(angle(student, i, j, k) - angle(teacher, i, j, k)) for j, k in pairs])
        for i in range(n)
    ]


def _reference(name, student, teacher):
    """Loss per sample of (B, F) or (B, F, H, W) arrays."""
    dense = student.ndim == 4
    if name in ("rkd_distance", "rkd_angle"):
        relate = {"rkd_distance": _rkd_distance, "rkd_angle": _rkd_angle}[name]
        if not dense:
            return relate(student, teacher)
        return [
            np.mean(relate(s.reshape(len(s), -1).T, t.reshape(len(t), -1).T))
            for s, t in zip(student, teacher, strict=True)
        ]
    values = []
    for s, t in zip(student, teacher, strict=True):
        if name == "attention":
            a, b = (_unit((x**2).mean(0).ravel()) for x in (s, t))
            values.append(np.mean((a - b) ** 2))
            continue
        points = zip(s.reshape(len(s), -1).T, t.reshape(len(t), -1).T, strict=True)
        per_position = {
            "hint": lambda a, b: np.mean((a - b) ** 2),
            "l1": lambda a, b: np.mean(np.abs(a - b)),
            "normalized_l2": lambda a, b: np.sum((_unit(a) - _unit(b)) ** 2),
            "cosine": lambda a, b: 1 - _unit(a) @ _unit(b),
        }[name]
        values.append(np.mean([per_position(a, b) for a, b in points]))
    return values


CASES = [(name, False) for name in POOLED] + [(name, True) for name in (*POOLED, "attention")]


@pytest.mark.parametrize(("name", "dense"), CASES)
def test_loss_is_its_papers_formula(name, dense):
    student, teacher = _pair(dense)
    loss = look_up("loss", name, LOSSES)
    expected = np.array(_reference(name, student.numpy(), teacher.numpy()))
    value = loss(student, teacher)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9)
    assert value.shape == (4,)
    assert (value > 0).all()
    np.testing.assert_allclose(loss(teacher, teacher).numpy(), 0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.clone().requires_grad_())


@pytest.mark.parametrize(("name", "dense"), CASES)
def test_gradient_is_finite_where_features_match_or_vanish(name, dense):
    _, teacher = _pair(dense)
    loss = look_up("loss", name, LOSSES)
    for start in (teacher, torch.zeros_like(teacher)):
        student = start.clone().requires_grad_()
        loss(student, teacher).sum().backward()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["cosine", "normalized_l2", "attention", "rkd_distance"])
def test_loss_does_not_see_the_features_scale(name):
    _, teacher = _pair(True)
    loss = look_up("loss", name, LOSSES)
    np.testing.assert_allclose(loss(7.0 * teacher, teacher).numpy(), 0, atol=1e-12)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_anchors_let_each_sample_move_alone(name):
    student, teacher = _pair(False)
    loss = look_up("loss", name, LOSSES)
    anchors = (student.clone(), teacher)
    # With the batch as anchors the value is the same; what differs is who can move.
    np.testing.assert_allclose(
        loss(student, teacher, anchors).numpy(), loss(student, teacher).numpy(), rtol=1e-12
    )
    moving = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(moving, teacher, anchors)[1], moving)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2, 3]].abs().max() == 0
    (free,) = torch.autograd.grad(loss(moving, teacher)[1], moving)
    assert free[[0, 2, 3]].abs().max() > 0
