"""What the trainer owes a loss that learns, remembers and draws, and to a pyramid projection."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from repfusion_env import load_config
from repfusion_env.actions.choice import Choice
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.trainer import DistillationTrainer

LAYERS = ["mid_block.resnets.1.conv2", "down_blocks.0.resnets.0.conv2"]
IDS = torch.tensor([3, 70, 11, 50])
TIMESTEPS = torch.tensor([0, 200, 400, 200])
SOURCE = """
import torch
from torch import nn

CALLS = []


class Watched(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.free = nn.Parameter(torch.full((), 0.5) + torch.rand(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, student, teacher, anchors=None, *, ids=None):
        CALLS.append(("loss", ids, self.training, torch.rand(()), anchors))
        if self.training:
            self.seen += 1
        return self.free.square() * (student - teacher).square().flatten(1).mean(1)

    def auxiliary(self, teacher):
        return 3.0 * (self.free - 1.0).square()

    def remember(self, student, teacher, ids, skip):
        CALLS.append(("remember", ids, student, teacher, skip))
"""


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Any:
    """The module of a loss that writes down how it is called."""
    (tmp_path / "watched_loss.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("watched_loss")
    module.CALLS.clear()
    return module


def _trainer(tiny: dict[str, Any], **overrides: Any) -> DistillationTrainer:
    config = load_config(load_config(tiny), overrides)
    return DistillationTrainer(config, build_frozen_parts(config))


def _step(trainer: DistillationTrainer) -> None:
    trainer.step(IDS, TIMESTEPS, torch.arange(4))


def test_a_loss_is_told_the_images_and_remembers_after_the_update(tiny, watched):
    trainer = _trainer(tiny, **{"distillation": "watched_loss:Watched"})
    _step(trainer)
    _step(trainer)
    second = watched.CALLS[3:]
    assert [call[0] for call in second] == ["loss", "remember", "loss"]
    batch = [*IDS.tolist(), *IDS.tolist()]
    (_, ids, training, _, anchors), remembered, (_, lanes, looking, _, fixed) = second
    assert ids.tolist() == batch and training and anchors is None
    assert lanes.tolist() == IDS.tolist() and not looking and fixed is not None
    _, ids, student, teacher, skip = remembered
    assert ids.tolist() == batch and not skip
    assert [z.shape for z in (student, teacher)] == [(8, 32)] * 2
    assert not student.requires_grad
    watched.CALLS.clear()
    trainer.judge(trainer.parts.heldout, IDS % 40, TIMESTEPS, IDS * 0)
    assert [(name, ids, training) for name, ids, training, *_ in watched.CALLS] == [
        ("loss", None, False)
    ] * 2
    watched.CALLS.clear()
    trainer.judge(trainer.parts.train, IDS, TIMESTEPS, IDS * 0)
    assert [ids.tolist() for _, ids, *_ in watched.CALLS] == [IDS.tolist()] * 2


def test_judging_after_a_step_without_look_ahead_leaves_training_mode(tiny, watched):
    trainer = _trainer(tiny, **{"distillation": "watched_loss:Watched", "reward": "teacher_probe"})
    _step(trainer)
    watched.CALLS.clear()
    trainer.judge(trainer.parts.heldout, IDS % 40, TIMESTEPS, IDS * 0)
    assert [call[2] for call in watched.CALLS] == [False]


def test_a_loss_learns_by_its_auxiliary_term_with_the_projections_rate(tiny, watched):
    trainer = _trainer(
        tiny,
        **{"distillation": "watched_loss:Watched", "optimizer.gradient_clip": 0.0},
        optimizer={"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "head_learning_rate": 1.0},
    )
    (free,) = trainer.loss.parameters()
    before = float(free.detach())
    trainer.step(IDS.repeat(2), TIMESTEPS.repeat(2), torch.arange(8))
    mean = trainer.drain_metrics()["student/distillation_loss"] / before**2
    gradient = 2 * before * mean + 6 * (before - 1)
    assert float(free.detach()) == pytest.approx(before - 2e-3 * gradient, rel=1e-5)


def test_a_losses_own_draws_and_start_come_from_the_trainers_seed(tiny, watched):
    trainer = _trainer(tiny, **{"distillation": "watched_loss:Watched"})
    found = []
    for caller in (0, 1):
        trainer.reset(4)
        torch.manual_seed(caller)
        state = torch.get_rng_state()
        watched.CALLS.clear()
        _step(trainer)
        trainer.judge(trainer.parts.heldout, IDS % 40, TIMESTEPS, IDS * 0)
        assert torch.equal(torch.get_rng_state(), state)
        draws = [float(call[3]) for call in watched.CALLS if call[0] == "loss"]
        found.append((draws, *(float(p.detach()) for p in trainer.loss.parameters())))
    assert found[0] == found[1]
    trainer.reset(5)
    _step(trainer)
    assert float(next(trainer.loss.parameters()).detach()) != found[0][1]


def test_a_skipped_step_leaves_a_losses_statistics_and_says_so(tiny, watched, monkeypatch):
    trainer = _trainer(tiny, **{"distillation": "watched_loss:Watched"})
    _step(trainer)
    before, honest = trainer.loss.state_dict(), trainer.parts.features.at
    before = {name: value.clone() for name, value in before.items()}
    assert before["layers.0.0.seen"] == 1
    monkeypatch.setattr(
        trainer.parts.features, "at", lambda *a: [z * float("nan") for z in honest(*a)]
    )
    watched.CALLS.clear()
    _step(trainer)
    assert next(call for call in watched.CALLS if call[0] == "remember")[4]
    after = trainer.loss.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("dense", [False, True])
def test_the_losses_know_the_shapes_at_which_they_match(tiny, watched, dense):
    settings = {"losses": {"watched_loss:Watched": 1.0}, "projection": "pyramid", "dense": dense}
    trainer = _trainer(tiny, **{"teacher.layers": LAYERS}, distillation=settings)
    shapes = [losses[0].shape for losses in trainer.loss.layers]
    sizes = [(8, 8), (16, 16)] if dense else [(1, 1), (1, 1)]
    assert [(s.width, s.size, s.dense, s.images) for s in shapes] == [
        (32, sizes[0], dense, 96),
        (16, sizes[1], dense, 96),
    ]


@pytest.mark.parametrize("dense", [False, True])
def test_behind_a_pyramid_the_last_stage_moves_and_the_stages_below_stay(tiny, dense):
    settings = {"projection": "pyramid", "dense": dense, "losses": {"hint": 1.0}}
    trainer = _trainer(tiny, **{"teacher.layers": LAYERS}, distillation=settings)
    _step(trainer)
    bank, ids, zeros = trainer.parts.heldout, IDS % 40, IDS * 0
    result = trainer.judge(bank, ids, TIMESTEPS, zeros)
    chosen = torch.tensor([0, 1, 1, 0])
    one = trainer.judge(
        bank, ids, Choice(TIMESTEPS[:, None], TIMESTEPS[:, None] // 200, chosen), zeros
    )

    teacher = trainer.parts.features(bank, ids, TIMESTEPS, zeros, trainer.heldout_noise_seed)
    student = trainer.student.eval()
    with torch.no_grad():
        maps = student.backbone(bank.pixels(ids))
    *lower, last = (maps[f"stage{stage}"] for stage in (1, 2, 3))
    for found, layers in ((result, [[0, 1]] * 4), (one, [[layer] for layer in chosen.tolist()])):
        for lane, counting in enumerate(layers):
            h = last[lane : lane + 1].clone().requires_grad_()
            levels = student.projections(h, [m[lane : lane + 1] for m in lower])
            mine = [p if dense else p.mean((2, 3)) for p in levels]
            losses = [
                F.mse_loss(mine[index], teacher[index][lane : lane + 1]) for index in counting
            ]
            loss = sum(losses) * sum(mine[index].numel() for index in counting)
            (g,) = torch.autograd.grad(loss, h)
            moved = h - 2 * loss / (g.square().sum() + 2 * 0.1 * loss) * g
            expected = -F.cross_entropy(
                student.head(moved.mean((2, 3))), bank.labels[ids[lane : lane + 1]]
            )
            torch.testing.assert_close(found.reward[lane], expected.detach(), rtol=2e-4, atol=2e-4)
            mean = torch.stack(losses).mean().detach()
            torch.testing.assert_close(found.distillation_loss[lane], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [None, [0, 1, 1, 0]])
@pytest.mark.parametrize("settings", [{}, {"weights": "learned", "timesteps": [90]}])
def test_no_choice_of_layers_and_timesteps_makes_the_host_wait(tiny, monkeypatch, layers, settings):
    trainer = _trainer(
        tiny,
        **{"teacher.layers": LAYERS, "optimizer.batch_size": 6},
        env={"action": "timestep_set", "set_size": 2},
        fusion=settings,
    )
    at = torch.tensor([[0, 4], [2, 1], [3, 3], [1, 0]])
    choice = Choice(at * 200, at, None if layers is None else torch.tensor(layers))
    trainer.step(IDS, choice, IDS)
    monkeypatch.setattr(trainer.updates, "watch", lambda _: None)
    heldout = IDS % 40

    def wait(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host waits for the device")

    for name in (
        "item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"
    ):  # fmt: skip
        monkeypatch.setattr(torch.Tensor, name, wait)
    trainer.step(IDS, choice, IDS)
    trainer.judge(trainer.parts.heldout, heldout, choice, IDS)
    monkeypatch.undo()
    assert trainer.steps == 2
