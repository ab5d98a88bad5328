"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from repfusion_env import load_config
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.sb3 import RepFusionVecEnv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def on_gpu(tiny: dict[str, Any]) -> dict[str, Any]:
    return tiny | {"device": "cuda"}


@pytest.mark.parametrize("task", ["classification", "segmentation", "landmarks", "detection"])
def test_a_step_waits_for_the_device_nowhere(on_gpu, task):
    dense = {
        "task": task,
        "data.name": "digit_scenes",
        "distillation.dense": True,
        "teacher.image_size": 16,
        "augmentation": {"rotation": 10.0, "jitter": 0.2},
    }
    chosen = {} if task == "classification" else dense
    env = RepFusionVectorEnv(config=load_config(load_config(on_gpu), chosen))
    env.reset(seed=0)
    actions = torch.zeros(env.num_envs, dtype=torch.int64, device=env.device)
    env.step(actions)  # the first one selects kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            env.step(actions)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_first_rewards_are_those_of_the_cpu(on_gpu, tiny):
    rewards = []
    for config in (tiny, on_gpu):
        env = RepFusionVectorEnv(config=config)
        env.reset(seed=0)
        rewards.append(env.step(torch.arange(env.num_envs) % len(env.grid))[1].cpu())
    torch.testing.assert_close(*rewards, rtol=1e-2, atol=1e-2)


def test_actions_outside_the_space_are_reported_at_the_next_drain(on_gpu):
    env = RepFusionVectorEnv(config=on_gpu)
    env.reset(seed=0)
    env.step(torch.full((env.num_envs,), 99, device=env.device))
    with pytest.raises(ValueError, match="4 actions outside"):
        env.drain_metrics()


def test_the_adapter_hands_out_numpy_arrays(on_gpu):
    env = RepFusionVecEnv(RepFusionVectorEnv(config=on_gpu))
    observations = env.reset()
    stepped, rewards, dones, infos = env.step(env.action_space.sample().repeat(env.num_envs))
    assert observations.shape == stepped.shape
    assert rewards.shape == dones.shape == (env.num_envs,)
    assert infos[0]["terminal_observation"].shape == observations[0].shape


def test_the_callers_cuda_generator_is_left_alone(on_gpu):
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    env = RepFusionVectorEnv(config=on_gpu)
    env.reset(seed=0)
    env.step([0] * env.num_envs)
    assert torch.equal(torch.cuda.get_rng_state(), before)
