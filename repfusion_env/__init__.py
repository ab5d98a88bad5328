"""Choosing the diffusion timestep for representation distillation, as a Gymnasium environment.

Importing this package registers ``RepFusion-v0`` and loads nothing heavy; the names below are
imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from repfusion_env.registration import ENV_ID, register

if TYPE_CHECKING:
    from repfusion_env import sb3 as sb3
    from repfusion_env.config import ExperimentConfig as ExperimentConfig
    from repfusion_env.config_loading import ConfigError as ConfigError
    from repfusion_env.config_loading import load_config as load_config
    from repfusion_env.envs import RepFusionEnv as RepFusionEnv
    from repfusion_env.envs import RepFusionVectorEnv as RepFusionVectorEnv
    from repfusion_env.trainer import DistillationTrainer as DistillationTrainer

__version__ = "0.1.0"

_LAZY = {
    "ConfigError": "repfusion_env.config_loading",
    "DistillationTrainer": "repfusion_env.trainer",
    "ExperimentConfig": "repfusion_env.config",
    "RepFusionEnv": "repfusion_env.envs",
    "RepFusionVectorEnv": "repfusion_env.envs",
    "load_config": "repfusion_env.config_loading",
}

__all__ = ["ENV_ID", "register", "sb3", *_LAZY]

register()


def __getattr__(name: str) -> Any:
    if name == "sb3":
        return importlib.import_module("repfusion_env.sb3")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'repfusion_env' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, "sb3"])
