"""The single environment: one lane of the vector environment, with numpy at its edge.

Shape letters: D embedding, A entries of the action masks.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.utils import EzPickle
from torch import Tensor

from repfusion_env.config_loading import load_config, merge
from repfusion_env.lane_inputs import RENDER_MODES
from repfusion_env.trainer import DistillationTrainer
from repfusion_env.vector_env import RepFusionVectorEnv


class RepFusionEnv(gym.Env[np.ndarray, Any], EzPickle):
    """One lane of :class:`RepFusionVectorEnv`, with numpy arrays and Python numbers at its edge.

    Spaces, rewards and episodes are those of the vector environment. One image is too few for an
    update of the student, so each step distils the new decision together with the most recent
    earlier ones, ``optimizer.batch_size`` in all.

    Args:
        config: Path, name under ``configs/``, or mapping of overrides; default ``digits``.
        train_student: False: nothing is trained.
        split: ``train`` or ``heldout``; default: ``train``, or ``heldout`` with nothing trained.
        render_mode: None or ``rgb_array``.
        trainer: Share this trainer (and its configuration) instead of building one.
        **overrides: Configuration keys, e.g. ``reward="teacher_probe"``.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        config: Any = None,
        *,
        train_student: bool = True,
        split: str | None = None,
        render_mode: str | None = None,
        trainer: DistillationTrainer | None = None,
        **overrides: Any,
    ) -> None:
        EzPickle.__init__(
            self,
            config,
            train_student=train_student,
            split=split,
            render_mode=render_mode,
            trainer=trainer,
            **overrides,
        )
        if trainer is None:
            # Lanes of the configuration are the vector environment's business; here there is one.
            if load_config(config, overrides).reinforce.baseline == "group":
                overrides = merge(overrides, {"reinforce.baseline": "batch"})
            overrides = merge(overrides, {"env.group_size": 1})
        self.lane = RepFusionVectorEnv(
            1,
            config,
            train_student=train_student,
            split=split,
            render_mode=render_mode,
            trainer=trainer,
            **overrides,
        )
        self.render_mode = render_mode
        self.observation_space = self.lane.single_observation_space
        self.action_space = self.lane.single_action_space
        self._shown: np.ndarray | None = None  # what the lane's own autoreset already shows
        self._in_episode = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Show the next image; with a seed, start everything over."""
        if self.lane.closed:
            raise ClosedEnvironmentError("this environment has been closed; make a new one")
        super().reset(seed=seed)
        if self._shown is not None and seed is None:
            observation, info = self._shown, {"image_id": self._image_id()}
            if self.lane.observer.depends_on_student:
                # A held-out view's student may have learned since the last episode ended.
                observation = self.lane.observe()[0].cpu().numpy()
        else:
            tensor, tensors = self.lane.reset(seed=seed)
            observation, info = tensor[0].cpu().numpy(), _numbers(tensors)
        self._shown, self._in_episode = None, True
        return observation, info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Distil what the action chose.

        Returns:
            Observation (D,) float32, reward, terminated, truncated, info of Python numbers (and an
            array of the timesteps of a set).
        """
        if self.lane.closed:
            raise ClosedEnvironmentError("this environment has been closed; make a new one")
        if not self._in_episode:
            raise ResetNeeded("the episode has not begun or is over; call reset() before step()")
        one = action[None] if isinstance(action, Tensor) else np.asarray(action)[None]
        tensor, reward, terminated, truncated, tensors = self.lane.step(one)
        observation = tensor[0].cpu().numpy()
        if "final_obs" in tensors:
            self._shown, self._in_episode = observation, False
            observation = tensors["final_obs"][0].cpu().numpy()
            tensors = {key: value for key, value in tensors.items() if "final" not in key}
        return observation, float(reward), bool(terminated), bool(truncated), _numbers(tensors)

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The picture of the last decision, uint8 (height, width, 3)."""
        frames = self.lane.render()
        return None if frames is None else frames[0]

    def action_masks(self) -> np.ndarray:
        """(A,) bool; see :meth:`RepFusionVectorEnv.action_masks`."""
        return self.lane.action_masks()[0]

    def heldout_view(self, render_mode: str | None = None) -> RepFusionEnv:
        """An environment on held-out images that shares this student and trains nothing."""
        return RepFusionEnv(train_student=False, render_mode=render_mode, trainer=self.lane.trainer)

    def close(self) -> None:
        """Release the lane; later calls are refused."""
        self.lane.close()
        super().close()

    def __getstate__(self) -> dict[str, Any]:
        self.lane.__getstate__()  # refuses a shared trainer
        return EzPickle.__getstate__(self)  # type: ignore[no-any-return]

    def _image_id(self) -> int:
        assert self.lane._ids is not None
        return int(self.lane._ids[0])


def _numbers(tensors: dict[str, Any]) -> dict[str, Any]:
    """Lane 0 of tensors (1,) as Python numbers, of tensors (1, k) as arrays."""
    return {
        key: value[0].item() if value.ndim == 1 else value[0].cpu().numpy()
        for key, value in tensors.items()
    }
