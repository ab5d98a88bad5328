"""Students that are trained without a teacher, as controls of those that are distilled.

The same backbone with the same initial weights, the same images in the same order, the same
optimizer and as many image presentations; only what the student is trained for differs.

Shape letters: M images, N images of a step, B samples of an update (B >= N), C,H,W image,
S student width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env import registry
from repfusion_env.config import ExperimentConfig
from repfusion_env.contrastive import Views, make_contrastive
from repfusion_env.data import load_data
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.pseudo_labels import require_labels
from repfusion_env.device_means import DeviceMeans
from repfusion_env.devices import resolve_device
from repfusion_env.features import chunks
from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.stage2.labels import label_count, labelled_subset
from repfusion_env.stream import ImageStream
from repfusion_env.tasks import Task
from repfusion_env.updates import Updates
from students import build_backbone


@dataclass(frozen=True)
class Banks:
    """The images to train on, and those held out."""

    train: ImageBank
    heldout: ImageBank


class ControlStudent(nn.Module):
    """A backbone, with the head of its task where labels teach it."""

    def __init__(self, config: ExperimentConfig, banks: Banks, task: Task | None) -> None:
        super().__init__()
        channels, size, _ = banks.train.shape
        # Before all else, as of a distilled student: the same seed gives the same weights.
        self.backbone = build_backbone(
            config.student.name,
            in_channels=channels,
            image_size=size,
            pretrained=config.student.pretrained,
        )
        self.head = None if task is None else task.head(self.backbone.feature_channels)

    def features(self, images: Tensor) -> Tensor:
        """The last stage's map, float32 (B, S, h, w), of images (B, C, H, W) in [-1, 1]."""
        last: Tensor = self.backbone(images)[self.backbone.stages[-1]]
        return last.float()


class ControlTrainer:
    """Trains one student by labels, or by the views of its images alone.

    Args:
        config: The experiment. Its teacher, grid, distillation and reward are not used.
        method: ``simclr`` or ``supervised``.
        labels: Of ``supervised``: the part of the training images, or their number, that has labels
            and is shown; drawn from each class by the seed.
        augment: Of ``supervised``: a new random view of each image instead of the image.

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
            require_labels(train, "the supervised control")
            self.task = registry.look_up("task", config.task, registry.TASKS)(train)
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
        if 0 < self.labels < len(train):
            self.pool = labelled_subset(train.labels, self.labels, seed).to(self.device)
        self.stream = ImageStream(len(self.pool), self.device, shuffle=True)
        self.stream.reset(seed)
        self.recent = self.pool[:0]  # earlier images that fill up a batch of few lanes
        self.metrics = DeviceMeans(self.device)
        self.steps = 0

    @property
    def evaluation_student(self) -> ControlStudent:
        """The averaged student where there is one, else the student."""
        return self.student if self.updates.average is None else self.updates.average

    @torch.enable_grad()
    def step(self) -> None:
        """Show the student the next N images and update it once.

        Raises:
            NonFiniteError: ``optimizer.nonfinite_patience`` steps in a row had no finite loss.
        """
        config, bank = self.config, self.parts.train
        lanes, group = config.env.num_envs, config.env.group_size
        new = self.pool[self.stream.take(lanes // group).repeat_interleave(group)]
        ids = torch.cat((new, self.recent))[: max(lanes, config.optimizer.batch_size)]
        if lanes < config.optimizer.batch_size:
            self.recent = ids
        progress = min(1.0, self.steps / config.total_steps)
        # A batch of one has no batch statistics, and no others to be told apart from.
        if len(ids) > 1:
            self.student.train()
            buffers = self.updates.buffers()
            with own_randomness(derive_seed(config.seed, "step", self.steps), self.device):
                total = self._loss(bank.pixels(ids), ids, lanes)
                self.updates.apply(total, buffers, progress)
        self.steps += 1
        self.updates.watch(self.steps)

    def _loss(self, images: Tensor, ids: Tensor, lanes: int) -> Tensor:
        total = torch.zeros((), device=self.device)
        if self.task is not None and self.student.head is not None:
            answers = self.task.targets(self.parts.train, ids)
            shown = images if self.views is None else self.views(images)
            outputs = self.student.head(self._pooled(shown))
            losses = self.task.losses(outputs, answers)
            self.metrics.add("student/task_loss", losses[:lanes])
            correct = self.task.correct(outputs, answers)
            self.metrics.add("student/accuracy", correct[:lanes])
            total = total + losses.mean()
        if self.contrastive is not None:
            alike: Tensor = self.contrastive(self._pooled, images, ids)
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
        student = student or self.student
        training = student.training
        student.eval()
        with self._precision():
            last = student.features(images)
        student.train(training)
        return last, last.mean((2, 3))

    @torch.no_grad()
    def heldout_accuracy(self) -> float | None:
        """Of the student's own head on all held-out images; None where it has none."""
        student, bank = self.evaluation_student, self.parts.heldout
        if self.task is None or student.head is None:
            return None
        correct = []
        for ids in chunks(torch.arange(len(bank), device=self.device)):
            outputs = student.head(self.embed(bank.pixels(ids), student)[1])
            correct.append(self.task.correct(outputs, self.task.targets(bank, ids)))
        return float(torch.cat(correct).float().mean())

    def drain_metrics(self) -> dict[str, float]:
        """Means since the last call under their TensorBoard tags, read by the host at once."""
        means = self.metrics.drain()
        means["student/nonfinite_steps"] = float(self.updates.bad_steps)
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
            "metrics": self.metrics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, to the last bit on CPU."""
        self.steps = state["steps"]
        self.student.load_state_dict(state["student"])
        if self.contrastive is not None:
            self.contrastive.load_state_dict(state["contrastive"])
        self.updates.load_state_dict(dict(state))
        self.pool = state["pool"].to(self.device)
        self.stream.load_state_dict(state["stream"])
        self.recent = state["recent"].to(self.device)
        self.metrics.load_state_dict(state["metrics"])

    def _pooled(self, images: Tensor) -> Tensor:
        with self._precision():
            return self.student.features(images).mean((2, 3))

    @contextmanager
    def _precision(self) -> Iterator[None]:
        enabled = self.config.student.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            yield
