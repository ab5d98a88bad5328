"""Overrides under which each action space beyond the grid's own timesteps can be made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from repfusion_env.envs import RepFusionVectorEnv

LAYERS = ["down_blocks.0.resnets.0.conv2", "mid_block.resnets.1.conv2"]
SPACES: dict[str, dict[str, Any]] = {
    "continuous_timestep": {"env.action": "continuous_timestep"},
    "layer": {"env.action": "layer", "timesteps": {"values": [200]}, "teacher.layers": LAYERS},
    "timestep_and_layer": {"env.action": "timestep_and_layer", "teacher.layers": LAYERS},
    "timestep_set": {"env.action": "timestep_set", "env.set_size": 2},
}


@pytest.fixture(params=SPACES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def overrides(name: str) -> dict[str, Any]:
    """Of the action space that the test runs with."""
    return SPACES[name]


@pytest.fixture(scope="session")
def made() -> dict[str, RepFusionVectorEnv]:
    """Environments are made once; a seeded reset restarts everything in them."""
    return {}


@pytest.fixture
def env_of(
    tiny: dict[str, Any], made: dict[str, RepFusionVectorEnv]
) -> Callable[[str], RepFusionVectorEnv]:
    """Four lanes of an action space, newly reset."""

    def make(name: str) -> RepFusionVectorEnv:
        if name not in made:
            made[name] = RepFusionVectorEnv(4, tiny, **SPACES[name])
        made[name].reset(seed=0)
        made[name].drain_metrics()
        return made[name]

    return make


@pytest.fixture
def env(env_of: Callable[[str], RepFusionVectorEnv], name: str) -> RepFusionVectorEnv:
    """Four lanes of the action space that the test runs with, newly reset."""
    return env_of(name)
