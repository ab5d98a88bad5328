"""The distillation trainer: where teacher, student, loss, optimizer and reward meet.

Shape letters: N lanes, B samples of an update (B >= N), C,H,W image, S student width, F teacher
width of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repfusion_env import registry
from repfusion_env.config import ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.device_means import DeviceMeans
from repfusion_env.features import pooled_layers, resized
from repfusion_env.frozen import FrozenParts
from repfusion_env.losses import DistillationLoss
from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.rewards import Measurement, RewardRule
from repfusion_env.student import Student, learning_rate_factor, make_optimizer
from repfusion_env.student_buffers import restore_buffers, snapshot_buffers
from repfusion_env.tasks import Task


class NonFiniteError(RuntimeError):
    """The loss was not finite for too many steps in a row."""


@dataclass(frozen=True)
class StepResult:
    """What one step did, per lane; tensors (N,) on the trainer's device.

    Attributes:
        reward: By the configured rule; always finite.
        distillation_loss: Before the update.
        task_loss_before: Of the training forward; in inference mode under ``student_gain``.
        task_loss_after: After the update, in inference mode; None where the reward needs none.
        correct: Whether the student solved the sample in the training forward.
    """

    reward: Tensor
    distillation_loss: Tensor
    task_loss_before: Tensor
    task_loss_after: Tensor | None
    correct: Tensor


class DistillationTrainer:
    """Trains one student by distillation, a step at a time; never leaves the device.

    Args:
        config: The experiment.
        parts: What stays as it is: banks, teacher, grid, feature statistics.

    A step makes no host synchronisation; :meth:`drain_metrics` and, every few steps on CUDA, the
    watch for non-finite losses do.
    """

    def __init__(self, config: ExperimentConfig, parts: FrozenParts) -> None:
        self.config = config
        self.parts = parts
        self.device = parts.device
        self.task: Task = registry.look_up("task", config.task, registry.TASKS)(parts.train)
        self.rule: RewardRule = registry.look_up("reward", config.reward.kind, registry.REWARDS)
        # With nothing trained there is no update to look back on; the look-ahead still judges.
        self.heldout_reward = config.reward.kind if self.rule.attributable else "student_lookahead"
        self.heldout_rule: RewardRule = registry.look_up(
            "reward", self.heldout_reward, registry.REWARDS
        )
        self.loss = DistillationLoss(config.distillation.losses)
        self.reset(config.seed)

    def reset(self, seed: int) -> None:
        """Start over: new student, optimizer, averages and counters, all from ``seed``."""
        self.seed = seed
        # The caller's random state is none of our business, and ours none of the caller's.
        with own_randomness(derive_seed(seed, "student")):
            student = Student(self.config, self.parts, self.task)
        layout = (
            torch.channels_last if self.config.student.channels_last else torch.contiguous_format
        )
        self.student = student.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.average = (
            deepcopy(self.student).requires_grad_(False).eval() if self.config.student.ema else None
        )
        self.optimizer = make_optimizer(self.student, self.config.optimizer)
        self.steps = 0
        self.metrics = DeviceMeans(self.device)
        self.bad_in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self._recent: tuple[Tensor, list[Tensor]] | None = None

    @property
    def grid_timesteps(self) -> tuple[int, ...]:
        """The timestep grid, length K."""
        return self.parts.grid.timesteps

    @property
    def noise_seed(self) -> int:
        """Seed of the teacher's noise on training images."""
        return derive_seed(self.seed, "noise")

    @property
    def heldout_noise_seed(self) -> int:
        """Seed of the noise where nothing is trained; the same however the student was seeded."""
        return derive_seed(self.config.seed, "held-out noise")

    @property
    def progress(self) -> float:
        """Part of the configured run that is done, in [0, 1]."""
        return min(1.0, self.steps / self.config.total_steps)

    @property
    def evaluation_student(self) -> Student:
        """The averaged student where there is one, else the student."""
        return self.average if self.average is not None else self.student

    # Callers act without gradients, some inside no_grad or inference_mode; the student learns.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(self, ids: Tensor, timesteps: Tensor, visits: Tensor) -> StepResult:
        """Distil N images at their timesteps, update the student, and measure the rewards.

        Args:
            ids: (N,) int64 images of the training bank.
            timesteps: (N,) int64 timesteps.
            visits: (N,) int64 keys of fresh noise.

        Returns:
            The outcome per lane.

        Raises:
            NonFiniteError: ``optimizer.nonfinite_patience`` steps in a row had no finite loss.
        """
        bank, lanes = self.parts.train, ids.shape[0]
        new = self.parts.features(bank, ids, timesteps, visits, self.noise_seed)
        batch_ids, teacher = self._fill_up(ids, new)
        targets = self.task.targets(bank, batch_ids)
        images = bank.pixels(batch_ids)
        before = (
            self._task_losses_now(images[:lanes], targets[:lanes]) if self.rule.before else None
        )

        # A batch of one has no batch statistics to normalise with; the first step of one lane
        # therefore measures without an update.
        self.student.train(len(batch_ids) > 1)
        statistics = snapshot_buffers(self.student)
        # Dropout and stochastic depth draw from (seed, step), not from the caller's generator.
        dropout_seed = derive_seed(self.seed, "step", self.steps)
        with self._precision(), own_randomness(dropout_seed, self.device):
            maps = self.student.features(images)
        pooled = maps.mean((2, 3))
        distilled = self._distillation_losses(maps, pooled, teacher)
        weight = self.config.distillation.task_weight
        outputs = self.student.head(pooled if weight else pooled.detach())
        task_losses = self.task.losses(outputs, targets)
        total = distilled.mean() + (weight or 1.0) * task_losses.mean()
        probe_losses = None
        if self.rule.probe:
            probe_losses = self.task.losses(self.student.probe(pooled_layers(teacher)), targets)
            total = total + probe_losses.mean()
        if len(batch_ids) > 1:
            self._update(total, statistics)
        self.steps += 1

        with torch.no_grad():
            features, after = self._measure_after(images[:lanes], targets[:lanes])
            measured = self._measurement(
                features,
                [z[:lanes] for z in teacher],
                targets[:lanes],
                loss_before=task_losses[:lanes].detach() if before is None else before,
                loss_after=after,
                probe_loss=None if probe_losses is None else probe_losses[:lanes].detach(),
            )
            reward = _finite(self.rule.compute(measured), measured.loss_before)
            correct = self.task.correct(outputs[:lanes], targets[:lanes])
        result = StepResult(
            reward, distilled[:lanes].detach(), measured.loss_before, after, correct
        )
        self._count(result)
        self._watch()
        return result

    @torch.no_grad()
    def judge(self, bank: ImageBank, ids: Tensor, timesteps: Tensor, visits: Tensor) -> StepResult:
        """The same measurement with nothing trained: the student as evaluation sees it.

        Args:
            bank: Usually the held-out bank.
            ids: (N,) images of ``bank``.
            timesteps: (N,) timesteps.
            visits: (N,) noise keys; the same keys give the same noise to every policy.

        Returns:
            The outcome per lane; ``reward`` by :attr:`heldout_rule`.
        """
        teacher = self.parts.features(bank, ids, timesteps, visits, self.heldout_noise_seed)
        student, targets = self.evaluation_student, self.task.targets(bank, ids)
        maps, pooled = self.embed(bank.pixels(ids), student)
        outputs = student.head(pooled)
        losses = self.task.losses(outputs, targets)
        probe_loss = None
        if self.heldout_rule.probe:
            probe_loss = self.task.losses(student.probe(pooled_layers(teacher)), targets)
        teacher = self._on_student_grid(teacher, maps)
        measured = self._measurement(
            maps if self.config.distillation.dense else pooled,
            teacher,
            targets,
            loss_before=losses,
            loss_after=losses,
            probe_loss=probe_loss,
            student=student,
        )
        return StepResult(
            _finite(self.heldout_rule.compute(measured), losses),
            self._distillation_losses(maps, pooled, teacher, student),
            losses,
            losses,
            self.task.correct(outputs, targets),
        )

    @torch.no_grad()
    def embed(self, images: Tensor, student: Student | None = None) -> tuple[Tensor, Tensor]:
        """Student features in inference mode.

        Args:
            images: (N, C, H, W) in [-1, 1].
            student: Default: the student that is being trained.

        Returns:
            The last stage's map (N, S, h, w) and its average (N, S).
        """
        student = student or self.student
        training = student.training
        student.eval()
        with self._precision():
            maps = student.features(images)
        student.train(training)
        return maps, maps.mean((2, 3))

    def drain_metrics(self) -> dict[str, float]:
        """Means since the last call under their TensorBoard tags, read by the host at once."""
        means = self.metrics.drain()
        means["student/nonfinite_steps"] = float(self.bad_steps)
        return means

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, as tensors and plain values."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "student": self.student.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bad": [self.bad_in_a_row, self.bad_steps],
            "recent": None if self._recent is None else [self._recent[0], *self._recent[1]],
            "metrics": self.metrics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, to the last bit on CPU."""
        self.reset(state["seed"])
        self.steps = state["steps"]
        self.student.load_state_dict(state["student"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        # The optimizer would keep the given moments themselves, shared with whoever gave them.
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        self.bad_in_a_row, self.bad_steps = (value.to(self.device) for value in state["bad"])
        if state["recent"] is not None:
            ids, *features = (value.to(self.device) for value in state["recent"])
            self._recent = (ids, features)
        self.metrics.load_state_dict(state["metrics"])

    def _fill_up(self, ids: Tensor, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """This step's samples first, then the most recent earlier ones up to the batch size."""
        size = self.config.optimizer.batch_size
        if len(ids) >= size:
            return ids, features
        if self._recent is not None:
            ids = torch.cat((ids, self._recent[0]))[:size]
            pairs = zip(features, self._recent[1], strict=True)
            lanes = len(features[0])
            features = [torch.cat(pair)[:size] for pair in pairs]
            # An earlier decision without a finite feature spoilt its own step; the newest decision
            # takes its place, or it would spoil every step until it has left the batch.
            finite = torch.stack([z.flatten(1).isfinite().all(1) for z in features]).all(0)
            rows = torch.arange(len(ids), device=self.device)
            rows = rows * (finite | (rows < lanes))
            ids, features = ids[rows], [z[rows] for z in features]
        self._recent = (ids, features)
        return ids, features

    @contextmanager
    def _precision(self) -> Iterator[None]:
        enabled = self.config.student.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            yield

    def _on_student_grid(self, teacher: list[Tensor], maps: Tensor) -> list[Tensor]:
        if not self.config.distillation.dense:
            return teacher
        size = (maps.shape[2], maps.shape[3])
        return [resized(z, size) for z in teacher]

    def _distillation_losses(
        self, maps: Tensor, pooled: Tensor, teacher: list[Tensor], student: Student | None = None
    ) -> Tensor:
        """Loss per sample (B,), the mean over the teacher's layers."""
        features = maps if self.config.distillation.dense else pooled
        teacher = self._on_student_grid(teacher, maps)
        projections = (student or self.student).projections
        losses = [self.loss(p(features), z) for p, z in zip(projections, teacher, strict=True)]
        return torch.stack(losses).mean(0)

    def _update(self, total: Tensor, statistics: list[Tensor]) -> None:
        """Backward, clip and optimizer step; skipped on the device where anything is not finite."""
        settings = self.config.optimizer
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bad = ~(torch.isfinite(total.detach()) & torch.isfinite(norm))
        if settings.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(
                [p for p in self.student.parameters() if p.grad is not None],
                settings.gradient_clip,
                norm,
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor(settings.schedule, self.progress)
        # Fused optimizers leave parameters and moments alone where found_inf is 1, without the host
        # having to look; gradient scalers use the same attributes.
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.bad_in_a_row = (self.bad_in_a_row + 1) * bad
        self.bad_steps = self.bad_steps + bad
        # The forward has already moved the running statistics of batch norms.
        restore_buffers(self.student, statistics, bad)
        if self.average is not None:
            self._update_average(self.average, bad)

    @torch.no_grad()
    def _update_average(self, average: Student, bad: Tensor) -> None:
        weight = (1.0 - self.config.student.ema) * ~bad
        parameters: list[Tensor] = list(average.parameters())
        moves = list(torch._foreach_sub(list(self.student.parameters()), parameters))
        torch._foreach_mul_(moves, weight)
        torch._foreach_add_(parameters, moves)
        for mine, new in zip(average.buffers(), self.student.buffers(), strict=True):
            mine.copy_(new)

    def _task_losses_now(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            return self.task.losses(self.student.head(self.embed(images)[1]), targets)

    def _measure_after(
        self, images: Tensor, targets: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.rule.after:
            return None, None
        maps, pooled = self.embed(images)
        losses = self.task.losses(self.student.head(pooled), targets)
        return (maps if self.config.distillation.dense else pooled), losses

    def _measurement(
        self,
        features: Tensor | None,
        teacher: list[Tensor],
        targets: Tensor,
        *,
        loss_before: Tensor,
        loss_after: Tensor | None,
        probe_loss: Tensor | None,
        student: Student | None = None,
    ) -> Measurement:
        student = student or self.student
        if features is not None:
            teacher = self._on_student_grid(teacher, features)

        def task_losses(moved: Tensor) -> Tensor:
            pooled = moved.mean((2, 3)) if moved.ndim == 4 else moved
            return self.task.losses(student.head(pooled), targets)

        return Measurement(
            student=features,
            teacher=teacher,
            projections=list(student.projections),  # type: ignore[arg-type]
            loss=self.loss,
            task_losses=task_losses,
            loss_before=loss_before,
            loss_after=loss_after,
            probe_loss=probe_loss,
            config=self.config.reward,
        )

    def _count(self, result: StepResult) -> None:
        self.metrics.add("reward/mean", result.reward)
        self.metrics.add("student/distillation_loss", result.distillation_loss)
        self.metrics.add("student/task_loss", result.task_loss_before)
        self.metrics.add("student/accuracy", result.correct)

    def _watch(self) -> None:
        patience = self.config.optimizer.nonfinite_patience
        # Looking is free on a CPU; on CUDA it would stall every step, so it happens now and then.
        if self.device.type != "cpu" and self.steps % patience:
            return
        if int(self.bad_in_a_row) >= patience:
            raise NonFiniteError(
                f"the loss has not been finite for {int(self.bad_in_a_row)} steps in a row (step "
                f"{self.steps}); likely causes: optimizer.learning_rate "
                f"{self.config.optimizer.learning_rate} is too large, no optimizer.gradient_clip, "
                f"teacher.precision {self.config.teacher.precision} overflows, or teacher weights "
                "that hold NaN"
            )


def _finite(reward: Tensor, loss: Tensor) -> Tensor:
    """Rewards with NaN replaced by what doing nothing is worth; the step is counted as bad."""
    reward = torch.where(torch.isfinite(reward), reward, -loss)
    return torch.nan_to_num(reward, nan=-10.0, posinf=10.0, neginf=-10.0)
