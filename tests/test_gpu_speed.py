"""Fast steps on a CUDA device; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from repfusion_env import load_config
from repfusion_env.vector_env import RepFusionVectorEnv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAST: dict[str, dict[str, Any]] = {
    "compiled": {"speed": "on"},
    "graphs": {"speed": {"compile": "on", "cuda_graphs": True}},
    "graphs, several looks and updates": {
        "speed": {"compile": "on", "cuda_graphs": True},
        "fusion.timesteps": [100],
        "optimizer.updates": 2,
        "reward.student": "training",
    },
    "fp16": {"precision": "fp16", "channels_last": True},
}


def _env(tiny: dict[str, Any], settings: dict[str, Any]) -> RepFusionVectorEnv:
    config = load_config(load_config(tiny | {"device": "cuda", "env": {"num_envs": 8}}), settings)
    env = RepFusionVectorEnv(config=config)
    env.reset(seed=0)
    return env


@pytest.mark.parametrize("case", FAST)
def test_a_fast_step_waits_for_the_device_nowhere(tiny, case):
    env = _env(tiny, FAST[case])
    actions = torch.zeros(env.num_envs, dtype=torch.int64, device=env.device)
    for _ in range(4):  # kernels are compiled, then recorded
        env.step(actions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            env.step(actions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert env.drain_metrics()["student/nonfinite_steps"] == 0


@pytest.mark.parametrize("case", ["compiled", "graphs", "graphs, several looks and updates"])
def test_a_fast_run_learns_what_the_plain_one_learns(tiny, case):
    plain = {key: value for key, value in FAST[case].items() if key != "speed"}
    losses = []
    for settings in (plain, FAST[case]):
        env = _env(tiny, {**settings, "optimizer.name": "sgd"})
        actions = torch.arange(8, device=env.device) % len(env.grid)
        losses.append(torch.stack([env.step(actions)[-1]["distillation_loss"] for _ in range(6)]))
    torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)


def test_weights_that_wait_in_main_memory_are_pinned_and_give_the_same(tiny):
    found = []
    for offload in ("none", "cpu"):
        env = _env(tiny, {"teacher.offload": offload})
        teacher = env.trainer.parts.teacher
        images = env.bank.pixels(torch.arange(4, device=env.device))
        timesteps = torch.full((4,), 100, device=env.device)
        found.append(next(iter(teacher.features(images, timesteps).values())))
    assert all(parameter.is_pinned() for parameter in teacher.offload.home.values())
    torch.testing.assert_close(*found)
