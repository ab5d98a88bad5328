"""Relational losses against the papers' formulas in float64 numpy, written with plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics.pairwise import cosine_similarity, rbf_kernel
from torch.nn import functional as F

from repfusion_env.losses import FeatureShape
from repfusion_env.losses.correlation_congruence import correlation_congruence
from repfusion_env.losses.dist import dist
from repfusion_env.losses.infonce import InfoNCE
from repfusion_env.losses.pkt import pkt
from repfusion_env.losses.similarity_preserving import similarity_preserving

BATCH, WIDTH, SIZE = 5, 4, (2, 3)
infonce = InfoNCE(FeatureShape(WIDTH), temperature=0.3)
LOSSES = {
    "similarity_preserving": similarity_preserving,
    "pkt": pkt,
    "correlation_congruence": correlation_congruence,
    "dist": dist,
    "infonce": infonce,
}
ZERO_AT_A_MATCH = [name for name in LOSSES if name != "infonce"]
DENSE = [False, True]


def _pair(dense, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, WIDTH, *SIZE) if dense else (BATCH, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def _similarity_preserving(s, t):
    def rows(x):
        gram = [[sum(a * b) for b in x] for a in x]
        return np.array([np.array(row) / np.linalg.norm(row) for row in gram])

    return np.linalg.norm(rows(t) - rows(s), "fro") ** 2 / len(s) ** 2  # eq. 3


def _pkt(s, t):
    def conditional(x):
        p = (cosine_similarity(x) + 1) / 2
        np.fill_diagonal(p, 0)
        return p / p.sum(1, keepdims=True)

    p, q = conditional(t), conditional(s)
    others = [np.delete(np.arange(len(s)), i) for i in range(len(s))]
    return np.mean([scipy.stats.entropy(p[i, o], q[i, o]) for i, o in enumerate(others)])


def _correlation_congruence(s, t, gamma=0.4, order=2):
    def kernel(x, y):
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        terms = [(2 * gamma) ** p / math.factorial(p) * (x @ y) ** p for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(terms)

    n = len(s)
    return np.mean(
        [(kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for i in range(n) for j in range(n)]
    )


def _dist(s, t, inter=1.0, intra=1.0):
    def one_minus_pearson(x, y):
        return np.mean(
            [1 - scipy.stats.pearsonr(a, b).statistic for a, b in zip(x, y, strict=True)]
        )

    return inter * one_minus_pearson(s, t) + intra * one_minus_pearson(s.T, t.T)


def _infonce(s, t):
    logits = torch.from_numpy(cosine_similarity(s, t) / 0.3)
    return F.cross_entropy(logits, torch.arange(len(s))).item()


PUBLISHED = {
    "similarity_preserving": _similarity_preserving,
    "pkt": _pkt,
    "correlation_congruence": _correlation_congruence,
    "dist": _dist,
    "infonce": _infonce,
}


def _positions(feature):
    return feature.flatten(1).T.numpy()


@pytest.mark.parametrize("name", LOSSES)
def test_the_batch_mean_is_the_published_loss_among_images(name):
    student, teacher = _pair(False)
    values = LOSSES[name](student, teacher)
    assert values.shape == (BATCH,)
    assert (values > 0).all()
    expected = PUBLISHED[name](student.numpy(), teacher.numpy())
    np.testing.assert_allclose(values.mean().item(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_each_images_value_is_the_published_loss_among_its_positions(name):
    student, teacher = _pair(True)
    values = LOSSES[name](student, teacher)
    expected = [
        PUBLISHED[name](_positions(s), _positions(t)) for s, t in zip(student, teacher, strict=True)
    ]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("dense", DENSE)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_values(name, dense):
    student, teacher = _pair(dense)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), student.requires_grad_())


@pytest.mark.parametrize("dense", DENSE)
@pytest.mark.parametrize("name", ZERO_AT_A_MATCH)
def test_a_match_costs_nothing(name, dense):
    _, teacher = _pair(dense)
    np.testing.assert_allclose(LOSSES[name](teacher, teacher).numpy(), 0, atol=1e-12)


@pytest.mark.parametrize("name", ZERO_AT_A_MATCH)
def test_rounding_takes_no_value_below_0_near_a_match(name):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(300, 64, generator=generator)
    student = teacher + 1e-5 * torch.randn(300, 64, generator=generator)
    assert (LOSSES[name](student, teacher) >= 0).all()


@pytest.mark.parametrize("dense", DENSE)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("start", ["match", "zero", "equal"])
def test_values_and_gradients_stay_moderate_where_features_match_or_vanish(name, dense, start):
    _, teacher = _pair(dense)
    teacher = teacher.float()
    student = {
        "match": teacher.clone(),
        "zero": torch.zeros_like(teacher),
        "equal": torch.ones_like(teacher),
    }[start].requires_grad_()
    values = LOSSES[name](student, teacher)
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.norm() < 1e8


@pytest.mark.parametrize("name", LOSSES)
def test_one_image_alone_has_finite_values_and_gradients(name):
    student, teacher = (x[:1].float() for x in _pair(False))
    student.requires_grad_()
    values = LOSSES[name](student, teacher)
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_anchors_let_each_sample_move_alone(name):
    student, teacher = _pair(False)
    loss, anchors = LOSSES[name], (student.clone(), teacher)
    np.testing.assert_allclose(
        loss(student, teacher, anchors).numpy(), loss(student, teacher).numpy(), rtol=1e-12
    )
    free, fixed = student.clone().requires_grad_(), student.clone().requires_grad_()
    for row in range(BATCH):
        (among_all,) = torch.autograd.grad(loss(free, teacher)[row], free)
        (alone,) = torch.autograd.grad(loss(fixed, teacher, anchors)[row], fixed)
        # Its own part of the gradient of its own row, on both sides of every pair.
        np.testing.assert_allclose(alone[row], among_all[row], rtol=1e-9, atol=1e-12)
        others = [i for i in range(BATCH) if i != row]
        assert alone[others].abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_moved_sample_is_judged_as_if_it_stood_in_the_batch(name):
    student, teacher = _pair(False)
    moved = student + 0.3 * torch.randn(student.shape, dtype=torch.float64)
    values = LOSSES[name](moved, teacher, (student, teacher))
    for row in range(BATCH):
        batch = student.clone()
        batch[row] = moved[row]
        expected = LOSSES[name](batch, teacher)[row].item()
        np.testing.assert_allclose(values[row].item(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_samples_may_stand_among_more_anchors(name):
    student, teacher = _pair(False)
    values = LOSSES[name](student[:2], teacher[:2], (student, teacher))
    np.testing.assert_allclose(values, LOSSES[name](student, teacher)[:2], rtol=1e-12)


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 1), (1.0, 5)])
def test_correlation_congruence_follows_its_options(gamma, order):
    student, teacher = _pair(False)
    value = correlation_congruence(student, teacher, gamma=gamma, order=order).mean().item()
    expected = _correlation_congruence(student.numpy(), teacher.numpy(), gamma, order)
    np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_correlation_congruence_of_high_order_compares_gaussian_kernels():
    student, teacher = _pair(False)
    s, t = (F.normalize(x, dim=1).numpy() for x in (student, teacher))
    expected = np.mean((rbf_kernel(s, gamma=0.7) - rbf_kernel(t, gamma=0.7)) ** 2, axis=1)
    value = correlation_congruence(student, teacher, gamma=0.7, order=30)
    np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_dist_weighs_samples_and_channels():
    student, teacher = _pair(False)
    for inter, intra in ((2.0, 0.0), (0.0, 3.0)):
        value = dist(student, teacher, inter=inter, intra=intra).mean().item()
        expected = _dist(student.numpy(), teacher.numpy(), inter, intra)
        np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_dist_sees_neither_scale_nor_shift():
    _, teacher = _pair(False)
    np.testing.assert_allclose(dist(3.0 * teacher + 2.0, teacher).numpy(), 0, atol=1e-12)


def test_infonce_takes_no_lane_with_the_same_image_for_another():
    student, teacher = _pair(False)
    ids = torch.tensor([7, 3, 7, 9, 3])
    values = infonce(student, teacher, ids=ids).numpy()
    logits = cosine_similarity(student, teacher) / 0.3
    for row, image in enumerate(ids.tolist()):
        keys = [j for j in range(BATCH) if j == row or ids[j] != image]
        expected = -logits[row, row] + np.log(np.exp(logits[row, keys]).sum())
        np.testing.assert_allclose(values[row], expected, rtol=1e-9)
