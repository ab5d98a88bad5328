"""Which Stable-Baselines3 algorithms there are, what they act on, and settings that fit here.

This module imports neither SB3 nor torch, so that a wrong pairing is refused at once; only
:func:`check_arguments` loads the algorithm.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repfusion_env.actions import action_kind, names_of_kinds
from repfusion_env.actions.base import Kind
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import ConfigError
from repfusion_env.registry import did_you_mean


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    Attributes:
        path: ``module:class``.
        actions: Kinds of action space that it takes.
        arguments: Settings for one-step episodes on many lanes; ``sb3.arguments`` overrides them.
        policy: Policy class by SB3's name.
    """

    path: str
    actions: tuple[Kind, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    policy: str = "MlpPolicy"

    def load(self) -> Any:
        """The algorithm's class."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)


# Arguments of every algorithm that the run's other options decide.
_OURS = {
    "policy": "sb3.policy",
    "env": "the env section",
    "seed": "seed",
    "device": "sb3.device",
    "tensorboard_log": "run.folder",
    "_init_setup_model": "the run itself",
}

_ALL: tuple[Kind, ...] = ("Discrete", "MultiDiscrete", "Box")
_CATEGORIES: tuple[Kind, ...] = ("Discrete", "MultiDiscrete")
_ONE_OR_BOX: tuple[Kind, ...] = ("Discrete", "Box")
_DISCRETE: tuple[Kind, ...] = ("Discrete",)
_BOX: tuple[Kind, ...] = ("Box",)
# SB3's defaults collect 2,048 steps of every lane before they learn; here a step is 64 decisions.
_PPO = {"n_steps": 8, "batch_size": 256, "n_epochs": 4, "learning_rate": 1e-3, "ent_coef": 0.01}
_REPLAY = {
    "learning_starts": 1_024,
    "buffer_size": 20_000,
    "batch_size": 256,
    "train_freq": 1,
    "learning_rate": 1e-3,
}
_Q = _REPLAY | {"gradient_steps": 2, "target_update_interval": 512, "exploration_fraction": 0.3}

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm("stable_baselines3:PPO", _ALL, _PPO),
    "a2c": Algorithm("stable_baselines3:A2C", _ALL, {"n_steps": 4, "ent_coef": 0.01}),
    "dqn": Algorithm("stable_baselines3:DQN", _DISCRETE, _Q),
    "qrdqn": Algorithm("sb3_contrib:QRDQN", _DISCRETE, _Q),
    "trpo": Algorithm("sb3_contrib:TRPO", _ALL, {"n_steps": 16, "batch_size": 256}),
    "recurrent_ppo": Algorithm("sb3_contrib:RecurrentPPO", _ALL, _PPO, "MlpLstmPolicy"),
    "maskable_ppo": Algorithm("sb3_contrib:MaskablePPO", _CATEGORIES, _PPO),
    "ars": Algorithm(
        "sb3_contrib:ARS", _ONE_OR_BOX, {"n_delta": 8, "n_top": 4, "n_eval_episodes": 64}
    ),
    "sac": Algorithm("stable_baselines3:SAC", _BOX, _REPLAY),
    "td3": Algorithm("stable_baselines3:TD3", _BOX, _REPLAY),
    "ddpg": Algorithm("stable_baselines3:DDPG", _BOX, _REPLAY),
    "tqc": Algorithm("sb3_contrib:TQC", _BOX, _REPLAY),
    "crossq": Algorithm("sb3_contrib:CrossQ", _BOX, _REPLAY),
}


def fitting(kind: Kind) -> list[str]:
    """The algorithms that act on spaces of ``kind``."""
    return [name for name, algorithm in ALGORITHMS.items() if kind in algorithm.actions]


def conflicts(config: ExperimentConfig) -> list[str]:
    """What the configured algorithm cannot do, one sentence each."""
    name = config.sb3.algo
    algorithm = ALGORITHMS.get(name)
    if algorithm is None:
        return [
            f"sb3.algo: unknown algorithm '{name}'.{did_you_mean(name, ALGORITHMS)} "
            f"Allowed: {', '.join(ALGORITHMS)}"
        ]
    found = []
    kind = action_kind(config.env.action)
    if kind not in algorithm.actions:
        found.append(
            f"sb3.algo: {name} acts on {' and '.join(algorithm.actions)} spaces alone, but "
            f"env.action '{config.env.action}' is {kind}; choose one of "
            f"{', '.join(fitting(kind))}, or "
            f"env.action {' or '.join(names_of_kinds(algorithm.actions))}"
        )
    if config.timesteps.min_snr > 0 and name != "maskable_ppo":
        found.append(
            f"timesteps.min_snr: {name} takes no action masks; maskable_ppo and train_reinforce do"
        )
    return found


def check_arguments(config: ExperimentConfig) -> Algorithm:
    """The configured algorithm, after a look at ``sb3.arguments``; loads SB3.

    Raises:
        ConfigError: The algorithm cannot be used here, has no such arguments, or its device is not
            there.
    """
    problems = conflicts(config)
    if problems:
        raise ConfigError(problems)
    algorithm = ALGORITHMS[config.sb3.algo]
    allowed = [name for name in inspect.signature(algorithm.load()).parameters if name not in _OURS]
    for name in config.sb3.arguments:
        if name in _OURS:
            problems.append(f"sb3.arguments: '{name}' is set by {_OURS[name]}")
        elif name not in allowed:
            problems.append(
                f"sb3.arguments: {config.sb3.algo} has no '{name}'.{did_you_mean(name, allowed)} "
                f"Allowed: {', '.join(allowed)}"
            )
    from repfusion_env.devices import resolve_device

    try:
        resolve_device(config.sb3.device)
    except ValueError as error:
        problems.append(f"sb3.{error}")
    if problems:
        raise ConfigError(problems)
    return algorithm
