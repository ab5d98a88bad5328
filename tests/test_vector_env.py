"""The torch-native vector environment."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.wrappers.vector import ArrayConversion, NormalizeReward, RecordEpisodeStatistics

from repfusion_env.devices import refuse_fork
from repfusion_env.envs import RepFusionVectorEnv

LONG = {"env.episode_length": 3}


def _rollout(env: RepFusionVectorEnv, steps: int, seed: int | None = None) -> list[torch.Tensor]:
    """Every tensor of a rollout with fixed actions."""
    generator = torch.Generator().manual_seed(0)
    found = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        actions = torch.randint(0, 5, (env.num_envs,), generator=generator)
        observations, reward, terminated, truncated, info = env.step(actions)
        found += [observations, reward, terminated, truncated, *_flat(info)]
    return found


def _flat(info: dict[str, Any]) -> list[torch.Tensor]:
    tensors = []
    for value in info.values():
        tensors += _flat(value) if isinstance(value, dict) else [value]
    return tensors


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_everything_is_a_tensor_of_the_documented_kind(tiny):
    env = RepFusionVectorEnv(4, tiny, reward="student_gain")
    observations, info = env.reset(seed=0)
    assert set(info) == {"image_id"}
    observations, reward, terminated, truncated, info = env.step([0, 1, 2, 3])
    assert (observations.dtype, reward.dtype) == (torch.float32, torch.float32)
    assert (terminated.dtype, truncated.dtype) == (torch.bool, torch.bool)
    assert reward.shape == terminated.shape == truncated.shape == (4,)
    assert env.observation_space.contains(observations.numpy())
    assert info["timestep"].tolist() == [0, 200, 400, 600]
    torch.testing.assert_close(reward, info["task_loss_before"] - info["task_loss_after"])
    assert all(isinstance(value, torch.Tensor) for value in _flat(info))


def test_one_step_episodes_terminate_and_show_where_they_ended(tiny):
    env = RepFusionVectorEnv(4, tiny)
    shown, shown_info = env.reset(seed=0)
    for _ in range(4):
        observations, _, terminated, truncated, info = env.step([0, 1, 2, 3])
        assert terminated.all()
        assert not truncated.any()
        assert torch.equal(info["final_obs"], shown)
        assert info["_final_obs"].all()
        assert info["_final_info"].all()
        assert torch.equal(info["final_info"]["image_id"], shown_info["image_id"])
        assert info["final_info"]["_image_id"].all()
        shown, shown_info = observations, {"image_id": env._ids.clone()}


def test_lanes_out_of_phase_end_on_their_own(tiny):
    env = RepFusionVectorEnv(4, tiny, **LONG)
    env.reset(seed=0)
    env.step([0, 0, 0, 0])
    kept = env.observe()
    mask = np.array([False, True, False, True])
    observations, info = env.reset(options={"reset_mask": mask})
    assert torch.equal(observations[~mask], kept[~mask])
    assert not torch.equal(observations[mask], kept[mask])
    assert env.trainer.steps == 1
    seen = []
    for _ in range(6):
        observations, _, terminated, truncated, info = env.step([1, 1, 1, 1])
        seen.append(truncated.tolist())
        assert not terminated.any()
        assert ("final_obs" in info) == bool(truncated.any())
        if truncated.any():
            assert torch.equal(info["_final_obs"], truncated)
            assert torch.equal(info["_final_info"], truncated)
            assert torch.equal(info["final_info"]["_timestep"], truncated)
            # The sequence would have gone on with the images now shown.
            assert torch.equal(info["final_obs"][truncated], observations[truncated])
    first, second = [True, False, True, False], [False, True, False, True]
    nobody = [False] * 4
    assert seen == [nobody, first, second, nobody, first, second]


def test_a_partial_reset_draws_the_next_images_for_its_lanes_alone(tiny):
    env, other = RepFusionVectorEnv(4, tiny), RepFusionVectorEnv(4, tiny)
    ids = env.reset(seed=0)[1]["image_id"]
    following = other.reset(seed=0) and other.step([0] * 4) and other._ids
    partly = env.reset(options={"reset_mask": torch.tensor([True, False, False, True])})[1]
    assert partly["image_id"].tolist() == [following[0], ids[1], ids[2], following[1]]


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros(4, bool),
        np.ones(3, bool),
        np.ones((4, 1), bool),
        np.array([0, 1, 0, 1]),
        [1.0, 0.0, 0.0, 0.0],
    ],
)
def test_a_wrong_reset_mask_is_refused(tiny, mask):
    env = RepFusionVectorEnv(4, tiny)
    env.reset(seed=0)
    before = env._ids.clone()
    with pytest.raises(ValueError, match=r"reset_mask: .* given; it must be bool \(4,\)"):
        env.reset(options={"reset_mask": mask})
    assert torch.equal(env._ids, before)


def test_lanes_of_a_group_hold_one_image(tiny):
    env = RepFusionVectorEnv(6, tiny, env={"group_size": 3})
    ids = env.reset(seed=0)[1]["image_id"].view(2, 3)
    for _ in range(3):
        assert (ids == ids[:, :1]).all()
        assert ids[0, 0] != ids[1, 0]
        ids = env.step([0, 1, 2, 2, 1, 0])[4] and env._ids.view(2, 3)
    half = np.array([True, True, False, False, False, False])
    with pytest.raises(ValueError, match="lanes of one group of 3 hold the same image"):
        env.reset(options={"reset_mask": half})
    env.reset(options={"reset_mask": np.repeat([True, False], 3)})
    assert (env._ids.view(2, 3) == env._ids.view(2, 3)[:, :1]).all()
    with pytest.raises(ValueError, match="5 lanes cannot be divided into groups of 3"):
        RepFusionVectorEnv(5, tiny, env={"group_size": 3})
    with pytest.raises(ValueError, match="num_envs: 4 lanes cannot be divided into groups of 3"):
        env.heldout_view(4)


@pytest.mark.parametrize(
    "overrides",
    [{}, LONG, {"env.group_size": 2}, {"observation": "student", "student.ema": 0.9}],
)
def test_a_seeded_reset_repeats_the_trajectory_to_the_last_bit(tiny, overrides):
    env = RepFusionVectorEnv(4, tiny, **overrides)
    first = _rollout(env, 6, seed=9)
    goes_on = _rollout(env, 6)
    assert env.trainer.steps == 12
    assert _same(first, _rollout(env, 6, seed=9))
    assert _same(goes_on, _rollout(env, 6))
    assert not _same(first, _rollout(env, 6, seed=10))
    assert _same(first, _rollout(RepFusionVectorEnv(4, tiny, **overrides), 6, seed=9))


def test_the_configured_seed_is_used_without_another(tiny):
    first = _rollout(RepFusionVectorEnv(4, tiny, seed=5), 3)
    assert _same(first, _rollout(RepFusionVectorEnv(4, tiny), 3, seed=5))


@pytest.mark.parametrize("seed", [[1, 2, 3, 4], 1.0, "1", True])
def test_a_seed_is_one_integer(tiny, seed):
    env = RepFusionVectorEnv(4, tiny)
    with pytest.raises(TypeError, match="the seed is one int"):
        env.reset(seed=seed)
    with pytest.raises(ValueError, match="a seed restarts the student of all lanes"):
        env.reset(seed=1, options={"reset_mask": np.array([True, False, False, False])})


@pytest.mark.parametrize("source", ["teacher", "pixels", "student"])
@pytest.mark.parametrize("length", [1, 2])
def test_what_is_returned_is_never_written_again(tiny, source, length):
    env = RepFusionVectorEnv(4, tiny, observation=source, env={"episode_length": length})
    found = _rollout(env, 4, seed=0)
    copies = [value.clone() for value in found]
    _rollout(env, 4)
    assert _same(found, copies)
    # Nor does writing into it reach the environment.
    expected = _rollout(env, 3, seed=0)[-20:]
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    spoilt: list[torch.Tensor] = []
    for _ in range(3):
        actions = torch.randint(0, 5, (4,), generator=generator)
        observations, *rest, info = env.step(actions)
        given = [observations, *rest, *_flat(info)]
        spoilt += [value.clone() for value in given]
        for value in given:
            value.zero_()
    pointers = [value.data_ptr() for value in given]
    assert len(set(pointers)) == len(pointers)
    assert _same(spoilt[-20:], expected)


@pytest.mark.parametrize(
    "actions",
    [
        [0, 1, 2, 5],
        [0, -1, 2, 3],
        [0, 1, 2],
        [[0], [1], [2], [3]],
        [0.0, 1.0, 2.0, 3.0],
        torch.tensor([True, False, True, True]),
        [0, 1, None, 2],
        [[0, 1], [2]],
        np.array([1, 2, 3, 2**63], np.uint64),
        np.array([1j, 2, 3, 4]),
        3,
    ],
)
def test_actions_outside_the_space_are_refused_and_nothing_moves(tiny, learned, actions):
    env = RepFusionVectorEnv(4, tiny)
    env.reset(seed=0)
    before = [env._ids.clone(), *learned(env.trainer)]
    with pytest.raises(ValueError, match=r"^actions: .* given; allowed: 4 of Discrete\(5\)$"):
        env.step(actions)
    assert _same(before, [env._ids, *learned(env.trainer)])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint64, np.int32])
def test_any_integers_are_actions(tiny, dtype):
    env = RepFusionVectorEnv(4, tiny)
    env.reset(seed=0)
    info = env.step(np.array([4, 0, 1, 2], dtype))[4]
    assert info["timestep"].tolist() == [800, 0, 200, 400]
    assert env.drain_metrics()["timestep/counts"] == [1, 1, 1, 0, 1]


def test_steps_before_reset_and_after_close_are_refused(tiny):
    env = RepFusionVectorEnv(4, tiny)
    with pytest.raises(ResetNeeded):
        env.step([0] * 4)
    env.reset(seed=0)
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step([0] * 4)):
        with pytest.raises(ClosedEnvironmentError):
            call()


@pytest.mark.parametrize("reward", ["student_lookahead", "student_gain", "teacher_probe"])
def test_a_heldout_view_leaves_training_as_it_would_have_been(tiny, learned, reward):
    overrides = {"reward": reward, "student.ema": 0.9, "observation.student_state": True}
    env, alone = RepFusionVectorEnv(4, tiny, **overrides), RepFusionVectorEnv(4, tiny, **overrides)
    view = env.heldout_view(8)
    trajectories: list[list[torch.Tensor]] = [[], []]
    for found, one in zip(trajectories, (env, alone), strict=True):
        found.append(one.reset(seed=2)[0])
        for step in range(4):
            if one is env:
                before = learned(env.trainer)
                view.reset(seed=step)
                view.step([step] * 8)
                assert _same(before, learned(env.trainer))
            found += one.step([0, 1, 2, 3])[:2]
        found += learned(one.trainer)
    assert _same(*trajectories)
    assert env.drain_metrics() == alone.drain_metrics()


def test_a_heldout_view_shows_every_image_in_order_with_the_same_noise(tiny):
    env = RepFusionVectorEnv(4, tiny)
    view = env.heldout_view(10)
    ids = view.reset(seed=0)[1]["image_id"].tolist()
    rewards = []
    for _ in range(8):
        rewards.append(view.step([2] * 10)[1])
        ids += view._ids.tolist()
    assert ids[:40] == list(range(40))
    assert _same(rewards[:4], rewards[4:])  # the second pass over the same 40 images
    assert view.bank.images.data_ptr() != env.bank.images.data_ptr()
    with pytest.raises(ValueError, match="num_envs: -1 given"):
        env.heldout_view(-1)


def test_a_saved_environment_goes_on_to_the_last_bit(tiny):
    env, resumed = RepFusionVectorEnv(4, tiny, **LONG), RepFusionVectorEnv(4, tiny, **LONG)
    _rollout(env, 4, seed=8)
    observations = resumed.load_state_dict(copy.deepcopy(env.state_dict()))
    assert torch.equal(observations, env.observe())
    trajectories = []
    for one in (env, resumed):
        found = []
        for _ in range(5):
            *step, info = one.step([0, 1, 2, 3])
            found += [*step, *_flat(info)]
        trajectories.append(found)
    assert _same(*trajectories)
    assert env.drain_metrics() == resumed.drain_metrics()


def test_a_state_of_other_lanes_or_of_none_is_refused_and_nothing_changes(tiny, learned):
    env, other = RepFusionVectorEnv(4, tiny), RepFusionVectorEnv(np.int64(2), tiny)
    with pytest.raises(ResetNeeded, match="before state_dict"):
        env.state_dict()
    other.reset(seed=1)
    env.reset(seed=0)
    before = learned(env.trainer)
    with pytest.raises(ValueError, match="saved with 2 lanes, this environment has 4"):
        env.load_state_dict(other.state_dict())
    assert _same(before, learned(env.trainer))


def test_no_step_waits_for_the_device(tiny, monkeypatch):
    """As on CUDA, where actions are already on the device; whatever would make it wait raises."""
    env = RepFusionVectorEnv(4, tiny, observation={"student_state": True})
    env.reset(seed=0)
    actions = torch.tensor([0, 1, 2, 3])
    monkeypatch.setattr(env, "_checked", lambda given: given)
    monkeypatch.setattr(env.trainer.updates, "watch", lambda steps: None)

    def wait(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    for _ in range(3):
        env.step(actions)
    monkeypatch.undo()
    assert env.drain_metrics()["timestep/counts"] == [3, 3, 3, 3, 0]


def test_metrics_are_means_since_the_last_look(tiny):
    env = RepFusionVectorEnv(4, tiny)
    env.reset(seed=0)
    rewards = torch.stack([env.step([0, 1, 1, 4])[1] for _ in range(3)])
    metrics = env.drain_metrics()
    assert metrics["reward/mean"] == pytest.approx(float(rewards.double().mean()))
    assert metrics["timestep/mean"] == pytest.approx((0 + 200 + 200 + 800) / 4)
    assert metrics["timestep/entropy"] == pytest.approx(1.5 * np.log(2))
    assert metrics["timestep/counts"] == [3, 6, 0, 0, 3]
    assert "reward/mean" not in env.drain_metrics()
    last = env.step([0] * 4)[1]
    assert env.drain_metrics()["reward/mean"] == pytest.approx(float(last.double().mean()))


def test_a_cuda_trainer_refuses_another_process(tiny, monkeypatch):
    refuse_fork(torch.device("cuda"), os.getpid())
    refuse_fork(torch.device("cpu"), os.getpid() + 1)
    env = RepFusionVectorEnv(4, tiny)
    env.reset(seed=0)
    monkeypatch.setattr(env, "device", torch.device("cuda"))
    monkeypatch.setattr(env, "_pid", os.getpid() + 1)
    with pytest.raises(RuntimeError, match="CUDA does not survive a fork, so use lanes"):
        env.step([0] * 4)


def test_array_conversion_and_numpy_wrappers_work_without_a_warning(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make_vec("RepFusion-v0", num_envs=4, config=tiny, **{"env.episode_length": 2})
        converted = ArrayConversion(env, env_xp=torch, target_xp=np)
        wrapped = NormalizeReward(RecordEpisodeStatistics(converted))
        observations, _ = wrapped.reset(seed=0)
        assert isinstance(observations, np.ndarray)
        returns = np.zeros(4)
        plain = RepFusionVectorEnv(4, tiny, **{"env.episode_length": 2})
        plain.reset(seed=0)
        for _ in range(2):
            _, rewards, _, truncated, info = wrapped.step(np.array([0, 1, 2, 3]))
            returns += plain.step([0, 1, 2, 3])[1].numpy()
    assert isinstance(rewards, np.ndarray)
    assert truncated.all()
    np.testing.assert_allclose(info["episode"]["r"], returns, rtol=1e-5)
    assert (info["episode"]["l"] == 2).all()


def test_training_goes_on_inside_no_grad_and_inference_mode(tiny, learned):
    env, other = RepFusionVectorEnv(4, tiny), RepFusionVectorEnv(4, tiny)
    expected = _rollout(other, 3, seed=0)
    with torch.no_grad():
        assert _same(expected, _rollout(env, 3, seed=0))
    assert _same(learned(env.trainer), learned(other.trainer))
