"""Students that are trained without a teacher, as controls of those that are distilled.

The same backbone with the same initial weights, the same images in the same order, the same
optimizer and as many image presentations; only what the student is trained for differs.

Shape letters: M images, N images of a step, B samples of an update (B >= N), C,H,W image,
S student width, h,w its last map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.control_options import views_problem
from repfusion_env.augmentation import make_augmentation
from repfusion_env.config import ExperimentConfig
from repfusion_env.contrastive import Views, make_contrastive
from repfusion_env.data import load_data
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.pseudo_labels import require_labels
from repfusion_env.device_means import DeviceMeans
from repfusion_env.devices import resolve_device
from repfusion_env.groups import one_look
from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.stage2.labels import label_count, task_subset
from repfusion_env.stream import ImageStream
from repfusion_env.student import (
    head_shapes,
    inference_maps,
    stage_maps,
    stage_shapes,
    student_backbone,
    task_input,
)
from repfusion_env.tasks import Task
from repfusion_env.tasks.build import build_task, check_heldout
from repfusion_env.tasks.measuring import measure
from repfusion_env.updates import Updates


@dataclass(frozen=True)
class Banks:
    """The images to train on, and those held out."""

    train: ImageBank
    heldout: ImageBank


class ControlStudent(nn.Module):
    """A backbone, with the head of its task where targets teach it."""

    def __init__(self, config: ExperimentConfig, banks: Banks, task: Task | None) -> None:
        super().__init__()
        # Before all else, as of a distilled student: the same seed gives the same weights.
        self.backbone = student_backbone(config.student, banks.train.shape)
        self.precision = config.student.precision
        self.head, self.all_stages = None, False
        if task is not None:
            shapes = head_shapes(task, stage_shapes(self.backbone, banks.train.shape))
            self.head, self.all_stages = task.head(shapes), task.reads == "stages"

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps that the head reads, shallow to deep, the last stage's among them.

        Args:
            images: (B, C, H, W) in [-1, 1].

        Returns:
            float32 maps; the last one is (B, S, h, w).
        """
        stages = self.backbone.stages if self.all_stages else self.backbone.stages[-1:]
        return stage_maps(self.backbone, images, stages, self.precision)


