"""Rewards against linear algebra and autograd in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from repfusion_env.config import DistillationConfig, RewardConfig
from repfusion_env.losses import DistillationLoss, FeatureShape
from repfusion_env.rewards import (
    Measurement,
    look_ahead,
    student,
    student_gain,
    student_lookahead,
    teacher_probe,
)
from students.projection import LinearProjections

LANES, WIDTH, CLASSES = 5, 6, 4


class _Project:
    """Projects the only feature; the single layers' projections can be asked for."""

    def __init__(self, projections):
        self.projections = projections

    def __call__(self, features):
        return self.projections(*features)

    def __getitem__(self, layer):
        return self.projections[layer]


def _measurement(widths, losses, dense=False, seed=0, weights=None, chosen=None, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages, layers = [(WIDTH, 2, 3)], [(width, 2, 3) for width in widths]
        projections = LinearProjections(stages, layers).double()
        shapes = [FeatureShape(width, dense, (2, 3) if dense else (1, 1)) for width in widths]
        loss = DistillationLoss(DistillationConfig(losses=losses), shapes)
        tail = (2, 3) if dense else ()
        features = torch.randn(LANES, WIDTH, *tail, dtype=torch.float64)
        teacher = [torch.randn(LANES, width, *tail, dtype=torch.float64) for width in widths]
        head = torch.randn(CLASSES, WIDTH, dtype=torch.float64)
        before, after, probe = torch.rand(3, LANES, dtype=torch.float64)
    labels = torch.arange(LANES) % CLASSES

    def task_losses(features):
        (moved,) = features
        pooled = moved.mean((2, 3)) if moved.ndim == 4 else moved
        return F.cross_entropy(pooled @ head.T, labels, reduction="none")

    return Measurement(
        student=[features],
        teacher=teacher,
        project=_Project(projections),
        jacobians=projections.jacobians(),
        loss=loss,
        task_losses=task_losses,
        loss_before=before,
        loss_after=after,
        probe_loss=probe,
        config=RewardConfig(**settings),
        weights=weights,
        chosen=chosen,
    )


def _moved(measured):
    """Where the only feature goes."""
    (moved,) = look_ahead(measured)
    return moved


def _feature(measured):
    """The only feature."""
    (feature,) = measured.student
    return feature


def _damped_move(measured, h, z):
    """The move ``h - J^T (J J^T + lambda I)^-1 (P(h) - z)`` of one vector, layers stacked."""
    J = np.concatenate([p.weight.detach().numpy() for p in measured.project])
    b = np.concatenate([p.bias.detach().numpy() for p in measured.project])
    gram = J @ J.T + measured.config.damping * np.eye(len(J))
    return h - J.T @ np.linalg.solve(gram, J @ h + b - z)


@pytest.mark.parametrize("widths", [(3,), (9,), (2, 3), (6, 5)])
@pytest.mark.parametrize("loss", ["hint", "l1"])
def test_squared_residuals_move_by_damped_gauss_newton(widths, loss):
    measured = _measurement(widths, {loss: 1.0}, damping=0.1)
    z = torch.cat(measured.teacher, 1).numpy()
    expected = [_damped_move(measured, h, z[n]) for n, h in enumerate(_feature(measured).numpy())]
    np.testing.assert_allclose(_moved(measured).detach().numpy(), expected, rtol=1e-8)


def test_dense_features_make_the_same_move_at_each_position():
    measured = _measurement((3, 5), {"hint": 1.0}, dense=True)
    moved = _moved(measured).detach().numpy()
    h, z = _feature(measured).numpy(), torch.cat(measured.teacher, 1).numpy()
    for n, i, j in np.ndindex(LANES, 2, 3):
        expected = _damped_move(measured, h[n, :, i, j], z[n, :, i, j])
        np.testing.assert_allclose(moved[n, :, i, j], expected, rtol=1e-8)


def test_without_damping_the_moved_feature_projects_onto_the_teachers():
    measured = _measurement((3, 2), {"hint": 1.0}, damping=1e-12)
    moved = _moved(measured)
    for projection, z in zip(measured.project, measured.teacher, strict=True):
        np.testing.assert_allclose(projection(moved).detach(), z, atol=1e-6)


def test_the_lookahead_reward_is_minus_the_heads_loss_at_the_moved_feature():
    measured = _measurement((3,), {"hint": 1.0})
    expected = -measured.task_losses([_moved(measured)])
    assert torch.equal(student_lookahead.compute(measured), expected)
    assert not torch.allclose(expected, -measured.task_losses([_feature(measured)]))


def _cosine_loss(measured, h, n):
    """Number of residuals times the summed cosine distance over layers of one lane."""
    total, residuals = 0.0, 0
    for projection, z in zip(measured.project, measured.teacher, strict=True):
        p = projection.weight.detach() @ h + projection.bias.detach()
        total = total + 1 - (p @ z[n]) / (p.norm() * z[n].norm())
        residuals += len(z[n])
    return total * residuals


@pytest.mark.parametrize("lookahead", ["gauss_newton", "gradient"])
def test_other_losses_move_along_their_gradient(lookahead):
    measured = _measurement((3, 4), {"cosine": 1.0}, lookahead=lookahead, damping=0.3, eta=0.7)
    moved = _moved(measured).detach()
    for n in range(LANES):
        h = _feature(measured)[n].clone().requires_grad_()
        loss = _cosine_loss(measured, h, n)
        (g,) = torch.autograd.grad(loss, h)
        step = 2 * loss / (g @ g + 2 * 0.3 * loss) if lookahead == "gauss_newton" else 0.7
        np.testing.assert_allclose(moved[n], (h - step * g).detach(), rtol=1e-8)


def test_the_gradient_move_of_hint_is_independent_of_the_teachers_width():
    measured = _measurement((4,), {"hint": 1.0}, lookahead="gradient", eta=0.25)
    (projection,), (z,) = measured.project, measured.teacher
    W = projection.weight.detach()
    residual = projection(_feature(measured)).detach() - z
    expected = _feature(measured) - 0.25 * 2 * residual @ W  # gradient of the summed squares
    np.testing.assert_allclose(_moved(measured).detach(), expected, rtol=1e-8)


@pytest.mark.parametrize("losses", [{"hint": 1.0}, {"cosine": 1.0}])
@pytest.mark.parametrize("lookahead", ["gauss_newton", "gradient"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_chosen_layer_moves_its_lane_as_if_it_were_the_only_one(losses, lookahead, dense):
    chosen = torch.tensor([2, 0, 1, 0, 2])
    measured = _measurement((3, 7, 4), losses, dense=dense, lookahead=lookahead, chosen=chosen)
    moved = _moved(measured).detach()
    for layer in range(3):
        alone = replace(
            measured,
            teacher=[measured.teacher[layer]],
            project=lambda h, layer=layer: [measured.project[layer](*h)],
            jacobians=[measured.jacobians[layer]],
            loss=_only(measured.loss, layer),
            chosen=None,
        )
        lanes = chosen == layer
        np.testing.assert_allclose(moved[lanes], _moved(alone).detach()[lanes], rtol=1e-9)


def _only(loss, layer):
    """The loss of one layer."""
    only = copy.deepcopy(loss)
    only.layers = only.layers[layer : layer + 1]
    return only


@pytest.mark.parametrize("widths", [(2, 3), (6, 5)])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_weighted_layers_move_to_the_minimum_of_their_weighted_squares(widths, dense, each):
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(LANES if each else 1, 2, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum(1, keepdim=True)
    given = weights if each else weights[0]
    measured = _measurement(widths, {"hint": 1.0}, dense=dense, weights=given, damping=0.2)
    moved = _moved(measured).detach()
    step = (moved - _feature(measured)).requires_grad_()
    # Half the weighted squares of the linear model plus the damping: its gradient is 0 there.
    total = 0.1 * step.square().sum()
    after, rows = measured.project([_feature(measured) + step]), weights.expand(LANES, 2)
    for layer, (p, z) in enumerate(zip(after, measured.teacher, strict=True)):
        squares = (p - z).square().flatten(1).sum(1)
        total = total + 0.5 * (2 * rows[:, layer] * squares).sum()
    (gradient,) = torch.autograd.grad(total, step)
    assert gradient.abs().max() < 1e-9 < step.abs().max()


def test_weights_of_the_layers_scale_the_gradient_move():
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    measured = _measurement((3, 4), {"cosine": 1.0}, weights=weights, lookahead="gradient", eta=0.5)
    h = _feature(measured).clone().requires_grad_()
    total = sum(
        2 * weight * (1 - F.cosine_similarity(p, z)).sum()
        for weight, p, z in zip(weights, measured.project([h]), measured.teacher, strict=True)
    )
    (g,) = torch.autograd.grad(total, h)
    expected = _feature(measured) - 0.5 * 7 * g
    np.testing.assert_allclose(_moved(measured).detach(), expected, rtol=1e-9)


def test_behind_a_projection_without_jacobians_hint_moves_along_its_gradient():
    measured = _measurement((3,), {"hint": 1.0}, damping=0.3)
    curved = replace(measured, project=lambda h: [measured.project[0](*h).tanh()], jacobians=None)
    h = _feature(measured).clone().requires_grad_()
    losses = 3 * (measured.project[0](h).tanh() - measured.teacher[0]).square().mean(1)
    (g,) = torch.autograd.grad(losses.sum(), h)
    scale = 2 * losses / (g.square().sum(1) + 2 * 0.3 * losses)
    expected = (h - scale[:, None] * g).detach()
    np.testing.assert_allclose(_moved(curved).detach(), expected, rtol=1e-9)


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
    moved = _moved(measured)

    def loss(features, lane):
        return measured.loss.layer(0, measured.project[0](features), measured.teacher[0])[lane]

    for lane in range(LANES):
        alone = _feature(measured).clone()
        alone[lane] = moved[lane]
        assert loss(alone, lane) < loss(_feature(measured), lane)


def test_a_distance_loss_moves_each_lane_against_fixed_others_and_their_fixed_mean():
    measured = _measurement((3,), {"rkd_distance": 1.0}, lookahead="gradient", eta=1.0)
    (projection,), (z,) = measured.project, measured.teacher
    points = projection(_feature(measured)).detach()

    def distances(a, b):
        return (a[:, None] - b).square().sum(-1).sqrt()

    student_mean = distances(points, points).sum() / (LANES * (LANES - 1))
    relative = distances(z, z) / (distances(z, z).sum() / (LANES * (LANES - 1)))
    moved = _moved(measured).detach()
    for lane in range(LANES):
        others = [n for n in range(LANES) if n != lane]
        h = _feature(measured)[lane].clone().requires_grad_()
        here = distances(projection(h[None]), points[others])[0] / student_mean
        loss = F.huber_loss(here, relative[lane, others], reduction="sum") / LANES
        (g,) = torch.autograd.grad(loss, h)
        expected = _feature(measured)[lane] - 3 * g  # three residuals: the teacher's width
        np.testing.assert_allclose(moved[lane], expected, rtol=1e-7)


def test_a_matched_feature_stays_where_it_is():
    for losses in ({"hint": 1.0}, {"cosine": 1.0}, {"rkd_distance": 1.0}):
        measured = _measurement((3,), losses)
        measured.teacher[0][:] = measured.project[0](_feature(measured)).detach()
        moved = _moved(measured).detach()
        np.testing.assert_allclose(moved, _feature(measured), atol=1e-6)


def test_the_other_rewards_are_measured_losses():
    measured = _measurement((3,), {"hint": 1.0})
    assert torch.equal(student.compute(measured), -measured.loss_after)
    expected = measured.loss_before - measured.loss_after
    assert torch.equal(student_gain.compute(measured), expected)
    assert torch.equal(teacher_probe.compute(measured), -measured.probe_loss)


@pytest.mark.parametrize("given", ["none", "shared", "each", "chosen"])
def test_layers_of_several_stages_move_each_stage_as_if_it_were_alone(given):
    """Two stages with two layers and one; every stage solves its own damped least squares."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stages = [random(LANES, 4, 4, 4), random(LANES, 6, 2, 2)]
    sources, widths = (1, 0, 1), (3, 2, 5)
    weights = [random(w, stages[s].shape[1]) for w, s in zip(widths, sources, strict=True)]
    teacher = [random(LANES, w, *stages[s].shape[2:]) for w, s in zip(widths, sources, strict=True)]
    shares = {
        "none": None,
        "shared": torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        "each": torch.rand(LANES, 3, generator=generator, dtype=torch.float64),
        "chosen": None,
    }[given]
    chosen = torch.tensor([0, 1, 2, 1, 0]) if given == "chosen" else None

    def project(features):
        pairs = zip(weights, sources, strict=True)
        return [torch.einsum("fs,nshw->nfhw", w, features[source]) for w, source in pairs]

    measured = replace(
        _measurement((3,), {"hint": 1.0}, dense=True, damping=0.3),
        student=stages,
        teacher=teacher,
        project=project,
        jacobians=weights,
        sources=sources,
        weights=shares,
        chosen=chosen,
    )
    moved = look_ahead(measured)
    for lane in range(LANES):
        for stage, h in enumerate(stages):
            layers = [i for i in range(3) if sources[i] == stage]
            if chosen is not None:
                layers = [i for i in layers if i == chosen[lane]]
            if not layers:
                np.testing.assert_array_equal(moved[stage][lane], h[lane])
                continue
            row = torch.full((3,), 1 / 3) if shares is None else shares.expand(LANES, 3)[lane]
            roots = [1.0 if shares is None else math.sqrt(3 * float(row[i])) for i in layers]
            J = np.concatenate([r * weights[i].numpy() for i, r in zip(layers, roots, strict=True)])
            gram = J @ J.T + 0.3 * np.eye(len(J))
            for y, x in np.ndindex(*h.shape[2:]):
                here = h[lane, :, y, x].numpy()
                parts = zip(layers, roots, strict=True)
                z = np.concatenate([r * teacher[i][lane, :, y, x].numpy() for i, r in parts])
                expected = here - J.T @ np.linalg.solve(gram, J @ here - z)
                np.testing.assert_allclose(moved[stage][lane, :, y, x], expected, rtol=1e-7)
