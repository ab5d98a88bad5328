"""The cache on a CUDA device: the same features, and no waiting once all are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from repfusion_env.config_loading import merge
from repfusion_env.envs import RepFusionVectorEnv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("flip", [False, True])
def test_steps_out_of_a_full_cache_wait_nowhere(store, flip, tiny: dict[str, Any], tmp_path: Path):
    keys = {
        "device": "cuda",
        "teacher.noise": "fixed",
        "data.train_limit": 16,
        "augmentation.flip": flip,
        "cache": {"store": store, "folder": str(tmp_path)},
    }
    env = RepFusionVectorEnv(config=merge(tiny, keys))
    env.reset(seed=0)
    trainer, ids = env.trainer, torch.arange(16, device=env.device)
    bank, features = trainer.parts.train, trainer.parts.features
    at = torch.tensor(env.grid.timesteps, device=env.device).expand(16, -1)
    for images in (None, bank.pixels(ids).flip(-1))[: 1 + flip]:
        kept = [z for (z,) in features.each(bank, ids, at, ids, trainer.noise_seed, images)]
        caches, features.caches = features.caches, None
        plain = [z for (z,) in features.each(bank, ids, at, ids, trainer.noise_seed, images)]
        features.caches = caches
        torch.testing.assert_close(kept, plain, rtol=1e-3, atol=1e-3)
    assert features.caches.of(bank, trainer.noise_seed).memory.complete
    actions = torch.zeros(env.num_envs, dtype=torch.int64, device=env.device)
    env.step(actions)  # the first one selects kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            env.step(actions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert features.caches.summary()["computed"] == 16 * 5 * (1 + flip)
