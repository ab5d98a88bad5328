from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

import repfusion_env
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.sb3 import RepFusionVecEnv, _in_one_transfer, _to_host

ACTIONS = np.array([0, 1, 2, 3])


def _adapter(tiny: dict[str, Any], **overrides: Any) -> RepFusionVecEnv:
    return repfusion_env.sb3.make_sb3_vec_env(4, tiny, **overrides)


def test_the_adapter_shows_what_the_environment_does(tiny):
    adapter, env = _adapter(tiny), RepFusionVectorEnv(4, tiny)
    adapter.seed(3)
    np.testing.assert_array_equal(adapter.reset(), env.reset(seed=3)[0].numpy())
    for _ in range(5):
        observations, rewards, dones, infos = adapter.step(ACTIONS)
        expected = env.step(ACTIONS)
        np.testing.assert_array_equal(observations, expected[0].numpy())
        np.testing.assert_array_equal(rewards, expected[1].numpy())
        assert dones.dtype == bool
        assert dones.all()
        for lane, info in enumerate(infos):
            final = expected[4]["final_obs"][lane].numpy()
            np.testing.assert_array_equal(info["terminal_observation"], final)
            assert info["episode"] == {"r": pytest.approx(rewards[lane]), "l": 1}
            assert info["TimeLimit.truncated"] is False
    # The seed was for one reset; the next goes on.
    steps = adapter.env.trainer.steps
    adapter.reset()
    assert adapter.env.trainer.steps == steps


def test_infos_are_filled_for_finished_lanes_alone_with_returns_of_whole_episodes(tiny):
    adapter = _adapter(tiny, env={"episode_length": 3})
    adapter.seed(0)
    adapter.reset()
    adapter.step(ACTIONS)
    adapter.env.reset(options={"reset_mask": np.array([True, True, False, False])})
    adapter._returns[:2], adapter._lengths[:2] = 0, 0
    collected, copies = [], []
    for _ in range(3):
        _, rewards, dones, infos = adapter.step(ACTIONS)
        collected.append(rewards)
        for lane, info in enumerate(infos):
            assert bool(info) == dones[lane]
            if info:
                assert info["TimeLimit.truncated"] is True
                assert info["episode"]["l"] == 3
                found = info["terminal_observation"]
                copies.append((found, found.copy()))
    assert infos[0]["episode"]["r"] == pytest.approx(sum(r[0] for r in collected), rel=1e-5)
    for _ in range(3):
        adapter.step(ACTIONS)
    assert len(copies) == 4
    assert all(np.array_equal(kept, copy) and kept.base is None for kept, copy in copies)


@pytest.mark.parametrize("shape", [(7,), (1, 4, 4)])
def test_one_transfer_gives_what_separate_ones_give(shape):
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(4, *shape, generator=generator),
        torch.randn(4, generator=generator),
        torch.tensor([True, False, True, True]),
        torch.tensor([False, True, False, False]),
        torch.randn(4, *shape, generator=generator),
    ]
    for together, apart in zip(_in_one_transfer(parts), _to_host(parts), strict=True):
        np.testing.assert_array_equal(together, apart)
        assert together.dtype == apart.dtype == np.float32
        assert together.flags["C_CONTIGUOUS"]


def test_attributes_and_methods_are_dealt_out_to_lanes(tiny):
    adapter = _adapter(tiny, timesteps={"min_snr": 0.2})
    adapter.reset()
    assert adapter.get_attr("num_envs", [0, 2]) == [4, 4]
    assert adapter.has_attr("action_masks")
    assert not adapter.has_attr("nothing")
    assert adapter.env_is_wrapped(Monitor) == [True] * 4
    assert adapter.env_is_wrapped(gym.Wrapper, [0]) == [False]
    assert is_masking_supported(adapter)
    masks = get_action_masks(adapter)
    np.testing.assert_array_equal(masks, adapter.env.action_masks())
    assert masks.shape == (4, 5)
    assert not masks.all()
    adapter.set_attr("note", 1)
    assert adapter.env.note == 1
    with pytest.raises(ValueError, match="shared by all lanes"):
        adapter.set_attr("note", 2, indices=[1])