class ControlTrainer:
    """Trains one student by what its task is to predict, or by the views of its images alone.

    Args:
        config: The experiment. Its teacher, grid, distillation and reward are not used.
        method: ``simclr`` or ``supervised``.
        labels: Of ``supervised``: the part of the training images, or their number, that has labels
            (masks, points, boxes) and is shown; drawn by the seed, of labels from each class.
        augment: Of ``supervised`` classification: a new random view of each image instead of the
            image.

    Raises:
        ValueError: With a sentence for whatever does not fit.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        method: str,
        *,
        labels: str = "100%",
        augment: bool = False,
    ) -> None:
        self.config, self.method = config, method
        self.device = resolve_device(config.device)
        train, heldout = load_data(config.data)
        self.parts = Banks(train.to(self.device), heldout.to(self.device))
        self.task: Task | None = None
        if method == "supervised":
            if config.task == "classification":
                require_labels(train, "the supervised control")
            self.task = build_task(config, train)
            check_heldout(config, heldout)
            if augment and self.task.annotation != "labels":
                raise ValueError(views_problem(self.task.annotation))
        seed = config.seed
        with own_randomness(derive_seed(seed, "student")):
            student = ControlStudent(config, self.parts, self.task)
        layout = torch.channels_last if config.student.channels_last else torch.contiguous_format
        self.student = student.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        # Where nothing else is learned, there is no other loss to weigh it against.
        self.weight = config.contrastive.weight or float(method == "simclr")
        weighed = replace(config, contrastive=replace(config.contrastive, weight=self.weight))
        width = self.student.backbone.feature_channels
        self.contrastive = make_contrastive(weighed, width, train.shape, seed, self.device)
        self.views = Views(config.contrastive, train.shape) if augment else None
        beside = [] if self.contrastive is None else [self.contrastive]
        body = [self.student.backbone, *beside]
        heads = [] if self.student.head is None else [self.student.head]
        self.updates = Updates(config, self.student, body, heads, beside, self.device)
        # The images that are shown, as ids of the bank.
        self.pool = torch.arange(len(train), device=self.device)
        self.labels = label_count(labels, len(train)) if method == "supervised" else 0
        annotation = "labels" if self.task is None else self.task.annotation
        if 0 < self.labels < len(train):
            self.pool = task_subset(annotation, train, self.labels, seed).to(self.device)
        self.augmentation = make_augmentation(config, self.parts.train, annotation)
        self._pool_on_host: np.ndarray | None = None
        self.stream = ImageStream(len(self.pool), self.device, shuffle=True)
        self.stream.reset(seed)
        self.recent = self.pool[:0]  # earlier images that fill up a batch of few lanes
        self.recent_changed: list[Tensor] = []  # as they were shown, with their targets
        self.metrics = DeviceMeans(self.device)
        self.steps = 0

    @property
    def evaluation_student(self) -> ControlStudent:
        """The averaged student where there is one, else the student."""
        return self.student if self.updates.average is None else self.updates.average

    @torch.enable_grad()
    def step(self) -> None:
        """Show the student the next N images and update it, ``optimizer.updates`` times.

        Raises:
            NonFiniteError: ``optimizer.nonfinite_patience`` steps in a row had no finite loss.
        """
        config, bank = self.config, self.parts.train
        lanes, group = config.env.num_envs, config.env.group_size
        new = self._next(lanes // group)
        views = self.contrastive is not None or self.views is not None
        if not views and one_look(lanes, group, config.optimizer.batch_size):
            # As the distilled student, which sees an image of a group once; every image counts
            # equally, so that the losses' mean is that of the lanes.
            lanes, group = len(new), 1
        new = new.repeat_interleave(group)
        ids = torch.cat((new, self.recent))[: max(lanes, config.optimizer.batch_size)]
        changed = self._changed(new, group)
        if self.recent_changed:
            pairs = zip(changed, self.recent_changed, strict=True)
            changed = [torch.cat(pair)[: len(ids)] for pair in pairs]
        if config.env.num_envs < config.optimizer.batch_size:
            self.recent, self.recent_changed = ids, changed
        progress = min(1.0, self.steps / config.total_steps)
        # A batch of one has no batch statistics, and no others to be told apart from.
        if len(ids) > 1:
            self.student.train()
            with own_randomness(derive_seed(config.seed, "step", self.steps), self.device):
                images = changed[0] if changed else bank.pixels(ids)
                for update in range(config.optimizer.updates):
                    buffers = self.updates.buffers()
                    # As in a distilled student's step, the first forward is told of.
                    told = None if update else lanes
                    total = self._loss(images, changed[1:], ids, told)
                    self.updates.apply(total, buffers, progress, again=update > 0)
        self.steps += 1
        self.updates.watch(self.steps)

    def _next(self, count: int) -> Tensor:
        """The images that come next; where they are streamed those after them are decoded."""
        bank, stream = self.parts.train, self.stream
        if not bank.streamed:
            return self.pool[stream.take(count)]
        if self._pool_on_host is None:
            self._pool_on_host = self.pool.cpu().numpy()
        pool = self._pool_on_host
        now, later = pool[stream.peek(count)], stream.peek(count * (1 + bank.ahead))[count:]
        new = self.pool[stream.take(count)]
        bank.stage(new, now, list(pool[later].reshape(-1, count)))
        return new

    def _changed(self, ids: Tensor, group: int) -> list[Tensor]:
        """Images (N, C, H, W) as ``augmentation`` shows them, and their targets; else nothing.

        Drawn as the distillation trainer draws, so that both show the same: one change for each
        ``group`` of neighbours.
        """
        if self.augmentation is None:
            return []
        bank = self.parts.train
        targets = bank.labels[ids] if self.task is None else self.task.targets(bank, ids)
        seed = derive_seed(self.config.seed, "augment", self.steps)
        return list(self.augmentation.drawn_by(seed, bank.pixels(ids), targets, group))

    def _loss(
        self, images: Tensor, answers: list[Tensor], ids: Tensor, lanes: int | None
    ) -> Tensor:
        """The loss of a batch; its first ``lanes`` go into the metrics (None: none do)."""
        total = torch.zeros((), device=self.device)
        if self.task is not None and self.student.head is not None:
            targets = answers[0] if answers else self.task.targets(self.parts.train, ids)
            shown = images if self.views is None else self.views(images)
            outputs = self.student.head(*task_input(self.task, self.student.features(shown)))
            losses = self.task.losses(outputs, targets)
            if lanes is not None:
                self.metrics.add("student/task_loss", losses[:lanes])
                correct = self.task.correct(outputs, targets)
                self.metrics.add(f"student/{self.task.score}", correct[:lanes])
            total = total + losses.mean()
        if self.contrastive is not None:
            alike: Tensor = self.contrastive(self._pooled, images, ids)
            if lanes is not None:
                self.metrics.add("student/contrastive_loss", alike)
            total = total + self.weight * alike
        return total

    @torch.no_grad()
    def embed(self, images: Tensor, student: ControlStudent | None = None) -> tuple[Tensor, Tensor]:
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
    def outputs(self, images: Tensor, student: ControlStudent | None = None) -> Any:
        """What the student's own head says, in inference mode; for the task's methods.

        Args:
            images: (N, C, H, W) in [-1, 1].
            student: Default: the student that is being trained.

        Raises:
            ValueError: It has no head, as nothing but views teaches it.
        """
        student = student or self.student
        if self.task is None or student.head is None:
            raise ValueError(f"'{self.method}' trains no head of a task")
        return student.head(*task_input(self.task, inference_maps(student, images)))

    def heldout_metrics(self, limit: int | None = None) -> dict[str, float]:
        """The task's metric of the student's own head on held-out images; empty without a head.

        Args:
            limit: Use only the first so many of them.
        """
        student = self.evaluation_student
        if self.task is None:
            return {}
        return measure(
            self.task, lambda images: self.outputs(images, student), self.parts.heldout, limit
        )

    def drain_metrics(self) -> dict[str, float]:
        """Means since the last call under their TensorBoard tags, read by the host at once."""
        means = self.metrics.drain()
        means["student/nonfinite_steps"] = float(self.updates.bad_steps)
        means |= self.parts.train.drain_metrics()
        return means

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs."""
        return {
            "steps": self.steps,
            "student": self.student.state_dict(),
            "contrastive": None if self.contrastive is None else self.contrastive.state_dict(),
            **self.updates.state_dict(),
            "pool": self.pool,
            "stream": self.stream.state_dict(),
            "recent": self.recent,
            "recent_changed": self.recent_changed,
            "metrics": self.metrics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, to the last bit on CPU."""
        self.steps = state["steps"]
        self.student.load_state_dict(state["student"])
        if self.contrastive is not None:
            self.contrastive.load_state_dict(state["contrastive"])
        self.updates.load_state_dict(dict(state))
        self.pool, self._pool_on_host = state["pool"].to(self.device), None
        self.stream.load_state_dict(state["stream"])
        self.recent = state["recent"].to(self.device)
        changed = state.get("recent_changed", ())  # of which earlier versions knew nothing
        self.recent_changed = [values.to(self.device) for values in changed]
        self.metrics.load_state_dict(state["metrics"])

    def _pooled(self, images: Tensor) -> Tensor:
        return self.student.features(images)[-1].mean((2, 3))
