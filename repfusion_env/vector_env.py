"""The vector environment: N lanes over one teacher-student trainer, torch tensors in and out.

Shape letters: N lanes, k timesteps of a set, C,H,W image, D embedding, K grid length, L episode
length, A entries of the action masks.
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

from repfusion_env.actions import arm_actions, build_actions
from repfusion_env.actions.choice import Choice
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import load_config, merge
from repfusion_env.devices import refuse_fork
from repfusion_env.episodes import Decisions, Episodes
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.lane_inputs import (
    RENDER_MODES,
    Limits,
    action_tensor,
    check_arguments,
    check_reset,
    check_shared,
    refusal,
    reset_mask,
)
from repfusion_env.lane_outputs import add_final, flags, step_info
from repfusion_env.lane_view import LaneView
from repfusion_env.looks import Looks
from repfusion_env.observations import Observer
from repfusion_env.ranks import ALONE, Ranks
from repfusion_env.stream import ImageStream, next_images
from repfusion_env.trainer import DistillationTrainer, StepResult


class RepFusionVectorEnv(VectorEnv, EzPickle):
    """N lanes over one teacher-student trainer; takes and returns torch tensors on its device.

    ## Description
    Every lane holds one image. An action chooses the diffusion timestep at which the frozen teacher
    looks at it; the student learns from all lanes' features in one update; each lane is rewarded
    by minus the student's task loss after distillation.

    ## Action space
    ``Discrete(K)``: index into the timestep grid, int64 (N,). ``env.action`` chooses others: a
    timestep by a number in [0, 1], a layer, both, or a set; see ``docs/environment.md``.

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
    After a step, tensors (N,) of the decisions just made: ``timestep`` ((N, k) for sets), ``layer``
    (where chosen), ``image_id``, ``distillation_loss``, ``task_loss_before``, ``task_loss_after``
    (absent where the reward measures none), ``correct``. After a reset ``image_id`` of the images
    now shown.

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
        ranks: Processes that train together; each has an environment with its share of N lanes.
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
        ranks: Ranks = ALONE,
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
            ranks=ranks,
            **overrides,
        )
        if isinstance(num_envs, np.integer):
            num_envs = int(num_envs)
        split = split or ("train" if train_student else "heldout")
        check_arguments(render_mode, split, train_student)
        if trainer is None:
            if num_envs is not None:
                overrides = merge(overrides, {"env.num_envs": num_envs})
            resolved = load_config(config, overrides)
            trainer = DistillationTrainer(resolved, build_frozen_parts(resolved), ranks)
            self._owns_trainer = True
        else:
            self._owns_trainer = False
            check_shared(num_envs, trainer.config, config, overrides)
        self.trainer = trainer
        self.config: ExperimentConfig = trainer.config
        # What trains nothing is no business of the other ranks.
        self.ranks = trainer.ranks if train_student else ALONE
        self.num_envs = (num_envs or self.config.env.num_envs) // self.ranks.count
        self.train_student = train_student
        self.render_mode = render_mode
        self.device = trainer.device
        self.grid = trainer.parts.grid
        self.bank = trainer.parts.train if split == "train" else trainer.parts.heldout
        self.observer = Observer(trainer)
        # One-step episodes end with the observation that the last call returned.
        self._looks = Looks(self.observer, keep=self.config.env.episode_length == 1)
        self.single_observation_space = self.observer.space()
        layers = tuple(trainer.parts.teacher.layers)
        self.actions = build_actions(self.config, self.grid, layers)
        self.single_action_space = self.actions.space
        self._limits = Limits(self.actions.space, self.device)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        # A held-out view shows the bank in its order, so that M steps of one lane see all of it.
        self._stream = ImageStream(len(self.bank), self.device, shuffle=split == "train")
        self._episodes = Episodes(self.num_envs, self.config.env.episode_length)
        self._decisions = Decisions(
            len(self.grid),
            len(layers),
            self.device,
            keep_history=bool(render_mode),
            ranks=self.ranks,
        )
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
        mask = reset_mask(options, self.num_envs, self.config.env.group_size)
        check_reset(seed, mask, self.ranks)
        super().reset(seed=None if seed is None else int(seed))
        if seed is not None:
            self._restart(int(seed), trainer_too=self._owns_trainer and self.train_student)
        if self._ids is None or mask.all():
            self._ids = self._next_images(self.num_envs)
        else:
            where = torch.from_numpy(np.flatnonzero(mask)).to(self.device)
            self._ids = self._ids.index_copy(0, where, self._next_images(int(mask.sum())))
        self._episodes.restart(mask)
        return self._looks.new(self.bank, self._ids), {"image_id": self._ids.clone()}

    def step(self, actions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Distil what every lane's action chose.

        Args:
            actions: N of :attr:`single_action_space`; a tensor on any device, an array or a list.

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
        choice = self.actions.choice(self._limits.clamped(self._checked(actions)))
        ids, shown = self._ids, None
        if self.config.env.episode_length == 1:
            # The image is the whole episode: it ends where it stood, seen before the update.
            shown = self._looks.again(self.bank, ids)
        visits = self._visits()
        result = self._distil(ids, choice, visits)
        self._steps += 1
        self._decisions.add(choice, result.reward)
        self._last = LaneView(ids, choice, visits, result)

        self._ids = self._next_images(self.num_envs)
        observations = self._looks.new(self.bank, self._ids)
        finished, terminated, truncated = self._episodes.advance()
        info = step_info(ids, choice, result)
        if finished.any():
            # L > 1: the truncated sequence would have gone on with the image now shown.
            final = observations.clone() if shown is None else shown
            add_final(info, final, flags(finished, self.device))
        ends = (flags(terminated, self.device), flags(truncated, self.device))
        return observations, result.reward, *ends, info

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
        layered = self.actions.choice(arm_actions(self.actions, self.device)).layers is not None
        return draw_lane(
            trainer, self.bank, self._ids, self._last, self._decisions, seed, lane, layered
        )

    @property
    def steps(self) -> int:
        """Steps made since the start or the last seeded reset."""
        return self._steps

    def action_masks(self) -> np.ndarray:
        """(N, A) bool: which actions are open; A is K for a timestep of the grid.

        Timesteps are whose signal-to-noise ratio is ``timesteps.min_snr`` or more, layers always.
        For ``MultiDiscrete`` one component's entries follow the other's.
        """
        return np.tile(self.actions.masks(self.valid_timesteps), (self.num_envs, 1))

    @property
    def valid_timesteps(self) -> np.ndarray:
        """(K,) bool: timesteps with a signal-to-noise ratio of ``timesteps.min_snr`` or more."""
        return self._valid.cpu().numpy()

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

        ``timestep/counts`` is a list of K counts, ``layer/counts`` (where layers are chosen) one of
        the teacher's layers, everything else a float.

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
            "ids": self.ranks.all(self._ids),
            "steps": self._steps,
            "episodes": self._episodes.state_dict(self.ranks),
            "decisions": self._decisions.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Go on from :meth:`state_dict`.

        Returns:
            The observations of the images now shown, (N, D).

        Raises:
            ValueError: The state is of another number of lanes.
        """
        lanes = self.num_envs * self.ranks.count
        if len(state["ids"]) != lanes:
            raise ValueError(
                f"state: it was saved with {len(state['ids'])} lanes, this environment has {lanes}"
            )
        if state["trainer"] is not None:
            self.trainer.load_state_dict(state["trainer"])
        self._stream.load_state_dict(state["stream"])
        self._ids = self.ranks.share(state["ids"]).to(self.device)
        self._steps = state["steps"]
        self._episodes.load_state_dict(state["episodes"])
        self._decisions.load_state_dict(state["decisions"])
        return self._looks.new(self.bank, self._ids)

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
        lanes = self.num_envs * self.ranks.count
        first = self._steps * lanes + self.ranks.index * self.num_envs
        return torch.arange(first, first + self.num_envs, device=self.device)

    def _distil(self, ids: Tensor, choice: Choice, visits: Tensor) -> StepResult:
        if self.train_student:
            return self.trainer.step(ids, choice, visits, self.config.env.group_size)
        return self.trainer.judge(self.bank, ids, choice, visits)

    def _next_images(self, lanes: int) -> Tensor:
        lanes, group = lanes * self.ranks.count, self.config.env.group_size
        return next_images(self._stream, self.bank, lanes, group, self.ranks)

    def _checked(self, actions: Any) -> Tensor:
        given = action_tensor(actions, self.num_envs, self.single_action_space)
        outside = self._limits.outside(given)
        if given.device.type == "cpu":
            if bool(outside.any()):
                bad = given[outside][0].reshape(-1).tolist()
                raise ValueError(self._refusal(f"{bad if len(bad) > 1 else bad[0]}"))
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
