"""Stable-Baselines3's view of the vector environment.

SB3 has no adapter for Gymnasium's vector environments. This one makes one device-to-host transfer a
step and fills infos for finished lanes alone.

Shape letters: N lanes, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn
from torch import Tensor

from repfusion_env.envs import RepFusionVectorEnv


class RepFusionVecEnv(VecEnv):
    """SB3's ``VecEnv`` over a :class:`~repfusion_env.envs.RepFusionVectorEnv`.

    Finished lanes' infos hold ``terminal_observation`` (a copy), ``TimeLimit.truncated`` and
    ``episode`` (``r`` return, ``l`` length), as a ``VecMonitor`` would add them at several times
    the cost.

    Args:
        env: The environment that does the work.
    """

    def __init__(self, env: RepFusionVectorEnv) -> None:
        self.env = env
        self._actions: np.ndarray | None = None
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, np.int64)
        # The base class asks for the render mode in its own constructor.
        self.render_mode = env.render_mode
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> np.ndarray:
        """Show new images; a seed given by :meth:`seed` is used once. (N, D) float32."""
        seed = self._seeds[0]
        observations, _ = self.env.reset(seed=seed)
        self._reset_seeds()
        self._reset_options()
        self._returns[:], self._lengths[:] = 0.0, 0
        return observations.cpu().numpy()

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions for the next :meth:`step_wait`."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Make the step; arrays are new at each call."""
        observations, rewards, terminated, truncated, info = self.env.step(self._actions)
        final = info.get("final_obs")
        parts = [observations, rewards, terminated, truncated]
        host = _to_host(parts if final is None else [*parts, final])
        new, reward = host[0], host[1]
        done = (host[2] + host[3]) > 0
        cut = (host[3] > 0) & (host[2] == 0)
        self._returns += reward
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for lane in np.flatnonzero(done).tolist():
            infos[lane] = {
                "terminal_observation": host[4][lane].copy(),
                "TimeLimit.truncated": bool(cut[lane]),
                "episode": {"r": float(self._returns[lane]), "l": int(self._lengths[lane])},
            }
        self._returns[done], self._lengths[done] = 0.0, 0
        return new, reward, done, infos

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Use ``seed`` at the next reset; one student is shared, so all lanes get the same."""
        self._seeds = [seed] * self.num_envs
        return self._seeds

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The environment's attribute, once per lane asked for."""
        return [getattr(self.env, attr_name)] * len(self._lanes(indices))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the environment's attribute, which all lanes share."""
        if len(self._lanes(indices)) != self.num_envs:
            raise ValueError(f"'{attr_name}' is shared by all lanes and cannot be set for some")
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call the environment's method once; an array with a row per lane is dealt out."""
        lanes = self._lanes(indices)
        result = getattr(self.env, method_name)(*method_args, **kwargs)
        if isinstance(result, np.ndarray | Tensor) and result.shape[:1] == (self.num_envs,):
            return [result[lane] for lane in lanes]
        return [result] * len(lanes)

    def has_attr(self, attr_name: str) -> bool:
        """Whether the environment has the attribute."""
        return hasattr(self.env, attr_name)

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """Whether a Monitor is there; the infos hold what it would add, so the answer is yes."""
        from stable_baselines3.common.monitor import Monitor

        return [wrapper_class is Monitor] * len(self._lanes(indices))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One frame per lane, uint8 (height, width, 3)."""
        return list(self.env.render() or [None] * self.num_envs)

    def heldout_view(self, num_envs: int | None = None) -> RepFusionVecEnv:
        """For ``EvalCallback``: held-out images, the same student, nothing trained."""
        return RepFusionVecEnv(self.env.heldout_view(num_envs))

    def state_dict(self) -> dict[str, Any]:
        """Returns and lengths of the running episodes, for a resume."""
        return {"returns": self._returns.tolist(), "lengths": self._lengths.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._returns[:], self._lengths[:] = state["returns"], state["lengths"]

    def _lanes(self, indices: VecEnvIndices) -> list[int]:
        return list(self._get_indices(indices))


def _to_host(parts: list[Tensor]) -> list[np.ndarray]:
    """Tensors (N, ...) as float32 arrays, in one transfer."""
    if parts[0].device.type == "cpu":
        return [part.to(torch.float32).numpy() for part in parts]
    return _in_one_transfer(parts)


def _in_one_transfer(parts: list[Tensor]) -> list[np.ndarray]:
    """Tensors (N, ...) side by side as one float32 matrix, taken apart again on the host."""
    flat = [part.reshape(part.shape[0], -1).to(torch.float32) for part in parts]
    host = torch.cat(flat, dim=1).cpu().numpy()
    widths = np.cumsum([part.shape[1] for part in flat])[:-1]
    pieces = np.split(host, widths, axis=1)
    return [
        np.ascontiguousarray(piece).reshape(tuple(part.shape))
        for piece, part in zip(pieces, parts, strict=True)
    ]


def make_sb3_vec_env(
    num_envs: int | None = None, config: Any = None, **overrides: Any
) -> RepFusionVecEnv:
    """The environment as SB3's algorithms take it.

    Example:
        >>> from stable_baselines3 import PPO
        >>> import repfusion_env
        >>> env = repfusion_env.sb3.make_sb3_vec_env(num_envs=64, config="digits")
        >>> PPO("MlpPolicy", env, n_steps=16, device="cpu").learn(10_000)  # doctest: +SKIP

    Args:
        num_envs: Lanes; default: those of the configuration.
        config: Path, name under ``configs/``, or mapping of overrides; default ``digits``.
        **overrides: As for :class:`~repfusion_env.envs.RepFusionVectorEnv`.
    """
    return RepFusionVecEnv(RepFusionVectorEnv(num_envs, config, **overrides))
