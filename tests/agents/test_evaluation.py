from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from agents.evaluation import (
    Evaluation,
    evaluate,
    linear_probe_accuracy,
    random_actions,
    reward_table,
)
from repfusion_env.actions.choice import Choice
from repfusion_env.envs import RepFusionVectorEnv

TWO_LAYERS = {"teacher.layers": ["down_blocks.0.resnets.0.conv2", "mid_block.resnets.1.conv2"]}
SPACES: dict[str, dict[str, Any]] = {
    "continuous": {},
    "continuous_timestep": {},
    "layer": {"timesteps": {"values": [200]}, **TWO_LAYERS},
    "timestep_and_layer": TWO_LAYERS,
    "timestep_set": {"env.set_size": 2},
}


def by_brightness(observations: torch.Tensor) -> torch.Tensor:
    """A policy that tells images apart."""
    return (observations.sum(1).abs() * 7).long() % 5


@pytest.fixture
def env(tiny: dict[str, Any]) -> RepFusionVectorEnv:
    """After some training."""
    env = RepFusionVectorEnv(config=tiny, student={"ema": 0.9})
    env.reset(seed=3)
    for step in range(6):
        env.step(torch.full((4,), step % 5))
    return env


def test_means_are_those_of_a_loop_over_images():
    rng = np.random.default_rng(0)
    rewards, learned, random = (rng.normal(size=shape) for shape in ((7, 4), 7, (7, 8)))
    found = Evaluation(
        rewards=rewards,
        learned_rewards=learned,
        random_rewards=random,
        arms=("0", "10", "20", "30"),
        valid=np.array([True, True, False, True]),
        timesteps=np.zeros((7, 1), int),
        layers=None,
        layer_names=("mid_block",),
        chosen=None,
        kind="student_lookahead",
        noun="timestep",
    )
    assert found.learned == pytest.approx(sum(learned) / 7)
    assert found.random == pytest.approx(sum(sum(row) for row in random) / 56)
    best = [max(row[k] for k in (0, 1, 3)) for row in rewards]
    assert found.best_per_image == pytest.approx(sum(best) / 7)
    assert found.by_arm.tolist() == pytest.approx(
        [sum(row[k] for row in rewards) / 7 for k in range(4)]
    )


def test_the_table_holds_each_images_reward_at_each_timestep(env: RepFusionVectorEnv):
    table = reward_table(env.trainer, env.trainer.parts.heldout, 6)
    assert table.shape == (6, 5) and table.dtype == np.float64
    for image in (0, 5):
        for column, timestep in enumerate((0, 200, 400, 600, 800)):
            one = torch.tensor([image])
            judged = env.trainer.judge(
                env.trainer.parts.heldout, one, torch.tensor([timestep]), torch.zeros_like(one)
            )
            assert table[image, column] == pytest.approx(float(judged.reward), abs=1e-5)
    assert len(np.unique(table)) == 30


def test_a_policy_is_worth_what_it_earns_step_by_step_on_the_heldout_view(env: RepFusionVectorEnv):
    found = evaluate(env, by_brightness)
    assert found.rewards.shape == (40, 5)
    view = env.heldout_view()
    observations, _ = view.reset(seed=0)
    rewards, actions = [], []
    for _ in range(10):
        actions.append(by_brightness(observations))
        observations, reward, *_ = view.step(actions[-1])
        rewards.append(reward)
    chosen = torch.cat(actions)
    np.testing.assert_array_equal(200 * chosen, found.timesteps[:, 0])
    assert found.chosen.tolist() == chosen.bincount(minlength=5).tolist()
    assert (found.chosen > 0).sum() > 2
    np.testing.assert_array_equal(found.learned_rewards, found.rewards[np.arange(40), chosen])
    assert float(torch.cat(rewards).double().mean()) == pytest.approx(found.learned, abs=1e-5)
    limited = evaluate(env, by_brightness, 16)
    np.testing.assert_allclose(limited.rewards, found.rewards[:16], atol=1e-5)
    assert len(evaluate(env, by_brightness, 1000).timesteps) == 40


