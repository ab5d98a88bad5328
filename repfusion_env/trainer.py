"""The distillation trainer: where teacher, student, loss, optimizer and reward meet.

Shape letters: N lanes, B samples of an update (B >= N), C,H,W image, S student width, F teacher
width of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repfusion_env import rank_rules, registry
from repfusion_env.actions.choice import Choice
from repfusion_env.augmentation import make_augmentation
from repfusion_env.compile_choice import compile_step
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import ConfigError
from repfusion_env.contrastive import make_contrastive
from repfusion_env.data.bank import ImageBank
from repfusion_env.device_means import DeviceMeans
from repfusion_env.features import heldout_noise_seed, training_noise_seed
from repfusion_env.frozen import FrozenParts
from repfusion_env.fusion import Fusion, Targets
from repfusion_env.losses import DistillationLoss
from repfusion_env.measuring import (
    Measuring,
    StepResult,
    finite_reward,
    layer_losses,
    loss_shapes,
    moved_features,
    on_student_grid,
    projected,
)
from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.rank_losses import compared, remember
from repfusion_env.rank_norm import share_norms
from repfusion_env.ranks import ALONE, Ranks
from repfusion_env.recent import RecentDecisions
from repfusion_env.rewards import RewardRule
from repfusion_env.step_batch import Batch, step_batch
from repfusion_env.student import Student, inference_maps, task_input
from repfusion_env.student_pass import StudentPass, probe_outputs, student_pass
from repfusion_env.tasks.build import build_task
from repfusion_env.tasks.measuring import measure
from repfusion_env.trainer_state import restore, saved
from repfusion_env.updates import NonFiniteError, Updates

__all__ = ["DistillationTrainer", "NonFiniteError", "StepResult"]


class DistillationTrainer:
    """Trains one student by distillation, a step at a time; never leaves the device.

    Args:
        config: The experiment.
        parts: What stays as it is: banks, teacher, grid, feature statistics.
        ranks: Processes that train one student together, each with its share of the lanes.

    A step makes no host synchronisation; :meth:`drain_metrics`, every few steps on CUDA the watch
    for non-finite losses, and a feature cache that is not full yet do.
    """

    def __init__(self, config: ExperimentConfig, parts: FrozenParts, ranks: Ranks = ALONE) -> None:
        if problems := rank_rules.conflicts(config, ranks.count):
            raise ConfigError(problems)
        self.config = config
        self.parts = parts
        self.ranks = ranks
        self.device = parts.device
        self.task = build_task(config, parts.train)
        self.rule: RewardRule = registry.look_up("reward", config.reward.kind, registry.REWARDS)
        # With nothing trained there is no update to look back on; the look-ahead still judges.
        self.heldout_reward = config.reward.kind if self.rule.attributable else "student_lookahead"
        self.heldout_rule: RewardRule = registry.look_up(
            "reward", self.heldout_reward, registry.REWARDS
        )
        self.dense = config.distillation.dense
        if self.task.reads != "pooled" and not self.dense:
            raise ValueError(
                f"distillation.dense: task '{config.task}' reads feature maps, so they are matched "
                "position by position: give distillation.dense true"
            )
        self.augmentation = make_augmentation(config, parts.train, self.task.annotation)
        self.reset(config.seed)

    def reset(self, seed: int) -> None:
        """Start over: new student, optimizer, averages and counters, all from ``seed``."""
        config, parts = self.config, self.parts
        self.seed = seed
        # The caller's random state is none of our business, and ours none of the caller's.
        with own_randomness(derive_seed(seed, "student")):
            student = Student(config, parts, self.task)
        layout = torch.channels_last if config.student.channels_last else torch.contiguous_format
        self.student = student.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        shapes = loss_shapes(self.student, parts.features.widths, self.dense, len(parts.train))
        with own_randomness(derive_seed(seed, "loss")):
            self.loss = DistillationLoss(config.distillation, shapes).to(self.device)
        self.loss_learns = any(True for _ in self.loss.parameters())
        self.fusion = Fusion(
            config,
            parts.teacher.layers,
            parts.grid,
            parts.teacher.num_timesteps,
            pooled=self.task.reads == "pooled",
        )
        share_norms(self.student, self.ranks)
        share_norms(self.loss, self.ranks)
        width = self.student.backbone.feature_channels
        self.contrastive = make_contrastive(config, width, parts.train.shape, seed, self.device)
        self.updates = self._make_updates()
        self.recent = RecentDecisions(config.optimizer.batch_size // self.ranks.count)
        self.steps = 0
        self.metrics = DeviceMeans(self.device)
        compile_step(self)

    @property
    def grid_timesteps(self) -> tuple[int, ...]:
        """The timestep grid, length K."""
        return self.parts.grid.timesteps

    @property
    def noise_seed(self) -> int:
        """Seed of the teacher's noise on training images."""
        return training_noise_seed(self.config, self.seed)

    @property
    def heldout_noise_seed(self) -> int:
        """Seed of the noise where nothing is trained; the same however the student was seeded."""
        return heldout_noise_seed(self.config)

    @property
    def progress(self) -> float:
        """Part of the configured run that is done, in [0, 1]."""
        return min(1.0, self.steps / self.config.total_steps)

    @property
    def _measured(self) -> Measuring:
        return Measuring(self.task, self.loss, self.config.reward, self.dense)

    @property
    def average(self) -> Student | None:
        """The averaged student, where there is one."""
        return self.updates.average

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of student, projection, heads, and what loss and fusion learn."""
        return self.updates.optimizer

    @property
    def evaluation_student(self) -> Student:
        """The averaged student where there is one, else the student."""
        return self.average if self.average is not None else self.student

    # Callers act without gradients, some inside no_grad or inference_mode; the student learns.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(
        self, ids: Tensor, choice: Choice | Tensor, visits: Tensor, group: int = 1
    ) -> StepResult:
        """Distil N images at what was chosen for them, update the student, measure the rewards.

        Args:
            ids: (N,) int64 images of the training bank.
            choice: What the actions chose; or (N,) int64 timesteps.
            visits: (N,) int64 keys of fresh noise.
            group: So many neighbouring lanes each hold the same image. What depends on the image
                alone is then computed once for all of them, where a step has lanes enough for a
                batch of its own.

        Returns:
            The outcome per lane, before the first of ``optimizer.updates`` but for the rewards.

        Raises:
            NonFiniteError: ``optimizer.nonfinite_patience`` steps in a row had no finite loss.
        """
        lanes = len(ids)
        batch, new = step_batch(self, ids, choice, visits, group)
        shown = lanes // batch.group
        images, answers = batch.images[:shown], batch.answers[:shown]
        before = self._task_losses_now(images, answers) if self.rule.before else None

        # A batch of one has no batch statistics to normalise with; the first step of one lane
        # therefore measures without an update.
        several = len(batch.ids) * self.ranks.count > 1
        # Dropout and stochastic depth, and a loss that samples, draw from (seed, step), not from
        # the caller's generator.
        drawn = derive_seed(self.seed, "step", self.steps, *self.ranks.purpose)
        with own_randomness(drawn, self.device):
            first = last = self._update(batch, several, again=False)
            for _ in range(1, self.config.optimizer.updates if several else 1):
                last = self._update(batch.kept(), several, again=True)
            if last.skipped is not None:
                remember(
                    self.ranks,
                    self.loss,
                    last.matched,
                    last.teacher,
                    batch.ids,
                    last.skipped,
                    lanes,
                )
            self.steps += 1

            with torch.no_grad():
                task_losses = first.task_losses[:lanes]
                after, after_losses = self._measure_after(images, answers, last)
                measured = self._measured(
                    self.student,
                    None if after is None else [batch.spread(each) for each in after],
                    [z[:lanes] for z in last.teacher],
                    new,
                    batch.spread(answers),
                    ids,
                    loss_before=task_losses if before is None else batch.spread(before),
                    loss_after=None if after_losses is None else batch.spread(after_losses),
                    probe_loss=None if first.probe_losses is None else first.probe_losses[:lanes],
                    others=compared(self.ranks, self.loss),
                )
                reward = finite_reward(self.rule.compute(measured), measured.loss_before)
                correct = batch.spread(self.task.correct(first.outputs, batch.answers))[:lanes]
        result = StepResult(
            reward, first.distilled[:lanes], measured.loss_before, measured.loss_after, correct
        )
        self._count(result)
        self.updates.watch(self.steps)
        return result

    def _update(self, batch: Batch, several: bool, *, again: bool) -> StudentPass:
        """One training forward and the update that follows; ``again`` on the same batch."""
        self.student.train(several)
        self.loss.train(several)
        buffers = self.updates.buffers()
        done = student_pass(self, batch, several=several, told=not again)
        bad = None
        if several:
            bad = self.updates.apply(done.total, buffers, self.progress, again=again)
        return done.after(bad)

    @torch.no_grad()
    def judge(
        self, bank: ImageBank, ids: Tensor, choice: Choice | Tensor, visits: Tensor
    ) -> StepResult:
        """The same measurement with nothing trained: the student as evaluation sees it.

        Args:
            bank: Usually the held-out bank.
            ids: (N,) images of ``bank``.
            choice: What the actions chose; or (N,) int64 timesteps.
            visits: (N,) noise keys; the same keys give the same noise to every policy.

        Returns:
            The outcome per lane; ``reward`` by :attr:`heldout_rule`.
        """
        new = self.targets(bank, ids, choice, visits, self.heldout_noise_seed)
        student, answers = self.evaluation_student, self.task.targets(bank, ids)
        maps = inference_maps(student, bank.pixels(ids))
        outputs = student.head(*task_input(self.task, maps))
        losses = self.task.losses(outputs, answers)
        probe_loss = None
        if self.heldout_rule.probe:
            probe_loss = self.task.losses(probe_outputs(self, student, new), answers)
        teacher = on_student_grid(student, new.features)
        # A loss that remembers images by their numbers knows those of the training bank alone.
        known = ids if bank is self.parts.train else None
        self.loss.eval()
        with own_randomness(derive_seed(self.config.seed, "judge"), self.device):
            measured = self._measured(
                student,
                maps,
                teacher,
                new,
                answers,
                known,
                loss_before=losses,
                loss_after=losses,
                probe_loss=probe_loss,
            )
            reward = self.heldout_rule.compute(measured)
            features = moved_features(student, maps, maps[-1].mean((2, 3)), self.dense)
            mine = projected(student, features, maps, self.dense)
            distilled = layer_losses(self.loss, mine, teacher, new.weights, known)
        correct = self.task.correct(outputs, answers)
        return StepResult(finite_reward(reward, losses), distilled, losses, losses, correct)

    @torch.no_grad()
    def embed(self, images: Tensor, student: Student | None = None) -> tuple[Tensor, Tensor]:
        """Student features in inference mode.

        Args:
            images: (N, C, H, W) in [-1, 1].
            student: Default: the student that is being trained.

        Returns:
            The last stage's map (N, S, h, w) and its average (N, S).
        """
        last = inference_maps(student or self.student, images)[-1]
        return last, last.mean((2, 3))

    @torch.no_grad()
    def outputs(self, images: Tensor, student: Student | None = None) -> Any:
        """What the student's task head says, in inference mode; for the task's methods.

        Args:
            images: (N, C, H, W) in [-1, 1].
            student: Default: the student that is being trained.
        """
        student = student or self.student
        return student.head(*task_input(self.task, inference_maps(student, images)))

    def heldout_metrics(self, limit: int | None = None) -> dict[str, float]:
        """The task's metric of the student that evaluation sees, on the held-out images.

        Args:
            limit: Use only the first so many of them.
        """
        student = self.evaluation_student
        return measure(
            self.task, lambda images: self.outputs(images, student), self.parts.heldout, limit
        )

    def drain_metrics(self) -> dict[str, float]:
        """Means since the last call under their TensorBoard tags, read by the host at once."""
        means = self.metrics.drain(self.ranks)
        means["student/nonfinite_steps"] = float(self.updates.bad_steps)
        means |= self.parts.train.drain_metrics()
        shares = self.fusion.shares()
        if shares:
            values = torch.stack(list(shares.values())).tolist()
            means.update(zip(shares, values, strict=True))
        if self.parts.features.caches is not None:
            means |= self.parts.features.caches.metrics(self.ranks)
        return means

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, as tensors and plain values; asked of all ranks at once."""
        return saved(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, to the last bit on CPU with as many ranks."""
        restore(self, state)

    def _make_updates(self) -> Updates[Student]:
        student, extra = self.student, [] if self.contrastive is None else [self.contrastive]
        body = [student.backbone, student.projections, self.loss, *extra]
        heads = [student.head, student.probe, self.fusion]
        others = [self.loss, self.fusion, *extra]
        return Updates(self.config, student, body, heads, others, self.device, self.ranks)

    def targets(
        self,
        bank: ImageBank,
        ids: Tensor,
        choice: Choice | Tensor,
        visits: Tensor,
        noise_seed: int,
        images: Tensor | None = None,
        group: int = 1,
    ) -> Targets:
        """What images are to match, see :meth:`repfusion_env.fusion.Fusion.forward`."""
        if isinstance(choice, Tensor):
            choice = self.fusion.choice(choice)
        targets: Targets = self.fusion(
            self.parts.features, bank, ids, choice, visits, noise_seed, images, group
        )
        return targets

    def _task_losses_now(self, images: Tensor, answers: Tensor) -> Tensor:
        with torch.no_grad():
            return self.task.losses(self.outputs(images), answers)

    def _measure_after(
        self, images: Tensor, answers: Tensor, last: StudentPass
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """Maps that the reward starts from, and the task loss on them in inference mode."""
        if not self.rule.after:
            return None, None
        self.loss.eval()
        if self.config.reward.student == "training":
            return [values[: len(images)] for values in last.maps], None
        maps = inference_maps(self.student, images)
        return maps, self.task.losses(self.student.head(*task_input(self.task, maps)), answers)

    def _count(self, result: StepResult) -> None:
        self.metrics.add("reward/mean", result.reward)
        self.metrics.add("student/distillation_loss", result.distillation_loss)
        self.metrics.add("student/task_loss", result.task_loss_before)
        self.metrics.add(f"student/{self.task.score}", result.correct)
