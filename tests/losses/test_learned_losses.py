"""Losses with networks and variances of their own: VID and factor transfer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import distributions
from torch.nn import functional as F

from repfusion_env.losses import FeatureShape
from repfusion_env.losses.factor_transfer import FactorTransfer
from repfusion_env.losses.vid import VariationalInformation

BATCH, WIDTH, SIZE = 4, 6, (3, 2)
DENSE = [False, True]


def _shape(dense):
    return FeatureShape(WIDTH, dense, SIZE if dense else (1, 1), 10)


def _pair(dense):
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, WIDTH, *SIZE) if dense else (BATCH, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def _built(kind, dense, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(_shape(dense), **options).double()


def _vid(dense):
    loss = _built(VariationalInformation, dense, initial_variance=2.0, floor=0.01)
    with torch.no_grad():
        loss.alpha.copy_(torch.linspace(-3, 2, WIDTH, dtype=torch.float64))
    return loss


@pytest.mark.parametrize("dense", DENSE)
def test_vid_is_the_squared_difference_over_twice_the_channels_variance(dense):
    student, teacher = _pair(dense)
    loss = _vid(dense)
    variance = np.log1p(np.exp(np.linspace(-3, 2, WIDTH))) + 0.01
    for value, s, t in zip(loss(student, teacher), student.numpy(), teacher.numpy(), strict=True):
        terms = [(s[c] - t[c]) ** 2 / (2 * variance[c]) for c in range(WIDTH)]
        np.testing.assert_allclose(value.item(), np.mean(terms), rtol=1e-9)
    assert (loss(teacher, teacher) == 0).all()


@pytest.mark.parametrize("dense", DENSE)
def test_vids_gradients_are_those_of_the_gaussian_likelihood(dense):
    student, teacher = (x.requires_grad_() for x in _pair(dense))
    loss = _vid(dense)
    inputs = (student, loss.alpha)
    found = torch.autograd.grad(loss(student, teacher).mean(), inputs)
    variance = (F.softplus(loss.alpha) + 0.01).view(WIDTH, *[1] * (student.ndim - 2))
    likelihood = distributions.Normal(student, variance.sqrt()).log_prob(teacher)
    expected = torch.autograd.grad(-likelihood.mean(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_vid_learns_the_variance_of_each_channel():
    generator = torch.Generator().manual_seed(0)
    deviation = torch.tensor([0.1, 1.0, 3.0])
    teacher = deviation * torch.randn(2000, 3, generator=generator)
    loss = VariationalInformation(FeatureShape(3))
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(torch.zeros_like(teacher), teacher).mean().backward()
        optimizer.step()
    measured = teacher.square().mean(0)
    torch.testing.assert_close(loss.variance.detach(), measured, rtol=0.02, atol=0)


def test_vid_starts_at_its_initial_variance_which_exceeds_the_floor():
    loss = VariationalInformation(FeatureShape(3), initial_variance=0.02, floor=0.01)
    np.testing.assert_allclose(loss.variance.detach(), 0.02, rtol=1e-5)
    with pytest.raises(ValueError, match=r"initial_variance: 0\.1 given; .* floor, 0\.5"):
        VariationalInformation(FeatureShape(3), initial_variance=0.1, floor=0.5)


def _leaky(x):
    return np.where(x > 0, x, 0.1 * x)


def _through(layers, x):
    """Three layers on one sample in plain loops: (F,) or (F, H, W) -> factors."""
    weights = [
        (m.weight.detach().numpy(), m.bias.detach().numpy()) for m in layers if hasattr(m, "weight")
    ]
    for number, (weight, bias) in enumerate(weights):
        if x.ndim == 1:
            x = weight @ x + bias
        else:
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            x = np.array(
                [
                    [
                        [
                            (kernel * padded[:, i : i + 3, j : j + 3]).sum() + b
                            for j in range(x.shape[2])
                        ]
                        for i in range(x.shape[1])
                    ]
                    for kernel, b in zip(weight, bias, strict=True)
                ]
            )
        x = _leaky(x) if number < len(weights) - 1 else x
    return x


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dense", DENSE)
def test_factor_transfer_compares_factors_of_unit_length(dense, power):
    student, teacher = _pair(dense)
    loss = _built(FactorTransfer, dense, rate=0.5, power=power)
    values = loss(student, teacher)
    assert values.shape == (BATCH,)
    for value, s, t in zip(values, student.numpy(), teacher.numpy(), strict=True):
        mine = _through(loss.translator, s).ravel()
        theirs = _through(loss.encoder, t).ravel()
        assert len(mine) == WIDTH // 2 * (SIZE[0] * SIZE[1] if dense else 1)
        difference = mine / np.linalg.norm(mine) - theirs / np.linalg.norm(theirs)
        np.testing.assert_allclose(value.item(), np.mean(np.abs(difference) ** power), rtol=1e-9)


@pytest.mark.parametrize("dense", DENSE)
def test_factor_transfer_is_0_where_the_factors_match_and_moves_each_sample_alone(dense):
    student, teacher = _pair(dense)
    loss = _built(FactorTransfer, dense)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher)[1], student)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2, 3]].abs().max() == 0
    loss.translator.load_state_dict(loss.encoder.state_dict())
    assert (loss(teacher, teacher) == 0).all()


@pytest.mark.parametrize("dense", DENSE)
def test_the_paraphraser_learns_by_its_reconstruction_alone(dense):
    student, teacher = _pair(dense)
    loss = _built(FactorTransfer, dense)
    loss(student, teacher).mean().backward()
    assert all(p.grad.abs().max() > 0 for p in loss.translator.parameters())
    paraphraser = [*loss.encoder.parameters(), *loss.decoder.parameters()]
    assert all(p.grad is None for p in paraphraser)
    loss.zero_grad()
    reconstructed = [_through(loss.decoder, _through(loss.encoder, t)) for t in teacher.numpy()]
    value = loss.auxiliary(teacher)
    expected = np.mean((np.array(reconstructed) - teacher.numpy()) ** 2)
    np.testing.assert_allclose(value.item(), expected, rtol=1e-9)
    value.backward()
    assert all(p.grad.abs().max() > 0 for p in paraphraser)
    assert all(p.grad is None for p in loss.translator.parameters())


@pytest.mark.parametrize("dense", DENSE)
@pytest.mark.parametrize("kind", [VariationalInformation, FactorTransfer])
def test_gradients_are_finite_where_features_match_or_vanish(kind, dense):
    _, teacher = _pair(dense)
    loss = _built(kind, dense)
    for start in (teacher, torch.zeros_like(teacher)):
        student = start.clone().requires_grad_()
        loss(student, teacher).sum().backward()
        assert student.grad.norm() < 1e6
