"""Fine-tuning a student on labels, masks, points or boxes, with exact resume.

Every random number of a step depends on (seed, step) alone, so nothing random is stored.

Shape letters: M labelled images, B images of a step.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.checkpoint import load_latest, save_checkpoint
from repfusion_env.config import ExperimentConfig
from repfusion_env.data import ImageBank
from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.progress import Progress
from repfusion_env.stage2.augmentation import augment, mixer
from repfusion_env.stage2.labels import label_count, task_subset
from repfusion_env.stage2.network import (
    TaskStudent,
    evaluate,
    joint_augmentation,
    stage2_task,
    task_loss,
)
from repfusion_env.stage2.settings import FinetuneConfig
from repfusion_env.student import learning_rate_factor, optimizer_of
from repfusion_env.tasks.classification import ClassificationTask
from students import Backbone

KIND = "finetuning"
# Of a row of the curve, beside the metric's values.
ROW = ("step", "loss", "heldout_loss", "learning_rate")
Watcher = Callable[[list[dict[str, float]]], None]


class Stopped(Exception):
    """The caller asked to stop; ``step`` is in a checkpoint where there is a folder for one."""

    def __init__(self, step: int, steps: int) -> None:
        self.step, self.steps = step, steps
        super().__init__(f"stopped at step {step:,} of {steps:,}")


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """What fine-tuning led to.

    Attributes:
        metrics: The task's metric on the held-out images after the last step, by name. No earlier
            and better one is picked, which would choose by the held-out targets.
        headline: The name by which students are compared: ``accuracy``, ``miou``, ``nme``, ...
        loss: Held-out loss there; of classification cross-entropy in nats.
        seconds: Spent on training and evaluation, those before a resume included.
        steps: Optimizer steps.
        labels: Labelled images used.
        curve: A row per evaluation: step, loss (mean training loss since the row before),
            heldout_loss, the metric's values, learning_rate.
        model: Backbone and head in eval mode (the average where ``ema`` is on).
    """

    metrics: dict[str, float]
    headline: str
    loss: float
    seconds: float
    steps: int
    labels: int
    curve: list[dict[str, float]]
    model: TaskStudent

    @property
    def value(self) -> float:
        """The headline metric."""
        return self.metrics[self.headline]

    @property
    def accuracy(self) -> float:
        """Of classification, in [0, 1]."""
        return self.metrics["accuracy"]


def finetune(
    backbone: Backbone,
    train: ImageBank,
    heldout: ImageBank,
    config: FinetuneConfig,
    *,
    experiment: ExperimentConfig | None = None,
    checkpoint_folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    interrupted: Callable[[], bool] | None = None,
    watch: Watcher | None = None,
) -> FinetuneResult:
    """Train ``backbone`` with a new head of its task on the images that ``config`` allows.

    Args:
        backbone: Where to start; it stays as it is.
        train: Training images, on the device to train on.
        heldout: Images to evaluate on, on the same device. They choose nothing.
        config: The settings.
        experiment: The run's configuration, for its task; None: classification.
        checkpoint_folder: Where to save the state now and then; None: nowhere.
        resume: Go on from the newest checkpoint there, or begin where there is none.
        progress: Whether to show how far it is.
        interrupted: Asked after each step; where it says True, the state is saved and
            :class:`Stopped` is raised.
        watch: Given the curve after each evaluation.

    Raises:
        ValueError: More labels than images, images without what the task predicts, a checkpoint
            of other settings, data or weights, or a loss that is not finite any more.
        Stopped: ``interrupted`` said so.
    """
    run = _Run(backbone, train, heldout, config, experiment)
    folder = None if checkpoint_folder is None else Path(checkpoint_folder)
    if resume and folder is not None and (latest := load_latest(folder, kind=KIND)) is not None:
        run.restore(*latest)

    def save() -> None:
        if folder is not None:
            keep = config.keep_checkpoints
            save_checkpoint(folder, run.step, run.state(), kind=KIND, keep=keep)

    if watch is not None:
        watch(run.curve)
    bar = Progress(run.steps, "steps", description="fine-tune", initial=run.step)
    with bar if progress else nullcontext():
        while run.step < run.steps:
            started = time.perf_counter()
            run.train_step()
            evaluated = run.evaluate_if_due()
            run.seconds += time.perf_counter() - started
            if progress:
                row = run.curve[-1] if evaluated else {}
                shown = {key: row[key] for key in ("loss", run.task.headline) if key in row}
                bar.update(run.step, **shown)
            if evaluated and watch is not None:
                watch(run.curve)
            stop = interrupted is not None and interrupted() and run.step < run.steps
            if stop or run.step % config.checkpoint_every == 0 or run.step == run.steps:
                save()
            if stop:
                raise Stopped(run.step, run.steps)
    last = run.curve[-1]
    return FinetuneResult(
        metrics={name: value for name, value in last.items() if name not in ROW},
        headline=run.task.headline,
        loss=last["heldout_loss"],
        seconds=run.seconds,
        steps=run.steps,
        labels=len(run.ids),
        curve=run.curve,
        model=run.evaluated.eval(),
    )


class _Run:
    """Model, optimizer, and how far they are."""

    def __init__(
        self,
        backbone: Backbone,
        train: ImageBank,
        heldout: ImageBank,
        config: FinetuneConfig,
        experiment: ExperimentConfig | None,
    ) -> None:
        self.config, self.train, self.heldout = config, train, heldout
        count = label_count(config.labels, len(train))
        self.task = stage2_task(experiment, train, config)
        self.ids = task_subset(self.task.annotation, train, count, config.seed)
        self.batch = min(config.batch_size, count)
        self.steps = config.total_steps(count)
        with own_randomness(derive_seed(config.seed, "head")):
            model = TaskStudent(copy.deepcopy(backbone).cpu(), self.task, train.shape)
        self.model = model.to(train.device)
        self.model.requires_grad_(True)
        self.model.backbone.requires_grad_(not config.frozen)
        self.average = None
        if config.ema:
            # The task is nothing that is trained, and may hold much.
            average = copy.deepcopy(self.model, {id(self.task): self.task})
            self.average = average.requires_grad_(False)
        self.optimizer = _optimizer(self.model, config)
        self.augmentation = joint_augmentation(config, train, self.task)
        classifies = isinstance(self.task, ClassificationTask)
        self.mix = mixer(config, len(train.classes)) if classifies else None
        self.identity = self._identity(backbone)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=train.device)
        self._order: tuple[int, Tensor] | None = None

    @property
    def evaluated(self) -> TaskStudent:
        """The averaged model where there is one."""
        return self.average if self.average is not None else self.model

    def train_step(self) -> None:
        """One optimizer step."""
        config, model = self.config, self.model
        model.train()
        if config.frozen:
            model.backbone.eval()
        ids = self._batch_ids()
        with own_randomness(derive_seed(config.seed, "step", self.step), self.train.device):
            images, targets = self.train.pixels(ids), self.task.targets(self.train, ids)
            if self.augmentation is not None:
                images, targets = self.augmentation(images, targets)
            if self.task.annotation == "labels":
                images = augment(images, config)
            if self.mix is not None:
                images, targets = self.mix(images, targets)
            with self._precision():
                outputs = model(images)
            loss = task_loss(self.task, outputs, targets, label_smoothing=config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.gradient_clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        factor = rate_factor(config, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()
        if self.average is not None:
            _follow(self.average, model, config.ema, self.step)
        self.loss_sum += loss.detach()
        self.step += 1

    def evaluate_if_due(self) -> bool:
        """Add a row to the curve at the last step and at those evenly spaced before it."""
        count = min(self.config.evaluations, self.steps)
        if self.step * count // self.steps == (self.step - 1) * count // self.steps:
            return False
        since = self.step - (int(self.curve[-1]["step"]) if self.curve else 0)
        loss = float(self.loss_sum) / since
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}; try a lower learning_rate than "
                f"{self.config.learning_rate}, or precision 'fp32'"
            )
        self.loss_sum.zero_()
        heldout_loss, metrics = evaluate(self.evaluated, self.heldout)
        rate = self.config.learning_rate * rate_factor(self.config, self.step - 1, self.steps)
        self.curve.append(
            {
                "step": self.step,
                "loss": loss,
                "heldout_loss": heldout_loss,
                **metrics,
                "learning_rate": rate,
            }
        )
        return True

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` takes back."""
        return {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_sum": self.loss_sum,
            "curve": self.curve,
            "seconds": self.seconds,
        }

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Go back to a state of the same settings, images and first weights."""
        before, now = state["identity"], self.identity
        if before["settings"] != now["settings"]:
            old, new = json.loads(before["settings"]), json.loads(now["settings"])
            # What an earlier version did not know it had left off.
            old = FinetuneConfig().essential() | old
            changed = [name for name in new if old[name] != new[name]]
            if changed:
                told = ", ".join(f"{name} was {old[name]}, now {new[name]}" for name in changed)
                raise ValueError(f"resume: the run was started with other settings: {told}")
        for key, noun in (("data", "images"), ("start", "weights"), ("head", "heads")):
            if before.get(key, now[key]) != now[key]:
                raise ValueError(f"resume: the run was started with other {noun}")
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss_sum = state["loss_sum"].to(self.train.device)
        self.curve = [dict(row) for row in state["curve"]]
        self.seconds, self.step = float(state["seconds"]), step

    def _identity(self, backbone: Backbone) -> dict[str, Any]:
        values = backbone.state_dict().values()
        return {
            "settings": json.dumps(self.config.essential(), sort_keys=True),
            "data": f"{self.train.fingerprint} {self.heldout.fingerprint}",
            "head": str(self.model.head),
            "start": [float(value.double().abs().sum()) for value in values],
        }

    def _batch_ids(self) -> Tensor:
        """The next images of an endless row of passes, each in its own random order."""
        count = len(self.ids)
        first = self.step * self.batch
        parts = []
        for epoch in range(first // count, (first + self.batch - 1) // count + 1):
            low = max(first - epoch * count, 0)
            parts.append(self._pass(epoch)[low : first + self.batch - epoch * count])
        return torch.cat(parts)

    def _pass(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator()
            generator.manual_seed(derive_seed(self.config.seed, "order", epoch))
            order = torch.randperm(len(self.ids), generator=generator).to(self.ids.device)
            self._order = (epoch, self.ids[order])
        return self._order[1]

    def _precision(self) -> Any:
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.train.device.type, torch.bfloat16, enabled=enabled)


def rate_factor(config: FinetuneConfig, step: int, steps: int) -> float:
    """Factor of the learning rates in step ``step``, counted from 0, of ``steps``."""
    warmup = int(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    # The warm-up comes on top of a multistep's early part and before a cosine's descent.
    if config.schedule == "cosine":
        return learning_rate_factor("cosine", (step - warmup) / max(steps - warmup, 1))
    return learning_rate_factor(config.schedule, step / steps)


def _optimizer(model: TaskStudent, config: FinetuneConfig) -> torch.optim.Optimizer:
    rate = config.learning_rate
    groups: list[dict[str, Any]] = [{"params": list(model.head.parameters()), "lr": rate}]
    if not config.frozen:
        body = list(model.backbone.parameters())
        groups.append({"params": body, "lr": rate * config.backbone_factor})
    return optimizer_of(
        groups,
        config.optimizer,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the model; faster in the first steps, where it knows little."""
    weight = 1.0 - min(decay, (1.0 + step) / (10.0 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
    for mine, new in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(new)
