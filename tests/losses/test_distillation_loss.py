"""The configured sum: weights, options, layers, what is learned and remembered."""

from __future__ import annotations

import sys
import types
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repfusion_env.config import DistillationConfig
from repfusion_env.losses import DistillationLoss, FeatureShape
from repfusion_env.losses.correlation_congruence import correlation_congruence
from repfusion_env.registry import LOSSES

SHAPES = [FeatureShape(3, images=6), FeatureShape(5, images=6)]
IDS = torch.tensor([0, 3, 5, 1])


def _loss(losses, shapes=SHAPES, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DistillationLoss(DistillationConfig(losses=losses, options=options), shapes)


def _pairs(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(4, s.width, *s.size) if s.dense else (4, s.width) for s in shapes]
    return [[torch.randn(size, generator=generator) for size in sizes] for _ in range(2)]


def test_weights_add_up_and_zero_switches_off():
    (student, _), (teacher, _) = _pairs()
    total = _loss({"hint": 2.0, "l1": 0.5, "rkd_angle": 0.0})
    assert total.names == {"hint", "l1"}
    difference = (student - teacher).double().numpy()
    expected = 2.0 * (difference**2).mean(1) + 0.5 * np.abs(difference).mean(1)
    np.testing.assert_allclose(total.layer(0, student, teacher), expected, rtol=1e-6)


def test_options_reach_their_loss():
    (student, _), (teacher, _) = _pairs()
    total = _loss({"correlation_congruence": 1.0}, correlation_congruence={"gamma": 1.5})
    expected = correlation_congruence(student, teacher, gamma=1.5)
    torch.testing.assert_close(total.layer(0, student, teacher), expected)


def test_losses_that_tell_images_apart_are_told_which_they_are():
    (student, _), (teacher, _) = _pairs()
    total = _loss({"infonce": 1.0})
    unlike = total.layer(0, student, teacher, ids=torch.arange(4))
    torch.testing.assert_close(unlike, total.layer(0, student, teacher))
    alike = total.layer(0, student, teacher, ids=torch.tensor([2, 2, 0, 1]))
    assert (alike[:2] < unlike[:2]).all()  # one key fewer to be mistaken for
    assert torch.equal(alike[2:], unlike[2:])


def test_each_layer_has_learned_parts_of_its_own_width():
    total = _loss({"vid": 1.0, "hint": 1.0})
    assert [p.shape for p in total.parameters()] == [(3,), (5,)]
    student, teacher = _pairs()
    total.layer(1, student[1], teacher[1]).mean().backward()
    first, second = total.parameters()
    assert first.grad is None
    assert second.grad.abs().min() > 0


def test_auxiliary_is_0_without_and_the_sum_over_layers_with_networks_on_the_teachers_side():
    _, teacher = _pairs()
    assert _loss({"hint": 1.0}).auxiliary(teacher).item() == 0
    total = _loss({"factor_transfer": 3.0})
    parts = [
        part.auxiliary(z) for part, z in zip((m for [m] in total.layers), teacher, strict=True)
    ]
    assert parts[0] != parts[1]
    torch.testing.assert_close(total.auxiliary(teacher), parts[0] + parts[1])


def test_every_layer_remembers_and_the_next_step_knows():
    student, teacher = _pairs()
    total = _loss({"crd": 1.0})
    before = [total.layer(i, student[i], teacher[i], ids=IDS) for i in (0, 1)]
    total.remember(student, teacher, IDS, torch.tensor(True))
    for i in (0, 1):
        assert torch.equal(total.layer(i, student[i], teacher[i], ids=IDS), before[i])
    total.remember(student, teacher, IDS, torch.tensor(False))
    for i in (0, 1):
        assert not torch.equal(total.layer(i, student[i], teacher[i], ids=IDS), before[i])


def test_a_state_dict_brings_back_learned_parts_and_memories(tmp_path):
    student, teacher = _pairs()
    names = {"crd": 1.0, "vid": 1.0, "factor_transfer": 1.0}
    total, other = _loss(names), _loss(names)
    with torch.no_grad():
        for parameter in total.parameters():
            parameter.add_(0.1)
    total.remember(student, teacher, IDS, torch.tensor(False))
    torch.save(total.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for i in (0, 1):
        mine, theirs = (x.layer(i, student[i], teacher[i], ids=IDS) for x in (total, other))
        assert torch.equal(mine, theirs)


def test_a_copy_shares_nothing():
    student, teacher = _pairs()
    total = _loss({"crd": 1.0})
    copy = deepcopy(total)
    copy.remember(student, teacher, IDS, torch.tensor(False))
    assert not torch.equal(copy.layers[0][0].memory, total.layers[0][0].memory)


# Attention compares maps; the configuration refuses it on pooled features.
BOTH = [(name, dense) for name in LOSSES for dense in (False, True) if dense or name != "attention"]


@pytest.mark.parametrize(("name", "dense"), BOTH)
def test_every_registered_loss_builds_and_gives_one_value_and_gradient_per_sample(name, dense):
    shapes = [FeatureShape(4, dense, (2, 2) if dense else (1, 1), 6)]
    total = _loss({name: 1.0}, shapes)
    (student,), (teacher,) = _pairs(shapes=shapes)
    student.requires_grad_()
    values = total.layer(0, student, teacher, ids=IDS)
    assert values.shape == (4,)
    assert (values >= 0).all()
    values.mean().backward()
    assert (student.grad.flatten(1).abs().amax(1) > 0).all()
    # Held-out images have no place in a bank, and the look-ahead fixes the others.
    anchors = None if dense else (student.detach(), teacher)
    assert total.layer(0, student, teacher, anchors=anchors).isfinite().all()


class _NothingForTheHost(TorchDispatchMode):
    """Refuses whatever makes the host wait for a device: values, shapes that hang on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"}
        if name in {"index", "index_put", "index_put_", "_index_put_impl_"}:
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


def test_the_watch_for_reading_hosts_sees_them():
    value = torch.arange(3)
    for reading in (lambda: bool(value.sum()), lambda: value[value > 1], value.nonzero):
        with pytest.raises(AssertionError), _NothingForTheHost():
            reading()


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_makes_the_host_wait_for_the_device(name):
    shapes = [FeatureShape(4, True, (2, 2), 6)]
    options = {"crd": {"negatives": 4}} if name == "crd" else {}
    total, skip = _loss({name: 1.0}, shapes, **options), torch.tensor(False)
    (student,), (teacher,) = _pairs(shapes=shapes)
    student.requires_grad_()
    with _NothingForTheHost():
        value = total.layer(0, student, teacher, ids=IDS).mean() + total.auxiliary([teacher])
        value.backward()
        total.remember([student], [teacher], IDS, skip)


@pytest.mark.parametrize(
    ("losses", "options", "sentence"),
    [
        ({"hnt": 1.0}, {}, "unknown loss 'hnt'. Did you mean 'hint'?"),
        (
            {"crd": 1.0},
            {"crd": {"temprature": 0.1}},
            "loss 'crd', option temprature: there is no such option. Did you mean 'temperature'? "
            "Allowed: negatives, temperature, embedding, momentum",
        ),
        (
            {"hint": 1.0},
            {"hint": {"gamma": 1}},
            "loss 'hint', option gamma: there is no such option. This loss has no options",
        ),
        (
            {"infonce": 1.0},
            {"infonce": {"temperature": 0}},
            "loss 'infonce', option temperature: 0 given; it must be greater than 0",
        ),
    ],
)
def test_an_unknown_name_or_unfit_option_is_one_sentence(losses, options, sentence):
    with pytest.raises(ValueError) as refused:
        _loss(losses, **options)
    assert str(refused.value).startswith(sentence)


def test_losses_of_ones_own_take_options_by_their_signatures(monkeypatch):
    class Scaled(torch.nn.Module):
        def __init__(self, shape, factor=1.0):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((shape.width,), factor))

        def forward(self, student, teacher, anchors=None, *, ids=None):
            return (self.weight * (student - teacher)).abs().sum(1)

    def powered(student, teacher, anchors=None, power=2):
        return (student - teacher).abs().pow(power).sum(1)

    module = types.ModuleType("losses_of_mine")
    module.Scaled, module.powered = Scaled, powered
    monkeypatch.setitem(sys.modules, "losses_of_mine", module)
    names = {"losses_of_mine:Scaled": 1.0, "losses_of_mine:powered": 1.0}
    options = {"losses_of_mine:Scaled": {"factor": 3.0}, "losses_of_mine:powered": {"power": 1}}
    total = _loss(names, **options)
    (student, _), (teacher, _) = _pairs()
    expected = 4.0 * (student - teacher).abs().sum(1)
    torch.testing.assert_close(total.layer(0, student, teacher), expected)
    with pytest.raises(ValueError, match=r"option powr: .* Did you mean 'power'\? Allowed: power"):
        _loss(names, **{"losses_of_mine:powered": {"powr": 1}})
