"""The environments: torch-native ``RepFusionVectorEnv`` and its one-lane numpy ``RepFusionEnv``.

Shape letters: N lanes, C,H,W image, D embedding, K grid length, L episode length.
"""

from __future__ import annotations

import os
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import load_config, merge
from repfusion_env.devices import refuse_fork
from repfusion_env.episodes import Decisions, Episodes
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.lane_inputs import action_tensor, refusal, reset_mask
from repfusion_env.lane_view import LaneView
from repfusion_env.observations import Observer
from repfusion_env.stream import ImageStream
from repfusion_env.trainer import DistillationTrainer, StepResult

RENDER_MODES = ("rgb_array",)
SPLITS = ("train", "heldout")


class RepFusionVectorEnv(VectorEnv, EzPickle):
    """N lanes over one teacher-student trainer; takes and returns torch tensors on its device.

    ## Description
    Every lane holds one image. An action chooses the diffusion timestep at which the frozen teacher
    looks at it; the student learns from all lanes' features in one update; each lane is rewarded
    by minus the student's task loss after distillation.

    ## Action space
    ``Discrete(K)``: index into the timestep grid, int64 (N,). With ``env.action: continuous``
    ``Box(0, 1, (1,))``: the grid index nearest to ``a * (K - 1)``, float32 (N, 1).

    ## Observation space
    Finite ``Box``, float32 (N, D), or (N, C, H, W) for ``observation.source: pixels``.

    ## Rewards
    float32 (N,), by ``reward.kind``; see ``docs/environment.md``.

    ## Episode end
    ``env.episode_length: 1`` (default): every step ends all episodes with ``terminated``. L > 1: an
    episode is L images; its last step ends with ``truncated``. Lanes restart by themselves in the
    same step (``AutoresetMode.SAME_STEP``): ``info["final_obs"]``, ``info["final_info"]`` and their
    masks ``_final_obs``, ``_final_info``.

    ## Info
    After a step, tensors (N,) of the decisions just made: ``timestep``, ``image_id``,
    ``distillation_loss``, ``task_loss_before``, ``task_loss_after`` (absent where the reward
    measures none), ``correct``. After a reset ``image_id`` of the images now shown.

    ## Reset
    ``reset(seed=s)`` restarts student, optimizer, data order and noise; ``reset()`` keeps the
    student and goes on to the next images; ``options={"reset_mask": (N,) bool}`` does so for some
    lanes. On a held-out view (``train_student=False``) neither touches the student.

    Args:
        num_envs: N; default: ``env.num_envs`` of the configuration.
        config: Path, name under ``configs/``, or mapping of overrides; default ``digits``.
        train_student: False: nothing is trained.
        split: ``train`` or ``heldout``; default: ``train``, or ``heldout`` with nothing trained.
        render_mode: None or ``rgb_array``.
        trainer: Share this trainer (and its configuration) instead of building one.
        **overrides: Configuration keys, e.g. ``reward="teacher_probe"``, ``env={...}``.

    Raises:
        ValueError: For a configuration or combination that cannot be, one sentence each.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (Gymnasium's own form)
        "render_modes": list(RENDER_MODES),
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int | None = None,
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
            num_envs,
            config,
            train_student=train_student,
            split=split,
            render_mode=render_mode,
            trainer=trainer,
            **overrides,
        )
        if isinstance(num_envs, np.integer):
            num_envs = int(num_envs)
        split = split or ("train" if train_student else "heldout")
        _check_arguments(render_mode, split, train_student)
        if trainer is not None and (config is not None or overrides):
            raise ValueError(
                "trainer: a shared trainer brings its own configuration; give no other"
            )
        if trainer is None:
            if num_envs is not None:
                overrides = merge(overrides, {"env.num_envs": num_envs})
            resolved = load_config(config, overrides)
            trainer = DistillationTrainer(resolved, build_frozen_parts(resolved))
            self._owns_trainer = True
        else:
            self._owns_trainer = False
            if num_envs is not None and num_envs < 1:
                raise ValueError(f"num_envs: {num_envs} given; it must be greater than 0")
            if num_envs is not None and num_envs % trainer.config.env.group_size:
                raise ValueError(
                    f"num_envs: {num_envs} lanes cannot be divided into groups of "
                    f"{trainer.config.env.group_size}"
                )
        self.trainer = trainer
        self.config: ExperimentConfig = trainer.config
        self.num_envs = num_envs or self.config.env.num_envs
        self.train_student = train_student
        self.render_mode = render_mode
        self.device = trainer.device
        self.grid = trainer.parts.grid
        self.bank = trainer.parts.train if split == "train" else trainer.parts.heldout
        self.observer = Observer(trainer)
        self.single_observation_space = self.observer.space()
        self.single_action_space = self.grid.space(self.config.env)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        # A held-out view shows the bank in its order, so that M steps of one lane see all of it.
        self._stream = ImageStream(len(self.bank), self.device, shuffle=split == "train")
        self._episodes = Episodes(self.num_envs, self.config.env.episode_length)
        self._decisions = Decisions(len(self.grid), self.device, keep_history=bool(render_mode))
        self._valid = trainer.parts.valid_actions(self.config.timesteps.min_snr)
        self._pid = os.getpid()
        self._steps = 0
        self._ids: Tensor | None = None  # (N,) images now shown
        self._last: LaneView | None = None
        self._restart(self.config.seed, trainer_too=False)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Show new images; with a seed, start everything over. See the class for the semantics.

        Args:
            seed: An int; one student is shared by all lanes, so lists are refused.
            options: ``{"reset_mask": (N,) bool}`` resets these lanes alone.

        Returns:
            Observations (N, D) and ``{"image_id": (N,)}``.
        """
        self._refuse_closed()
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer)):
            raise TypeError(
                f"seed: {seed!r} given; all lanes share one student, so the seed is one int"
            )
        mask = reset_mask(options, self.num_envs, self.config.env.group_size)
        if seed is not None and not mask.all():
            raise ValueError(
                "reset_mask: a seed restarts the student of all lanes; reset all lanes, or give no "
                "seed"
            )
        super().reset(seed=None if seed is None else int(seed))
        if seed is not None:
            self._restart(int(seed), trainer_too=self._owns_trainer and self.train_student)
        if self._ids is None or mask.all():
            self._ids = self._next_images(self.num_envs)
        else:
            where = torch.from_numpy(np.flatnonzero(mask)).to(self.device)
            self._ids = self._ids.index_copy(0, where, self._next_images(int(mask.sum())))
        self._episodes.restart(mask)
        return self.observer(self.bank, self._ids), {"image_id": self._ids.clone()}

    def step(self, actions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Distil every lane's image at its chosen timestep.

        Args:
            actions: int64 (N,) grid indices, or float32 (N, 1) for continuous actions; a tensor on
                any device, an array or a list.

        Returns:
            Observations (N, D), rewards (N,) float32, terminated and truncated (N,) bool, info.

        Raises:
            ValueError: An action lies outside the space. Actions that are already on a CUDA device
                are checked there and reported by :meth:`drain_metrics`, to save a synchronisation.
        """
        self._refuse_closed()
        refuse_fork(self.device, self._pid)
        if self._ids is None:
            raise ResetNeeded("reset() must be called before the first step()")
        actions = self._checked(actions)
        indices = self.grid.indices(actions)
        timesteps = self.grid.tensor[indices]
        ids, shown = self._ids, None
        if self.config.env.episode_length == 1:
            # The image is the whole episode: it ends where it stood, seen before the update.
            shown = self.observer(self.bank, ids)
        visits = self._visits()
        result = self._distil(ids, timesteps, visits)
        self._steps += 1
        self._decisions.add(indices, timesteps, result.reward)
        self._last = LaneView(ids, indices, timesteps, visits, result)

        self._ids = self._next_images(self.num_envs)
        observations = self.observer(self.bank, self._ids)
        finished, terminated, truncated = self._episodes.advance()
        info = self._info(ids, timesteps, result)
        if finished.any():
            done = torch.from_numpy(finished).to(self.device)
            info["final_info"] = {key: value.clone() for key, value in info.items()}
            info["final_info"] |= {f"_{key}": done.clone() for key in info if key != "final_info"}
            info["_final_info"] = done
            # L > 1: the truncated sequence would have gone on with the image now shown.
            info["final_obs"] = observations.clone() if shown is None else shown
            info["_final_obs"] = done.clone()
        return (
            observations,
            result.reward,
            torch.from_numpy(terminated).to(self.device),
            torch.from_numpy(truncated).to(self.device),
            info,
        )

    def observe(self) -> Tensor:
        """Observations of the images now shown, (N, D), as the student is now."""
        if self._ids is None:
            raise ResetNeeded("reset() must be called before observe()")
        return self.observer(self.bank, self._ids)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """One frame per lane, uint8 (height, width, 3), or None without a render mode."""
        if self.render_mode is None:
            gym.logger.warn(
                "render() was called without a render mode; give render_mode='rgb_array'"
            )
            return None
        if self._ids is None:
            raise ResetNeeded("reset() must be called before render()")
        return tuple(self.frame(lane) for lane in range(self.num_envs))

    def frame(self, lane: int = 0) -> np.ndarray:
        """The picture of one lane's last decision, uint8 (height, width, 3)."""
        from repfusion_env.lane_view import draw_lane

        assert self._ids is not None
        trainer = self.trainer
        seed = trainer.noise_seed if self.train_student else trainer.heldout_noise_seed
        return draw_lane(trainer, self.bank, self._ids, self._last, self._decisions, seed, lane)

    @property
    def steps(self) -> int:
        """Steps made since the start or the last seeded reset."""
        return self._steps

    def action_masks(self) -> np.ndarray:
        """(N, K) bool: timesteps with a signal-to-noise ratio of ``timesteps.min_snr`` or more."""
        return np.tile(self._valid.cpu().numpy(), (self.num_envs, 1))

    def heldout_view(
        self, num_envs: int | None = None, render_mode: str | None = None
    ) -> RepFusionVectorEnv:
        """An environment on held-out images that shares this student and trains nothing."""
        return RepFusionVectorEnv(
            num_envs or self.num_envs,
            train_student=False,
            render_mode=render_mode,
            trainer=self.trainer,
        )

    def drain_metrics(self) -> dict[str, Any]:
        """Means since the last call by TensorBoard tag; the host waits for the device once.

        ``timestep/counts`` is a list of K counts, everything else a float.

        Raises:
            ValueError: Actions on the device lay outside the space since the last call.
        """
        outside = self._decisions.drain_outside()
        if outside:
            raise ValueError(self._refusal(f"{outside} actions outside it since the last check"))
        return {**self.trainer.drain_metrics(), **self._decisions.drain(self.grid.timesteps)}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs: trainer, data order, images shown, episodes, metrics."""
        if self._ids is None:
            raise ResetNeeded("reset() must be called before state_dict()")
        return {
            "trainer": self.trainer.state_dict() if self.train_student else None,
            "stream": self._stream.state_dict(),
            "ids": self._ids,
            "steps": self._steps,
            "episodes": self._episodes.state_dict(),
            "decisions": self._decisions.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Go on from :meth:`state_dict`.

        Returns:
            The observations of the images now shown, (N, D).

        Raises:
            ValueError: The state is of another number of lanes.
        """
        if len(state["ids"]) != self.num_envs:
            raise ValueError(
                f"state: it was saved with {len(state['ids'])} lanes, this environment has "
                f"{self.num_envs}"
            )
        if state["trainer"] is not None:
            self.trainer.load_state_dict(state["trainer"])
        self._stream.load_state_dict(state["stream"])
        self._ids = state["ids"].to(self.device)
        self._steps = state["steps"]
        self._episodes.load_state_dict(state["episodes"])
        self._decisions.load_state_dict(state["decisions"])
        return self.observer(self.bank, self._ids)

    def _restart(self, seed: int, *, trainer_too: bool) -> None:
        if trainer_too:
            self.trainer.reset(seed)
        self._stream.reset(seed)
        self._decisions.restart()
        self._steps = 0
        self._ids = self._last = None

    def _visits(self) -> Tensor:
        """Noise keys: new at each step and lane, or the same for every look at a held-out image."""
        if not self.train_student:
            return torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        first = self._steps * self.num_envs
        return torch.arange(first, first + self.num_envs, device=self.device)

    def _distil(self, ids: Tensor, timesteps: Tensor, visits: Tensor) -> StepResult:
        if self.train_student:
            return self.trainer.step(ids, timesteps, visits)
        return self.trainer.judge(self.bank, ids, timesteps, visits)

    def _next_images(self, lanes: int) -> Tensor:
        group = self.config.env.group_size
        return self._stream.take(lanes // group).repeat_interleave(group)

    @staticmethod
    def _info(ids: Tensor, timesteps: Tensor, result: StepResult) -> dict[str, Any]:
        info = {
            "image_id": ids,
            "timestep": timesteps,
            "distillation_loss": result.distillation_loss,
            "task_loss_before": result.task_loss_before,
            "correct": result.correct,
        }
        if result.task_loss_after is not None:
            info["task_loss_after"] = result.task_loss_after
        return {key: value.clone() for key, value in info.items()}

    def _checked(self, actions: Any) -> Tensor:
        given = action_tensor(actions, self.num_envs, self.single_action_space)
        outside = self.grid.outside(given)
        if given.device.type == "cpu":
            if bool(outside.any()):
                bad = given.reshape(-1)[outside][0].item()
                raise ValueError(self._refusal(f"{bad}"))
        else:
            self._decisions.note_outside(outside)
        return given.to(self.device)

    def _refusal(self, given: str) -> str:
        return refusal(given, self.num_envs, self.single_action_space)

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("this environment has been closed; make a new one")

    def __getstate__(self) -> dict[str, Any]:
        if not self._owns_trainer:
            raise TypeError(
                "an environment on a shared trainer cannot be pickled; pickle the one that owns it"
            )
        return EzPickle.__getstate__(self)  # type: ignore[no-any-return]


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
        """Distil the image at the chosen timestep.

        Returns:
            Observation (D,) float32, reward, terminated, truncated, info of Python numbers.
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
        """(K,) bool; see :meth:`RepFusionVectorEnv.action_masks`."""
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
    """Lane 0 of tensors (1,) as Python numbers."""
    return {key: value[0].item() for key, value in tensors.items()}


def _check_arguments(render_mode: str | None, split: str, train_student: bool) -> None:
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode: '{render_mode}' given; allowed: None, 'rgb_array'")
    if split not in SPLITS:
        raise ValueError(f"split: '{split}' given; allowed: 'train', 'heldout'")
    if split == "heldout" and train_student:
        raise ValueError("split: held-out images are never trained on; give train_student=False")
