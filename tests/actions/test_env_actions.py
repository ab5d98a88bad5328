"""The environments under action spaces beyond the grid's own timesteps."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from repfusion_env.actions.choice import Choice
from repfusion_env.envs import RepFusionEnv, RepFusionVectorEnv
from repfusion_env.episodes import Decisions

# Four lanes' actions of each space, and what they choose.
GIVEN: dict[str, Any] = {
    "continuous_timestep": [[0.0], [0.3], [0.5], [1.0]],
    "layer": [0, 1, 1, 0],
    "timestep_and_layer": [[0, 0], [4, 1], [2, 1], [1, 0]],
    "timestep_set": [[0, 0], [4, 1], [1, 4], [2, 3]],
}
TIMESTEPS: dict[str, Any] = {
    "continuous_timestep": [0, 240, 400, 800],
    "layer": [200, 200, 200, 200],
    "timestep_and_layer": [0, 800, 400, 200],
    "timestep_set": [[0, 0], [800, 200], [200, 800], [400, 600]],
}
LAYERS = {"layer": [0, 1, 1, 0], "timestep_and_layer": [0, 1, 1, 0]}
COUNTS = {
    "continuous_timestep": [1, 1, 1, 0, 1],
    "layer": [4],
    "timestep_and_layer": [1, 1, 1, 0, 1],
    "timestep_set": [2, 2, 1, 1, 2],
}
MEANS = {"continuous_timestep": 360.0, "layer": 200.0, "timestep_and_layer": 350.0}


def given(name: str) -> np.ndarray:
    return np.array(GIVEN[name], np.float32 if name == "continuous_timestep" else np.int64)


def test_both_checkers_pass_without_a_warning(tiny, name, overrides):
    env = gym.make("RepFusion-v0", config=tiny, render_mode="rgb_array", **overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = "We recommend you to use a symmetric and normalized Box action space"
        if name == "continuous_timestep":
            warnings.filterwarnings("ignore", message, UserWarning)
        check_env(env.unwrapped)
        check_env_for_sb3(env.unwrapped)


def test_infos_say_what_was_chosen(env, name):
    info = env.step(given(name))[4]
    assert info["timestep"].tolist() == TIMESTEPS[name]
    assert info["timestep"].dtype == torch.int64
    assert ("layer" in info) == (name in LAYERS)
    if name in LAYERS:
        assert info["layer"].tolist() == LAYERS[name]
        assert info["final_info"]["_layer"].all()
    assert torch.equal(info["final_info"]["timestep"], info["timestep"])


def test_the_single_environment_is_one_lane_of_the_vector_environment(tiny, overrides):
    single, vector = RepFusionEnv(tiny, **overrides), RepFusionVectorEnv(1, tiny, **overrides)
    np.testing.assert_array_equal(single.reset(seed=3)[0], vector.reset(seed=3)[0][0].numpy())
    single.action_space.seed(0)
    for _ in range(6):
        action = single.action_space.sample()
        observation, reward, _, _, info = single.step(action)
        found = vector.step(np.asarray(action)[None])
        assert reward == float(found[1][0])
        np.testing.assert_array_equal(observation, found[4]["final_obs"][0].numpy())
        assert set(info) == {key for key in found[4] if "final" not in key}
        for key, value in info.items():
            assert np.array_equal(value, found[4][key][0].numpy())
            assert type(value) in (int, float, bool, np.ndarray)
        single.reset()


def test_metrics_count_timesteps_and_layers_and_survive_a_resume(env, name):
    env.step(given(name))
    saved = copy.deepcopy(env.state_dict())
    metrics = env.drain_metrics()
    assert metrics["timestep/counts"] == COUNTS[name]
    assert metrics["timestep/mean"] == pytest.approx(MEANS.get(name, 375.0))
    assert metrics.get("layer/counts") == ([2, 2] if name in LAYERS else None)
    if name in LAYERS:
        assert metrics["layer/entropy"] == pytest.approx(np.log(2))
    assert "timestep/counts" not in env.drain_metrics()
    rewards = env.step(given(name))[1]
    env.load_state_dict(saved)
    assert env.drain_metrics() == metrics
    assert torch.equal(env.step(given(name))[1], rewards)


def test_the_mean_of_timesteps_between_the_grids_is_their_own():
    decisions = Decisions(3, 2, torch.device("cpu"), keep_history=False)
    choice = Choice(torch.tensor([[7], [11], [95]]), torch.tensor([[0], [1], [2]]))
    decisions.add(choice, torch.zeros(3))
    found = decisions.drain((0, 10, 100))
    assert found["timestep/mean"] == pytest.approx((7 + 11 + 95) / 3)
    assert found["timestep/counts"] == [1, 1, 1]
    assert decisions.drain((0, 10, 100)) == {}


def test_the_entropy_of_a_single_choice_is_no_minus_0():
    decisions = Decisions(1, 2, torch.device("cpu"), keep_history=False)
    decisions.add(Choice(*torch.full((2, 3, 1), 0)), torch.zeros(3))
    assert str(decisions.drain((80,))["timestep/entropy"]) == "0.0"


@pytest.mark.parametrize(
    ("name", "actions", "sentence"),
    [
        ("timestep_set", [[0, 0], [1, 5], [0, 0], [0, 0]], r"\[1, 5\] given; allowed: 4 of Multi"),
        ("timestep_set", [0, 1, 2, 3], r"int64 \(4,\) given; allowed: 4 of MultiDiscrete\(\[5 5"),
        ("timestep_set", np.zeros((4, 2)), r"float64 \(4, 2\) given"),
        ("timestep_and_layer", [[0, 2]] * 4, r"\[0, 2\] given; .*MultiDiscrete\(\[5 2\]\)"),
        ("layer", [0, 1, 2, 0], r"2 given; allowed: 4 of Discrete\(2\)"),
        ("continuous_timestep", [[0.0], [1.5], [0.0], [0.0]], r"1\.5 given; allowed: 4 of Box"),
    ],
)
def test_actions_outside_the_space_are_refused_and_nothing_moves(env_of, name, actions, sentence):
    env = env_of(name)
    before = env._ids.clone()
    with pytest.raises(ValueError, match=f"^actions: {sentence}"):
        env.step(np.float32(actions) if name == "continuous_timestep" else actions)
    assert torch.equal(env._ids, before) and env.trainer.steps == 0


def test_no_step_waits_for_the_device(env, name, monkeypatch):
    actions = torch.from_numpy(given(name))
    monkeypatch.setattr(env, "_checked", lambda actions: actions)
    monkeypatch.setattr(env.trainer.updates, "watch", lambda steps: None)

    def wait(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host waits for the device")

    for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, method, wait)
    for _ in range(2):
        env.step(actions)
    monkeypatch.undo()
    assert env.drain_metrics()["timestep/counts"] == [2 * count for count in COUNTS[name]]


def test_masks_close_timesteps_of_low_signal_and_no_layer(env, name, monkeypatch):
    valid = env.trainer.parts.valid_actions(0.2)
    plain = np.tile(valid.numpy(), (4, 1))
    assert name == "layer" or 0 < valid.sum() < 5
    monkeypatch.setattr(env, "_valid", valid)
    expected = {
        "continuous_timestep": plain,
        "layer": np.ones((4, 2), bool),
        "timestep_and_layer": np.hstack((plain, np.ones((4, 2), bool))),
        "timestep_set": np.hstack((plain, plain)),
    }
    np.testing.assert_array_equal(env.action_masks(), expected[name])


@pytest.mark.parametrize(
    ("name", "action"), [("timestep_set", [3, 3]), ("continuous_timestep", [0.75])]
)
def test_what_means_one_timestep_of_the_grid_earns_what_that_timestep_does(
    tiny, env_of, name, action
):
    plain, env = RepFusionVectorEnv(4, tiny), env_of(name)
    plain.reset(seed=0)
    for _ in range(3):
        expected = plain.step([3] * 4)[1]
        torch.testing.assert_close(env.step([action] * 4)[1], expected, rtol=1e-3, atol=1e-3)


def test_the_order_of_a_set_does_not_matter(env_of):
    view = env_of("timestep_set").heldout_view(4)
    view.reset(seed=0)
    first = view.step([[0, 3]] * 4)[1]
    view.reset(seed=0)
    torch.testing.assert_close(view.step([[3, 0]] * 4)[1], first)
    view.reset(seed=0)
    assert not torch.allclose(view.step([[3, 3]] * 4)[1], first)


def test_layers_are_worth_different_rewards(env_of):
    view = env_of("layer").heldout_view(4)
    rewards = []
    for actions in ([0] * 4, [1] * 4, [0, 1, 0, 1]):
        view.reset(seed=0)
        rewards.append(view.step(actions)[1])
    assert not torch.allclose(rewards[0], rewards[1])
    mixed = torch.where(torch.tensor([False, True] * 2), rewards[1], rewards[0])
    torch.testing.assert_close(rewards[2], mixed)


def test_a_frame_shows_every_space(tiny, name, overrides):
    env = RepFusionVectorEnv(4, tiny, render_mode="rgb_array", **overrides)
    env.reset(seed=0)
    before = env.frame(1)
    env.step(given(name))
    assert env.frame(1).shape == before.shape == (480, 1120, 3)
    assert (env.frame(1) != before).any()
    assert (env.frame(0) != env.frame(1)).any()
