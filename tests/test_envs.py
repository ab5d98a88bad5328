"""The one-lane numpy environment."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import NormalizeReward, RecordEpisodeStatistics, RecordVideo
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from repfusion_env.envs import RepFusionEnv, RepFusionVectorEnv

# What Stable-Baselines3 recommends against and the environment's definition asks for.
RECOMMENDATIONS = {
    "continuous": "We recommend you to use a symmetric and normalized Box action space",
    "pixels": "It seems that your observation|The minimal resolution for an image",
}


@pytest.mark.parametrize(
    ("overrides", "recommendation"),
    [
        ({}, None),
        ({"env": {"episode_length": 3}}, None),
        ({"observation": {"source": "student", "student_state": True}}, None),
        ({"env": {"action": "continuous"}}, "continuous"),
        ({"observation": "pixels"}, "pixels"),
    ],
)
def test_both_checkers_pass_without_a_warning(tiny, overrides, recommendation):
    env = gym.make("RepFusion-v0", config=tiny, render_mode="rgb_array", **overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if recommendation:
            message = RECOMMENDATIONS[recommendation]
            warnings.filterwarnings("ignore", message, UserWarning)
        check_env(env.unwrapped)
        check_env_for_sb3(env.unwrapped)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"env.episode_length": 3},
        {"observation.student_state": True, "reward": "student_gain", "student.ema": 0.9},
        {"env.action": "continuous", "reward": "student"},
    ],
)
def test_the_single_environment_is_one_lane_of_the_vector_environment(tiny, overrides):
    single = RepFusionEnv(tiny, **overrides)
    vector = RepFusionVectorEnv(1, tiny, **overrides)
    observation, info = single.reset(seed=3)
    lane_observation, lane_info = vector.reset(seed=3)
    np.testing.assert_array_equal(observation, lane_observation[0].numpy())
    assert info == {"image_id": int(lane_info["image_id"][0])}
    single.action_space.seed(0)
    for _ in range(30):
        action = single.action_space.sample()
        observation, reward, terminated, truncated, info = single.step(action)
        found = vector.step(np.asarray(action)[None])
        assert reward == float(found[1][0])
        assert (terminated, truncated) == (bool(found[2][0]), bool(found[3][0]))
        finished = terminated or truncated
        shown = found[4]["final_obs"] if finished else found[0]
        np.testing.assert_array_equal(observation, shown[0].numpy())
        lane_info = found[4]["final_info"] if finished else found[4]
        assert info == {
            key: value[0].item() for key, value in lane_info.items() if not key.startswith("_")
        }
        if finished:
            observation, info = single.reset()
            np.testing.assert_array_equal(observation, found[0][0].numpy())


def test_rewards_flags_and_infos_are_python_values(tiny):
    env = RepFusionEnv(tiny)
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(2)
    assert observation.dtype == np.float32
    assert type(reward) is float
    assert (terminated, truncated) == (True, False)
    assert type(terminated) is type(truncated) is bool
    assert info["timestep"] == 400
    assert {type(value) for value in info.values()} == {int, float, bool}


def test_long_episodes_truncate_and_never_terminate(tiny):
    env = RepFusionEnv(tiny, env={"episode_length": 3})
    env.reset(seed=0)
    flags = [env.step(0)[2:4] for _ in range(3)]
    assert flags == [(False, False), (False, False), (False, True)]


def test_a_seed_repeats_the_trajectory_and_no_seed_goes_on(tiny):
    env = RepFusionEnv(tiny)

    def episode(seed=None):
        observation, info = env.reset(seed=seed)
        return info["image_id"], observation.sum(), *env.step(3)[1:2]

    first = [episode(11 if n == 0 else None) for n in range(6)]
    assert env.lane.trainer.steps == 6
    assert [episode(11 if n == 0 else None) for n in range(6)] == first
    assert len({image for image, *_ in first}) == 6
    assert [episode(12 if n == 0 else None) for n in range(6)] != first


@pytest.mark.parametrize(
    ("action", "given"),
    [
        (5, "5 given"),
        (-1, "-1 given"),
        (1.0, r"float64 \(1,\) given"),
        (True, r"bool \(1,\) given"),
        (np.array([1, 2]), r"int64 \(1, 2\) given"),
        (None, "None"),
        ("a", "'a'"),
        (float("nan"), r"float64 \(1,\) given"),
    ],
)
def test_discrete_actions_outside_the_space_are_refused(tiny, action, given):
    env = RepFusionEnv(tiny)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"actions: .*{given}.*allowed: 1 of Discrete\(5\)"):
        env.step(action)
    assert env.lane.trainer.steps == 0
    for fitting in (np.int64(4), np.uint8(4), torch.tensor(4), np.array(4)):
        env.reset()
        assert env.step(fitting)[4]["timestep"] == 800


@pytest.mark.parametrize("action", [[1.01], [-0.01], [np.nan], [np.inf], [0], 0.5, [0.1, 0.2]])
def test_continuous_actions_outside_the_space_are_refused(tiny, action):
    env = RepFusionEnv(tiny, env={"action": "continuous"})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions: .* given; allowed: 1 of Box\(0.0, 1.0"):
        env.step(np.array(action))
    assert env.step(np.array([0.5], np.float32))[4]["timestep"] == 400


def test_steps_before_reset_after_the_end_and_after_close_are_refused(tiny):
    env = RepFusionEnv(tiny)
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(0)
    env.reset(seed=0)
    env.step(0)
    with pytest.raises(ResetNeeded, match="episode"):
        env.step(0)
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(0)):
        with pytest.raises(ClosedEnvironmentError, match="closed"):
            call()


def test_a_heldout_view_trains_nothing_and_is_the_same_each_time(tiny, learned):
    env = RepFusionEnv(tiny)
    env.reset(seed=0)
    env.step(1)
    before = learned(env.lane.trainer)
    view = env.heldout_view()

    def rewards():
        found = []
        view.reset(seed=5)
        for _ in range(3):
            found.append(view.step(2)[1])
            view.reset()
        return found

    assert rewards() == rewards()
    assert all(map(torch.equal, before, learned(env.lane.trainer)))
    assert view.lane.bank is env.lane.trainer.parts.heldout


def test_usual_wrappers_work(tiny, tmp_path):
    env = gym.make("RepFusion-v0", config=tiny, render_mode="rgb_array", env={"episode_length": 4})
    env = RecordVideo(
        env,
        str(tmp_path / "new"),
        step_trigger=lambda step: step == 0,
        video_length=2,
        disable_logger=True,
    )
    env = NormalizeReward(RecordEpisodeStatistics(env))
    env.reset(seed=0)
    raw = []
    for _ in range(4):
        info = env.step(env.action_space.sample())[4]
        raw.append(info["distillation_loss"])
    assert info["episode"]["l"] == 4
    env.close()
    (video,) = tmp_path.glob("new/*.mp4")
    assert video.stat().st_size > 1000
    assert np.isfinite(raw).all()


def test_action_masks_close_timesteps_of_low_signal(tiny):
    from diffusers import DDPMScheduler

    alpha_bar = DDPMScheduler(num_train_timesteps=1000).alphas_cumprod[[0, 200, 400, 600, 800]]
    expected = (alpha_bar / (1 - alpha_bar) >= 0.2).numpy()
    assert expected.any()
    assert not expected.all()
    masks = RepFusionEnv(tiny, timesteps={"min_snr": 0.2}).action_masks()
    np.testing.assert_array_equal(masks, expected)
    assert RepFusionEnv(tiny).action_masks().all()
    with pytest.raises(ValueError, match=r"timesteps\.min_snr: 1000000\.0 closes every timestep"):
        RepFusionEnv(tiny, timesteps={"min_snr": 1e6})


def test_render_mode_and_split_are_checked(tiny):
    with pytest.raises(ValueError, match="render_mode: 'human' given; allowed: None, 'rgb_array'"):
        RepFusionEnv(tiny, render_mode="human")
    with pytest.raises(ValueError, match="split: 'test' given; allowed: 'train', 'heldout'"):
        RepFusionEnv(tiny, split="test")
    with pytest.raises(ValueError, match="held-out images are never trained on"):
        RepFusionEnv(tiny, split="heldout")
    env = RepFusionEnv(tiny)
    with pytest.raises(ValueError, match="a shared trainer brings its own configuration"):
        RepFusionEnv(reward="student", trainer=env.lane.trainer)


def test_group_settings_of_a_shared_configuration_do_not_bother_a_single_environment(tiny):
    grouped = {"env": {"num_envs": 4, "group_size": 2}, "reinforce": {"baseline": "group"}}
    env = RepFusionEnv({**tiny, **grouped})
    env.reset(seed=0)
    assert env.step(0)[2]
