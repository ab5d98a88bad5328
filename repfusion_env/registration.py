"""Registration of ``RepFusion-v0`` with Gymnasium."""

from __future__ import annotations

import gymnasium as gym

ENV_ID = "RepFusion-v0"


def register() -> None:
    """Make ``RepFusion-v0`` known to ``gym.make`` and ``gym.make_vec``; safe to call twice."""
    if ENV_ID in gym.registry:
        return
    gym.register(
        id=ENV_ID,
        entry_point="repfusion_env.envs:RepFusionEnv",
        vector_entry_point="repfusion_env.envs:RepFusionVectorEnv",
    )
