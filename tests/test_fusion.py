"""Targets of several timesteps and layers against sums written out, and the weights they learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from repfusion_env import load_config
from repfusion_env.actions.choice import Choice
from repfusion_env.config_loading import ConfigError
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.fusion import probe_input
from repfusion_env.trainer import DistillationTrainer

LAYER, OTHER = "mid_block.resnets.1.conv2", "down_blocks.0.resnets.0.conv2"
BOTH = {"teacher.layers": [LAYER, OTHER]}
GRID = torch.tensor([0, 200, 400, 600, 800])


def _trainer(tiny: dict[str, Any], **overrides: Any) -> DistillationTrainer:
    config = load_config(load_config(tiny), overrides)
    return DistillationTrainer(config, build_frozen_parts(config))


def _choice(indices: list[list[int]], layers: list[int] | None = None) -> Choice:
    at = torch.tensor(indices)
    return Choice(GRID[at], at, None if layers is None else torch.tensor(layers))


def _parts(trainer: DistillationTrainer, ids: torch.Tensor, timesteps: Any) -> list[Any]:
    """Standardised features of one timestep (or (N,) of them), per layer, in float64."""
    at = torch.as_tensor(timesteps).expand(len(ids)).contiguous()
    seed, visits = trainer.noise_seed, torch.arange(len(ids))
    found = trainer.parts.features(trainer.parts.train, ids, at, visits, seed)
    return [z.double() for z in found]


def _targets(trainer: DistillationTrainer, ids: torch.Tensor, choice: Choice) -> Any:
    return trainer.targets(
        trainer.parts.train, ids, choice, torch.arange(len(ids)), trainer.noise_seed
    )


IDS = torch.tensor([3, 70, 11, 50])
SETS = [[0, 4], [2, 1], [3, 3], [1, 0]]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("mixture", [(), (1.0, 2.0, 5.0)])
def test_a_fixed_mixture_is_the_weighted_sum_of_its_timesteps(tiny, dense, mixture):
    trainer = _trainer(
        tiny,
        **BOTH,
        env={"action": "timestep_set", "set_size": 2},
        fusion={"timesteps": [90], "mixture": list(mixture)},
        **{"distillation.dense": dense},
    )
    choice = _choice(SETS)
    slots = [_parts(trainer, IDS, t) for t in (*choice.timesteps.T, 90)]
    weights = [share / 8 for share in mixture] or [1 / 3] * 3
    targets = _targets(trainer, IDS, choice)
    for layer in range(2):
        expected = sum(w * slot[layer] for w, slot in zip(weights, slots, strict=True))
        torch.testing.assert_close(targets.features[layer], expected.float())
    assert targets.weights is None and targets.probe is None


def test_one_timestep_is_its_feature_itself_whoever_asks(tiny):
    trainer = _trainer(tiny)
    (expected,) = _parts(trainer, IDS, torch.tensor([0, 200, 400, 800]))
    for choice in (_choice([[0], [1], [2], [4]]), torch.tensor([0, 200, 400, 800])):
        assert torch.equal(_targets(trainer, IDS, choice).features[0].double(), expected)


@pytest.mark.parametrize("dense", [False, True])
def test_learned_weights_are_a_softmax_over_the_timesteps_and_layers_in_use(tiny, dense):
    trainer = _trainer(
        tiny,
        **BOTH,
        env={"action": "timestep_set", "set_size": 2},
        fusion={"timesteps": [90], "weights": "learned"},
        **{"distillation.dense": dense},
    )
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trainer.fusion.logits.copy_(logits)
    choice = _choice(SETS)
    slots = [_parts(trainer, IDS, t) for t in (*choice.timesteps.T, 90)]
    targets = _targets(trainer, IDS, choice)
    logits = logits.double().requires_grad_()
    probe = []
    for lane, used in enumerate([[*pair, 5] for pair in SETS]):
        weights = logits[:, used].exp() / logits[:, used].exp().sum()  # (L, T), sum 1
        torch.testing.assert_close(
            targets.weights[lane].double(), weights.sum(1), atol=1e-6, rtol=0
        )
        row = []
        for layer in range(2):
            mixture = weights[layer] / weights[layer].sum()
            fused = sum(w * slot[layer][lane] for w, slot in zip(mixture, slots, strict=True))
            torch.testing.assert_close(
                targets.features[layer][lane], fused.float(), atol=1e-5, rtol=1e-4
            )
            pooled = fused.mean((1, 2)) if dense else fused
            row.append(2 * weights[layer].sum() * pooled)
        probe.append(torch.cat(row))
    expected = torch.stack(probe)
    torch.testing.assert_close(targets.probe, expected.float(), atol=1e-5, rtol=1e-4)
    # Only the probe's input leads back to the weights.
    assert not any(z.requires_grad for z in (*targets.features, targets.weights))
    direction = torch.randn_like(expected)
    (mine,) = torch.autograd.grad((targets.probe * direction).sum(), trainer.fusion.logits)
    (theirs,) = torch.autograd.grad((expected * direction).sum(), logits)
    torch.testing.assert_close(mine, theirs.float(), atol=1e-4, rtol=1e-3)


def test_learning_prefers_the_timestep_that_shows_the_image(tiny):
    trainer = _trainer(
        tiny,
        timesteps=[800],
        fusion={"timesteps": [0], "weights": "learned"},
        **{"optimizer.learning_rate": 0.02, "env.num_envs": 16},
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        ids = torch.randint(0, 96, (16,), generator=generator)
        trainer.step(ids, torch.full_like(ids, 800), torch.arange(16) + 16 * step)
    shares = trainer.drain_metrics()
    assert shares["fusion/timestep/0"] > 0.6
    assert shares["fusion/timestep/0"] + shares["fusion/timestep/800"] == pytest.approx(1)
    assert shares[f"fusion/layer/{LAYER}"] == pytest.approx(1)


def test_between_grid_entries_mean_and_deviation_are_interpolated(tiny):
    settings = {"teacher.input": "clean", "teacher.standardize_images": 96}
    full = _trainer(tiny, timesteps=[400, 50, 100], **settings)
    parts = full.parts

    def raw(timestep):
        at = torch.full((96,), timestep)
        maps = parts.teacher.features(parts.train.pixels(torch.arange(96)), at)
        return maps[LAYER].mean((2, 3)).double()

    (found,) = _parts(full, torch.arange(96), 175)
    mean = 0.75 * raw(100).mean(0) + 0.25 * raw(400).mean(0)
    deviation = 0.75 * raw(100).std(0, correction=0) + 0.25 * raw(400).std(0, correction=0)
    torch.testing.assert_close(found, (raw(175) - mean) / deviation, atol=2e-3, rtol=2e-3)
    for timestep, nearest in ((700, 400), (10, 50)):
        (beyond,) = _parts(full, torch.arange(96), timestep)
        edge = raw(nearest)
        expected = (raw(timestep) - edge.mean(0)) / edge.std(0, correction=0)
        torch.testing.assert_close(beyond, expected, atol=2e-3, rtol=2e-3)


def test_timesteps_of_the_fusion_have_statistics_of_their_own(tiny):
    trainer = _trainer(
        tiny,
        **{"teacher.input": "clean", "teacher.standardize_images": 96, "timesteps": [0, 800]},
        fusion={"timesteps": [500]},
    )
    (z,) = _parts(trainer, torch.arange(96), 500)
    torch.testing.assert_close(z.mean(0), torch.zeros(32).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(32).double(), atol=1e-3, rtol=0)


def test_an_image_is_encoded_once_and_read_once_per_timestep(tiny, monkeypatch):
    trainer = _trainer(
        tiny, env={"action": "timestep_set", "set_size": 2}, fusion={"timesteps": [90]}
    )
    teacher, calls = trainer.parts.teacher, []
    for name in ("encode", "features"):
        honest = getattr(teacher, name)
        monkeypatch.setattr(
            teacher, name, lambda *a, h=honest, n=name: calls.append(n) or h(*a), raising=False
        )
    _targets(trainer, IDS, _choice(SETS))
    assert calls == ["encode", "features", "features", "features"]


def test_learned_weights_keep_no_map_for_their_gradient(tiny):
    trainer = _trainer(
        tiny,
        env={"action": "timestep_set", "set_size": 2},
        **{"fusion": "learned", "distillation.dense": True},
    )
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        targets = _targets(trainer, IDS, _choice(SETS))
    assert targets.features[0].shape == (4, 32, 8, 8)
    assert 0 < max(kept) <= 4 * 32


@pytest.mark.parametrize("dense", [False, True])
def test_a_chosen_layer_alone_makes_loss_and_reward(tiny, dense, monkeypatch):
    trainer = _trainer(tiny, **BOTH, **{"distillation.dense": dense})
    heldout, honest = trainer.parts.heldout, trainer.parts.features.at
    choice = _choice([[1], [2], [0], [1]], layers=[0, 1, 1, 0])

    def judged():
        return trainer.judge(heldout, IDS % 40, choice, IDS * 0)

    before = judged()

    def other_layers_changed(*arguments):
        found = honest(*arguments)
        found[0][[1, 2]] += 1.0  # these lanes have chosen layer 1
        found[1][[0, 3]] = float("nan")
        return found

    monkeypatch.setattr(trainer.parts.features, "at", other_layers_changed)
    after = judged()
    for name in ("distillation_loss", "reward"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
        assert getattr(before, name).isfinite().all()
    full = trainer.judge(heldout, IDS % 40, choice.timesteps[:, 0], IDS * 0)
    assert not torch.isclose(full.reward, after.reward).any()


def test_the_probe_head_sees_the_layers_that_were_not_chosen_as_zeros(tiny):
    trainer = _trainer(tiny, **BOTH)
    targets = _targets(trainer, IDS, _choice([[1], [2], [0], [1]], layers=[0, 1, 1, 0]))
    seen = probe_input(targets).split([32, 16], dim=1)
    for layer, lanes, others in ((0, [0, 3], [1, 2]), (1, [1, 2], [0, 3])):
        assert torch.equal(seen[layer][lanes], targets.features[layer][lanes])
        assert not seen[layer][others].any()


def test_earlier_decisions_keep_their_layer(tiny):
    trainer = _trainer(tiny, **BOTH, **{"optimizer.batch_size": 6})
    for layers in ([0, 1, 1, 0], [1, 1, 1, 0]):
        new = _targets(trainer, IDS, _choice([[1]] * 4, layers))
        ids, batch, _ = trainer.recent.fill_up(IDS, new)
    assert ids.tolist() == [*IDS.tolist(), 3, 70]
    assert batch.weights.argmax(1).tolist() == [1, 1, 1, 0, 0, 1]
    assert torch.equal(batch.weights.sum(1), torch.ones(6))
    # All layers from now on: the new lanes weigh them equally, the earlier ones do not.
    _, batch, _ = trainer.recent.fill_up(IDS, _targets(trainer, IDS, _choice([[1]] * 4)))
    assert batch.weights.tolist() == [[0.5, 0.5]] * 4 + [[0.0, 1.0]] * 2


def test_weights_of_the_layers_weigh_their_losses(tiny):
    plain, weighted = (
        _trainer(tiny, **BOTH, fusion={"layers": layers}) for layers in ([], [1.0, 3.0])
    )
    ids = torch.arange(8)
    mine, teacher = [], _targets(plain, ids, _choice([[1]] * 8)).features
    plain.student.train()
    pooled = plain.student.features(plain.parts.train.pixels(ids))[-1].mean((2, 3))
    for projection, z in zip(plain.student.projections, teacher, strict=True):
        mine.append(F.mse_loss(projection(pooled), z, reduction="none").mean(1))
    plain.reset(0), weighted.reset(0)
    found = [
        t.step(ids, _choice([[1]] * 8), torch.arange(8)).distillation_loss
        for t in (plain, weighted)
    ]
    torch.testing.assert_close(found[0], (0.5 * mine[0] + 0.5 * mine[1]).detach())
    torch.testing.assert_close(found[1], (0.25 * mine[0] + 0.75 * mine[1]).detach())
    for _ in range(2):  # the weights of all lanes are those of earlier decisions too
        _, batch, _ = weighted.recent.fill_up(IDS, _targets(weighted, IDS, _choice([[1]] * 4)))
    assert len(batch.features[0]) == 8
    assert batch.weights.tolist() == [0.25, 0.75]


LEARNED = {
    **BOTH,
    "env": {"action": "timestep_set", "set_size": 2},
    "fusion": {"weights": "learned", "timesteps": [90]},
    "distillation": {"crd": 1.0, "factor_transfer": 1.0},
    "student.ema": 0.9,
}


def _learned(trainer: DistillationTrainer) -> list[torch.Tensor]:
    """All that is trained, remembered or averaged."""
    state = trainer.state_dict()
    kept = {k: state[k] for k in ("student", "loss", "fusion", "average", "optimizer")}
    return [v.detach().clone() for v in _tensors(kept)]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for v in items for t in _tensors(v)] if isinstance(value, dict | list) else []


def test_what_losses_and_fusion_learn_is_saved_and_goes_on_to_the_last_bit(tiny):
    trainer, resumed = _trainer(tiny, **LEARNED), _trainer(tiny, **LEARNED)
    for step in range(3):
        trainer.step(IDS + step, _choice(SETS), torch.arange(4) + 4 * step)
    assert trainer.fusion.logits.detach().abs().min() > 0
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for _ in range(2):
        first, second = (t.step(IDS, _choice(SETS), torch.arange(4)) for t in (trainer, resumed))
        assert torch.equal(first.reward, second.reward)
    assert all(map(torch.equal, _learned(trainer), _learned(resumed)))
    trainer.reset(5), resumed.reset(5)
    assert all(map(torch.equal, _learned(trainer), _learned(resumed)))
    assert not trainer.fusion.logits.any()


def test_a_step_without_a_finite_loss_leaves_loss_and_fusion_as_they_were(tiny, monkeypatch):
    trainer = _trainer(tiny, **LEARNED)
    trainer.step(IDS, _choice(SETS), IDS)
    before, honest = _learned(trainer), trainer.parts.features.at
    with monkeypatch.context() as poison:
        poison.setattr(
            trainer.parts.features, "at", lambda *a: [z * float("nan") for z in honest(*a)]
        )
        trainer.step(IDS + 1, _choice(SETS), IDS)
    assert all(map(torch.equal, _learned(trainer), before))
    trainer.step(IDS + 2, _choice(SETS), IDS)
    after = _learned(trainer)
    assert not all(map(torch.equal, after, before))
    assert all(value.isfinite().all() for value in after)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"fusion.timesteps": [3, 7, 3]}, r"fusion.timesteps: \[3\] stand there more than once"),
        ({"fusion.mixture": [1.0, 2.0]}, r"fusion.mixture: 2 weights.*has 1 timestep \(1 chosen"),
        ({"fusion.timesteps": [5], "fusion.mixture": [1.0]}, r"1 weights.*2 timesteps .*1 of"),
        ({"fusion": "learned"}, "fusion.weights: 'learned' has nothing to weigh"),
        ({**BOTH, "fusion": {"weights": "learned", "layers": [1.0, 1.0]}}, "fusion.layers: with"),
        ({"fusion.layers": [1.0, 1.0]}, "fusion.layers: 2 weights given, but there is 1"),
        (
            {**BOTH, "env.action": "layer", "timesteps": [5], "fusion.layers": [1.0, 2.0]},
            "fusion.layers: env.action 'layer' distils one layer",
        ),
        ({"distillation.projection": "pyramids"}, "unknown projection 'pyramids'.*'pyramid'"),
    ],
)  # fmt: skip
def test_a_fusion_that_cannot_be_is_refused_in_one_sentence(tiny, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence) as refused:
        load_config(load_config(tiny), {"teacher.layers": [LAYER], **overrides})
    assert len(refused.value.problems) == 1


def test_layers_that_only_the_teacher_knows_are_counted_when_it_is_built(tiny):
    given = {"teacher.layers": [], "fusion.layers": [1.0, 2.0, 3.0]}
    with pytest.raises(ConfigError, match=r"fusion.layers: 3 weights given, but there is 1 of"):
        _trainer(tiny, **given)
    with pytest.raises(ConfigError, match=r"fusion.timesteps: 1000 given; .* 0\.\.999"):
        _trainer(tiny, **{"fusion.timesteps": [1000]})