def test_images_are_frames_of_all_lanes(tiny):
    adapter = _adapter(tiny, render_mode="rgb_array")
    adapter.reset()
    adapter.step(ACTIONS)
    frames = adapter.get_images()
    assert len(frames) == 4
    assert all(frame.dtype == np.uint8 and frame.ndim == 3 for frame in frames)


def test_ppo_learns_from_the_adapter_under_usual_wrappers_without_a_warning(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = VecNormalize(_adapter(tiny), norm_obs=False)
        model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=1, device="cpu", seed=0)
        before = [p.clone() for p in model.policy.parameters()]
        model.learn(64)
    assert model.num_timesteps == 64
    assert len(model.ep_info_buffer) == 64
    assert not all(map(torch.equal, before, model.policy.parameters()))


def test_ppo_learns_from_gym_make_in_both_action_spaces(tiny):
    for action in ("discrete", "continuous"):
        env = gym.make("RepFusion-v0", config=tiny, env={"action": action})
        model = PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu", seed=0)
        model.learn(16)
        assert model.num_timesteps == 16


def test_eval_callback_on_a_heldout_view_does_not_change_training(tiny, learned, tmp_path):
    results = []
    for evaluate in (False, True):
        env = _adapter(tiny)
        model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=1, device="cpu", seed=0)
        callback = None
        if evaluate:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                callback = EvalCallback(
                    env.heldout_view(),
                    n_eval_episodes=8,
                    eval_freq=4,
                    log_path=str(tmp_path),
                    verbose=0,
                )
        model.learn(64, callback=callback)
        results.append(learned(env.env.trainer))
    assert all(map(torch.equal, *results))
    saved = np.load(tmp_path / "evaluations.npz")["results"]
    assert saved.shape == (4, 8)
    assert np.isfinite(saved).all()


def test_a_heldout_evaluation_is_the_mean_reward_of_the_policys_choices(tiny):
    env = _adapter(tiny)
    model = PPO("MlpPolicy", env, device="cpu", seed=0)
    env.reset()
    env.step(ACTIONS)
    mean, _ = evaluate_policy(model, env.heldout_view(10), n_eval_episodes=40)
    view = env.env.heldout_view(40)
    observations, _ = view.reset()
    actions, _ = model.predict(observations.numpy(), deterministic=True)
    assert mean == pytest.approx(float(view.step(actions)[1].mean()), rel=1e-5)


def test_vec_monitor_agrees_with_the_adapters_own_episodes(tiny):
    adapter = _adapter(tiny, env={"episode_length": 2})
    own = []
    step_wait = adapter.step_wait

    def spied():
        result = step_wait()
        own.append([info.get("episode") for info in result[3]])
        return result

    adapter.step_wait = spied  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        monitor = VecMonitor(adapter)
    monitor.reset()
    for _ in range(4):
        infos = monitor.step(ACTIONS)[3]
        for mine, info in zip(own[-1], infos, strict=True):
            if mine:
                assert info["episode"]["r"] == pytest.approx(mine["r"], rel=1e-4)
                assert info["episode"]["l"] == mine["l"] == 2
    assert sum(map(bool, own[-1])) == 4


def test_a_saved_adapter_keeps_the_returns_of_running_episodes(tiny):
    adapter, resumed = (_adapter(tiny, env={"episode_length": 3}) for _ in range(2))
    adapter.seed(1)
    adapter.reset()
    adapter.step(ACTIONS)
    resumed.reset()
    resumed.env.load_state_dict(adapter.env.state_dict())
    resumed.load_state_dict(adapter.state_dict())
    for _ in range(2):
        first, second = adapter.step(ACTIONS), resumed.step(ACTIONS)
    assert [info["episode"] for info in first[3]] == [info["episode"] for info in second[3]]