@pytest.mark.parametrize(
    ("kind", "judged"),
    [("teacher_probe", "teacher_probe"), ("student_gain", "student_lookahead")],
)
def test_a_reward_that_needs_an_update_is_judged_by_the_look_ahead(
    tiny: dict[str, Any], kind: str, judged: str
):
    env = RepFusionVectorEnv(config=tiny, reward=kind)
    assert evaluate(env, by_brightness, 8).kind == judged


def test_closed_timesteps_do_not_count_for_random(tiny: dict[str, Any]):
    env = RepFusionVectorEnv(config=tiny, **{"timesteps.min_snr": 0.1})
    found = evaluate(env, by_brightness, 8)
    assert found.valid.tolist() == env.action_masks()[0].tolist() != [True] * 5
    assert found.random == pytest.approx(found.by_arm[found.valid].mean())


def policy(env: RepFusionVectorEnv) -> Callable[[torch.Tensor], torch.Tensor]:
    """One that tells images apart, in every space."""
    space = env.single_action_space

    def choose(observations: torch.Tensor) -> torch.Tensor:
        number = (observations.sum(1).abs() * 7).long()
        if env.actions.kind == "Box":
            return (number % 13)[:, None] / 12.0
        nvec = torch.tensor(getattr(space, "nvec", [getattr(space, "n", 1)]))
        several = torch.stack([number // (component + 1) for component in range(len(nvec))], 1)
        return (several % nvec).reshape(len(number), *(space.shape or ()))

    return choose


@pytest.mark.parametrize("name", SPACES)
def test_in_every_space_a_policy_is_worth_what_it_earns_on_the_heldout_view(
    tiny: dict[str, Any], name: str
):
    env = RepFusionVectorEnv(config=tiny, **SPACES[name], **{"env.action": name})
    env.reset(seed=0)
    choose = policy(env)
    found = evaluate(env, choose, 16)
    view = env.heldout_view(16)
    observations, _ = view.reset(seed=0)
    *_, info = _, rewards, *_ = view.step(choose(observations))
    np.testing.assert_allclose(found.learned_rewards, rewards, atol=1e-4)
    timesteps = info["timestep"].numpy().reshape(16, -1)
    np.testing.assert_array_equal(found.timesteps, timesteps)
    assert (found.layers is not None) == ("layer" in info)
    if found.layers is not None:
        np.testing.assert_array_equal(found.layers, info["layer"])
    if found.chosen is not None and found.layers is None:
        assert found.chosen.sum() == timesteps.size
    # Arms are what their labels say, whatever the space.
    bank, ids = env.trainer.parts.heldout, torch.arange(16)
    names = list(env.trainer.parts.teacher.layers)
    for index in (0, len(found.arms) - 1):
        label = found.arms[index].split(", ")
        t, layer = (label[0], label[-1]) if name != "layer" else ("200", label[0])
        k = found.timesteps.shape[1]
        choice = Choice(
            torch.full((16, k), int(t)),
            torch.full((16, k), env.grid.timesteps.index(int(t))),
            torch.full((16,), names.index(layer)) if layer in names else None,
        )
        judged = env.trainer.judge(bank, ids, choice, torch.zeros(16, dtype=torch.int64))
        np.testing.assert_allclose(found.rewards[:, index], judged.reward, atol=1e-4)
    repeated = evaluate(env, choose, 16)
    np.testing.assert_array_equal(found.random_rewards, repeated.random_rewards)


def test_random_is_exact_where_the_arms_are_all_and_else_drawn(tiny: dict[str, Any]):
    overrides = {**TWO_LAYERS, "env.action": "timestep_and_layer", "timesteps.min_snr": 0.1}
    env = RepFusionVectorEnv(config=tiny, **overrides)
    found = evaluate(env, policy(env), 8)
    assert found.valid.tolist() == np.repeat(env.valid_timesteps, 2).tolist() != [True] * 10
    assert found.random == pytest.approx(found.rewards[:, found.valid].mean())
    assert found.pairs == (0, 200, 400, 600, 800)

    sets = RepFusionVectorEnv(config=tiny, **{"env.action": "timestep_set", "env.set_size": 2})
    found = evaluate(sets, policy(sets), 8)
    generator = torch.Generator().manual_seed(7)
    actions = random_actions(sets, 8 * 40, generator)
    view = sets.heldout_view(8)
    earned = []
    for given in actions.split(8):
        view.reset(seed=0)
        earned.append(view.step(given)[1])
    own = torch.cat(earned).double()
    error = np.sqrt(own.var() / len(own) + found.random_rewards.var() / found.random_rewards.size)
    assert found.random_rewards.shape == (8, 8)
    assert abs(found.random - float(own.mean())) < 4 * error
    assert found.random != pytest.approx(found.by_arm.mean(), abs=1e-6)


@pytest.mark.parametrize("name", ["discrete", "timestep_and_layer", "timestep_set"])
def test_random_actions_are_even_over_what_is_open(tiny: dict[str, Any], name: str):
    more = {**SPACES.get(name, {}), "env.action": name, "timesteps.min_snr": 0.1}
    env = RepFusionVectorEnv(config=tiny, **more)
    actions = random_actions(env, 3000, torch.Generator().manual_seed(0)).reshape(3000, -1)
    masks = np.split(env.action_masks()[0], [5])
    for column, mask in zip(actions.T, masks[: actions.shape[1]], strict=True):
        share = column.bincount(minlength=len(mask)) / 3000
        expected = mask / mask.sum()
        deviation = np.sqrt(expected * (1 - expected) / 3000)
        assert (np.abs(share.numpy() - expected) <= 4 * deviation).all()


def test_evaluation_changes_nothing(
    env: RepFusionVectorEnv, learned: Callable[[Any], list[torch.Tensor]]
):
    before, state = learned(env.trainer), torch.get_rng_state()
    saved = deepcopy(env.state_dict())
    evaluate(env, by_brightness)
    linear_probe_accuracy(env.trainer, 50)
    assert all(map(torch.equal, before, learned(env.trainer)))
    assert torch.equal(torch.get_rng_state(), state)
    assert env.trainer.student.training is True
    one = env.step(torch.zeros(4, dtype=torch.int64))
    metrics = env.drain_metrics()
    env.load_state_dict(saved)
    two = env.step(torch.zeros(4, dtype=torch.int64))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert metrics == env.drain_metrics()


def test_the_linear_probe_is_a_logistic_regression_on_the_averaged_students_features(
    env: RepFusionVectorEnv,
):
    parts = env.trainer.parts
    student = env.trainer.average
    assert student is not None

    def features(bank: Any, count: int) -> np.ndarray:
        with torch.no_grad():
            maps = student.backbone(bank.pixels(torch.arange(count)))
        return maps[student.backbone.stages[-1]].mean((2, 3)).numpy()

    train, heldout = features(parts.train, 60), features(parts.heldout, 40)
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation < 1e-12] = 1.0  # a dead feature
    probe = LogisticRegression(max_iter=1000)
    probe.fit((train - mean) / deviation, parts.train.labels[:60])
    right = probe.predict((heldout - mean) / deviation) == parts.heldout.labels[:40].numpy()
    assert linear_probe_accuracy(env.trainer, 60) == pytest.approx(right.mean())
    assert 0.2 < right.mean() < 1.0


def test_where_all_training_images_have_one_class_the_linear_probe_answers_it(
    env: RepFusionVectorEnv,
):
    trainer = env.trainer
    train = trainer.parts.train
    train = replace(train, labels=torch.full_like(train.labels, 3))
    only_threes = SimpleNamespace(
        **{name: getattr(trainer, name) for name in ("device", "embed", "evaluation_student")},
        parts=replace(trainer.parts, train=train),
    )
    share = (trainer.parts.heldout.labels == 3).float().mean()
    assert linear_probe_accuracy(only_threes, 60) == pytest.approx(float(share))
    assert share > 0
