"""Contrastive representation distillation: its formula, its memory, its draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import gammaln, ive

from repfusion_env.losses import FeatureShape
from repfusion_env.losses.crd import ContrastiveRepresentation

BATCH, WIDTH, IMAGES, EMBEDDING = 3, 5, 7, 6
IDS = torch.tensor([4, 0, 6])


def _crd(seed=0, images=IMAGES, **options):
    options = {"negatives": 100, "temperature": 0.2, "embedding": EMBEDDING, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ContrastiveRepresentation(FeatureShape(WIDTH, images=images), **options).double()


def _pair(seed=0, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]


def _embedded(head, feature):
    raw = head.weight.detach().numpy() @ feature.numpy() + head.bias.detach().numpy()
    return raw / np.linalg.norm(raw)


def _published(loss, student, teacher, image, others, temperature=0.2):
    """The critic with N / M and Z = M times the mean over random directions, in plain loops."""
    s, t = _embedded(loss.student_head, student), _embedded(loss.teacher_head, teacher)
    others = [j for j in others if j != image]
    count, order, scale = len(others), EMBEDDING / 2 - 1, 1 / temperature
    # Mean of exp(scale cos) over the sphere: Gamma(d/2) (2/scale)^(d/2-1) I_{d/2-1}(scale).
    mean = np.exp(gammaln(order + 1) + order * np.log(2 / scale) + scale) * ive(order, scale)

    def h(a, b):
        p = np.exp(a @ b / temperature) / (IMAGES * mean)
        return p / (p + count / IMAGES)

    memory = loss.memory.numpy()
    value = -2 * np.log(h(s, t))
    for j in others:
        value -= np.log(1 - h(s, memory[1, j])) + np.log(1 - h(t, memory[0, j]))
    return value


@pytest.mark.parametrize("ids", [IDS, None], ids=["of-the-bank", "of-none"])
def test_loss_is_the_papers_formula_over_the_whole_bank(ids):
    loss, (student, teacher) = _crd(), _pair()
    values = loss(student, teacher, ids=ids).detach().numpy()
    for row in range(BATCH):
        image = None if ids is None else int(ids[row])
        expected = _published(loss, student[row], teacher[row], image, range(IMAGES))
        np.testing.assert_allclose(values[row], expected, rtol=1e-9)


def test_drawn_negatives_count_as_often_as_they_are_drawn_and_never_the_own_image():
    loss, (student, teacher) = _crd(negatives=5), _pair()
    drawn = loss._draw().tolist()
    assert len(drawn) == 5
    values = loss(student, teacher, ids=IDS).detach().numpy()
    for row in range(BATCH):
        expected = _published(loss, student[row], teacher[row], int(IDS[row]), drawn)
        np.testing.assert_allclose(values[row], expected, rtol=1e-9)


def test_random_directions_average_to_the_constant_in_float64_samples():
    generator = torch.Generator().manual_seed(0)
    random = torch.nn.functional.normalize(torch.randn(200_000, 128, generator=generator), dim=1)
    loss = ContrastiveRepresentation(FeatureShape(WIDTH, images=2))
    measured = (random[:, 0].double() / 0.07).exp().mean().log().item()
    assert loss.log_mean == pytest.approx(measured, abs=0.02)


def test_draws_change_with_the_step_alone_and_are_uniform():
    loss, (student, teacher) = _crd(negatives=6, images=1000), _pair()
    draws = []
    for _ in range(500):
        before = torch.random.get_rng_state()
        first, again = loss._draw(), loss._draw()
        assert torch.equal(first, again)
        assert torch.equal(before, torch.random.get_rng_state())
        draws.append(first)
        loss.remember(student, teacher, IDS, torch.tensor(True))
    every = torch.stack(draws).double()
    assert not torch.equal(draws[0], draws[1])
    assert every.mean().item() == pytest.approx(499.5, abs=4 * 288.7 / 3000**0.5)
    assert every.std().item() == pytest.approx(288.7, rel=0.05)


def test_gradients_reach_both_heads_and_move_each_sample_alone():
    loss, (student, teacher) = _crd(), _pair()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, ids=IDS), student)
    (gradient,) = torch.autograd.grad(loss(student, teacher, ids=IDS)[1], student)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2]].abs().max() == 0
    loss(student, teacher, ids=IDS).mean().backward()
    assert all(p.grad.abs().max() > 0 for p in loss.parameters())


def test_gradient_is_finite_where_features_match_or_vanish():
    loss, (_, teacher) = _crd(), _pair()
    for start in (teacher, torch.zeros_like(teacher)):
        student = start.clone().requires_grad_()
        loss(student, teacher, ids=IDS).sum().backward()
        assert student.grad.norm() < 1e6


def test_memory_moves_towards_the_present_embeddings():
    loss, (student, teacher) = _crd(momentum=0.25), _pair()
    before = loss.memory.numpy().copy()
    loss.remember(student, teacher, IDS, torch.tensor(False))
    for side, head, features in ((0, loss.student_head, student), (1, loss.teacher_head, teacher)):
        for image in range(IMAGES):
            expected = before[side, image]
            if image in IDS.tolist():
                now = _embedded(head, features[IDS.tolist().index(image)])
                mixed = 0.25 * expected + 0.75 * now
                expected = mixed / np.linalg.norm(mixed)
            np.testing.assert_allclose(loss.memory[side, image], expected, rtol=1e-9)


def test_a_skipped_step_leaves_the_memory_alone_even_where_features_are_not_finite():
    loss, (student, teacher) = _crd(), _pair()
    before = loss.memory.clone()
    loss.remember(student * float("nan"), teacher, IDS, torch.tensor(True))
    assert torch.equal(loss.memory, before)


def test_of_samples_of_one_image_the_first_and_newest_is_remembered():
    loss, other = _crd(), _crd()
    student, teacher = _pair()
    loss.remember(student, teacher, torch.tensor([2, 5, 2]), torch.tensor(False))
    other.remember(student[:2], teacher[:2], torch.tensor([2, 5]), torch.tensor(False))
    torch.testing.assert_close(loss.memory, other.memory)


def test_memory_is_no_buffer_yet_saved_restored_and_converted_with_the_rest():
    loss, (student, teacher) = _crd(negatives=4), _pair()
    assert not list(loss.buffers())
    loss.remember(student, teacher, IDS, torch.tensor(False))
    copy = _crd(seed=1, negatives=4)
    assert not torch.equal(copy(student, teacher, ids=IDS), loss(student, teacher, ids=IDS))
    copy.load_state_dict(loss.state_dict())
    assert torch.equal(copy(student, teacher, ids=IDS), loss(student, teacher, ids=IDS))
    saved = loss.memory.clone()
    copy.remember(student, teacher, IDS, torch.tensor(False))
    assert torch.equal(loss.memory, saved)
    assert loss.float().memory.dtype == torch.float32


def test_a_memory_of_another_bank_is_refused():
    with pytest.raises(ValueError, match="is for 7 images by 6, the given one for 9 by 6"):
        _crd().load_state_dict(_crd(images=9).state_dict())


def test_dense_features_are_averaged_first():
    loss, generator = _crd(), torch.Generator().manual_seed(0)
    shape = (BATCH, WIDTH, 2, 3)
    maps = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    pooled = [x.mean((2, 3)) for x in maps]
    torch.testing.assert_close(loss(*maps, ids=IDS), loss(*pooled, ids=IDS))
    other = _crd()
    loss.remember(*maps, IDS, torch.tensor(False))
    other.remember(*pooled, IDS, torch.tensor(False))
    torch.testing.assert_close(loss.memory, other.memory)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_neither_loss_nor_memory_waits_for_the_device():
    loss, ids = _crd(negatives=4).cuda(), IDS.cuda()
    assert loss.memory.is_cuda
    student, teacher = (x.cuda() for x in _pair())
    skip = torch.tensor(False, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(student.requires_grad_(), teacher, ids=ids).mean().backward()
        loss.remember(student, teacher, ids, skip)
    finally:
        torch.cuda.set_sync_debug_mode("default")
