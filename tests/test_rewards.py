"""Rewards against linear algebra and autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from repfusion_env.config import RewardConfig
from repfusion_env.losses import DistillationLoss
from repfusion_env.rewards import (
    Measurement,
    look_ahead,
    student,
    student_gain,
    student_lookahead,
    teacher_probe,
)
from students import Projection

LANES, WIDTH, CLASSES = 5, 6, 4


def _measurement(widths, losses, dense=False, seed=0, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projections = [Projection(WIDTH, width).double() for width in widths]
        tail = (2, 3) if dense else ()
        features = torch.randn(LANES, WIDTH, *tail, dtype=torch.float64)
        teacher = [torch.randn(LANES, width, *tail, dtype=torch.float64) for width in widths]
        head = torch.randn(CLASSES, WIDTH, dtype=torch.float64)
        before, after, probe = torch.rand(3, LANES, dtype=torch.float64)
    labels = torch.arange(LANES) % CLASSES

    def task_losses(moved):
        pooled = moved.mean((2, 3)) if moved.ndim == 4 else moved
        return F.cross_entropy(pooled @ head.T, labels, reduction="none")

    return Measurement(
        student=features,
        teacher=teacher,
        projections=projections,
        loss=DistillationLoss(losses),
        task_losses=task_losses,
        loss_before=before,
        loss_after=after,
        probe_loss=probe,
        config=RewardConfig(**settings),
    )


def _damped_move(measured, h, z):
    """The move ``h - J^T (J J^T + lambda I)^-1 (P(h) - z)`` of one vector, layers stacked."""
    J = np.concatenate([p.weight.detach().numpy() for p in measured.projections])
    b = np.concatenate([p.bias.detach().numpy() for p in measured.projections])
    gram = J @ J.T + measured.config.damping * np.eye(len(J))
    return h - J.T @ np.linalg.solve(gram, J @ h + b - z)


@pytest.mark.parametrize("widths", [(3,), (9,), (2, 3), (6, 5)])
@pytest.mark.parametrize("loss", ["hint", "l1"])
def test_squared_residuals_move_by_damped_gauss_newton(widths, loss):
    measured = _measurement(widths, {loss: 1.0}, damping=0.1)
    z = torch.cat(measured.teacher, 1).numpy()
    expected = [_damped_move(measured, h, z[n]) for n, h in enumerate(measured.student.numpy())]
    np.testing.assert_allclose(look_ahead(measured).detach().numpy(), expected, rtol=1e-8)


def test_dense_features_make_the_same_move_at_each_position():
    measured = _measurement((3, 5), {"hint": 1.0}, dense=True)
    moved = look_ahead(measured).detach().numpy()
    h, z = measured.student.numpy(), torch.cat(measured.teacher, 1).numpy()
    for n, i, j in np.ndindex(LANES, 2, 3):
        expected = _damped_move(measured, h[n, :, i, j], z[n, :, i, j])
        np.testing.assert_allclose(moved[n, :, i, j], expected, rtol=1e-8)


def test_without_damping_the_moved_feature_projects_onto_the_teachers():
    measured = _measurement((3, 2), {"hint": 1.0}, damping=1e-12)
    moved = look_ahead(measured)
    for projection, z in zip(measured.projections, measured.teacher, strict=True):
        np.testing.assert_allclose(projection(moved).detach(), z, atol=1e-6)


def test_the_lookahead_reward_is_minus_the_heads_loss_at_the_moved_feature():
    measured = _measurement((3,), {"hint": 1.0})
    expected = -measured.task_losses(look_ahead(measured))
    assert torch.equal(student_lookahead.compute(measured), expected)
    assert not torch.allclose(expected, -measured.task_losses(measured.student))


def _cosine_loss(measured, h, n):
    """Number of residuals times the summed cosine distance over layers of one lane."""
    total, residuals = 0.0, 0
    for projection, z in zip(measured.projections, measured.teacher, strict=True):
        p = projection.weight.detach() @ h + projection.bias.detach()
        total = total + 1 - (p @ z[n]) / (p.norm() * z[n].norm())
        residuals += len(z[n])
    return total * residuals


@pytest.mark.parametrize("lookahead", ["gauss_newton", "gradient"])
def test_other_losses_move_along_their_gradient(lookahead):
    measured = _measurement((3, 4), {"cosine": 1.0}, lookahead=lookahead, damping=0.3, eta=0.7)
    moved = look_ahead(measured).detach()
    for n in range(LANES):
        h = measured.student[n].clone().requires_grad_()
        loss = _cosine_loss(measured, h, n)
        (g,) = torch.autograd.grad(loss, h)
        step = 2 * loss / (g @ g + 2 * 0.3 * loss) if lookahead == "gauss_newton" else 0.7
        np.testing.assert_allclose(moved[n], (h - step * g).detach(), rtol=1e-8)


def test_the_gradient_move_of_hint_is_independent_of_the_teachers_width():
    measured = _measurement((4,), {"hint": 1.0}, lookahead="gradient", eta=0.25)
    (projection,), (z,) = measured.projections, measured.teacher
    W = projection.weight.detach()
    residual = projection(measured.student).detach() - z
    expected = measured.student - 0.25 * 2 * residual @ W  # gradient of the summed squares
    np.testing.assert_allclose(look_ahead(measured).detach(), expected, rtol=1e-8)


@pytest.mark.parametrize("losses", [{"hint": 1.0}, {"cosine": 1.0}, {"normalized_l2": 1.0}])
@pytest.mark.parametrize("lookahead", ["gauss_newton", "gradient"])
@pytest.mark.parametrize("dense", [False, True])
def test_another_lanes_timestep_leaves_this_lanes_reward_alone(losses, lookahead, dense):
    measured = _measurement((3,), losses, dense=dense, lookahead=lookahead)
    rewards = student_lookahead.compute(measured)
    measured.teacher[0][2] += 1.0
    changed = student_lookahead.compute(measured)
    others = [0, 1, 3, 4]
    assert torch.equal(rewards[others], changed[others])
    assert rewards[2] != changed[2]


def test_an_angle_loss_falls_when_one_lane_moves_and_the_others_stay():
    measured = _measurement((3,), {"rkd_angle": 1.0}, lookahead="gradient", eta=1e-4)
    moved = look_ahead(measured)

    def loss(features, lane):
        return measured.loss(measured.projections[0](features), measured.teacher[0])[lane]

    for lane in range(LANES):
        alone = measured.student.clone()
        alone[lane] = moved[lane]
        assert loss(alone, lane) < loss(measured.student, lane)


def test_a_distance_loss_moves_each_lane_against_fixed_others_and_their_fixed_mean():
    measured = _measurement((3,), {"rkd_distance": 1.0}, lookahead="gradient", eta=1.0)
    (projection,), (z,) = measured.projections, measured.teacher
    points = projection(measured.student).detach()

    def distances(a, b):
        return (a[:, None] - b).square().sum(-1).sqrt()

    student_mean = distances(points, points).sum() / (LANES * (LANES - 1))
    relative = distances(z, z) / (distances(z, z).sum() / (LANES * (LANES - 1)))
    moved = look_ahead(measured).detach()
    for lane in range(LANES):
        others = [n for n in range(LANES) if n != lane]
        h = measured.student[lane].clone().requires_grad_()
        here = distances(projection(h[None]), points[others])[0] / student_mean
        loss = F.huber_loss(here, relative[lane, others], reduction="sum") / LANES
        (g,) = torch.autograd.grad(loss, h)
        expected = measured.student[lane] - 3 * g  # three residuals: the teacher's width
        np.testing.assert_allclose(moved[lane], expected, rtol=1e-7)


def test_a_matched_feature_stays_where_it_is():
    for losses in ({"hint": 1.0}, {"cosine": 1.0}, {"rkd_distance": 1.0}):
        measured = _measurement((3,), losses)
        measured.teacher[0][:] = measured.projections[0](measured.student).detach()
        moved = look_ahead(measured).detach()
        np.testing.assert_allclose(moved, measured.student, atol=1e-6)


def test_the_other_rewards_are_measured_losses():
    measured = _measurement((3,), {"hint": 1.0})
    assert torch.equal(student.compute(measured), -measured.loss_after)
    expected = measured.loss_before - measured.loss_after
    assert torch.equal(student_gain.compute(measured), expected)
    assert torch.equal(teacher_probe.compute(measured), -measured.probe_loss)
