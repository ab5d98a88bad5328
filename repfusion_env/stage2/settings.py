"""How a student is fine-tuned. Loads nothing heavy, so that a command line is checked at once."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from repfusion_env.registry import did_you_mean
from repfusion_env.stage2.labels import label_count

if TYPE_CHECKING:
    from repfusion_env.config import ExperimentConfig

CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "multistep", "constant"),
    "precision": ("fp32", "bf16"),
}
# Lowest value that each number may have, and what it must stay below.
RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1e-9, math.inf),
    "steps": (1, math.inf),
    "least_steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "learning_rate": (1e-12, math.inf),
    "backbone_factor": (0, math.inf),
    "warmup": (0, 1),
    "weight_decay": (0, math.inf),
    "momentum": (0, 1),
    "gradient_clip": (0, math.inf),
    "ema": (0, 1),
    "mixup": (0, math.inf),
    "cutmix": (0, math.inf),
    "label_smoothing": (0, 1),
    "crop": (0, math.inf),
    "resized_crop": (1e-6, 1 + 1e-9),
    "rotation": (0, math.inf),
    "scale": (0, 1),
    "translation": (0, 1 + 1e-9),
    "jitter": (0, 1 + 1e-9),
    "evaluations": (1, math.inf),
    "checkpoint_every": (1, math.inf),
    "keep_checkpoints": (1, math.inf),
    "seed": (0, math.inf),
}
# What may differ when a run goes on: none of these changes the numbers it computes.
FREE_ON_RESUME = ("checkpoint_every", "keep_checkpoints")
# What a run's section ``augmentation`` sets too; images move with their targets.
AUGMENTATION = ("flip", "rotation", "scale", "translation", "jitter")
# What the shipped dense tasks predict.
ANNOTATIONS = {"segmentation": "masks", "landmarks": "keypoints", "detection": "boxes"}
# What changes pixels alone, and what mixes classes, each with its value that is off.
PIXELS_ALONE: dict[str, float] = {"crop": 0, "resized_crop": 1.0}
MIXED: dict[str, float] = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of :func:`repfusion_env.stage2.finetune`.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range; the sentence names it and what is allowed.
    """

    labels: str | int | float = _option("100%", "training labels used: '10%' or a number of images")
    epochs: float = _option(30.0, "passes over the labelled images")
    least_steps: int = _option(300, "optimizer steps at least, however few labels there are")
    steps: int | None = _option(None, "optimizer steps, instead of the two above")
    batch_size: int = _option(64, "images per step; all labelled ones where these are fewer")
    optimizer: str = _option("adamw", "optimizer of backbone and head")
    learning_rate: float = _option(1e-3, "peak step size")
    backbone_factor: float = _option(1.0, "the backbone's step size as part of the head's")
    frozen: bool = _option(False, "train the head alone: a probe of the frozen features")
    head: str | None = _option(
        None, "head of a dense task (linear, fcn, ...); default: the run's configuration"
    )
    schedule: str = _option("cosine", "of the step size; multistep: a tenth from 1/2 and 3/4 on")
    warmup: float = _option(0.05, "part of the steps in which the step size rises from 0")
    weight_decay: float = _option(1e-4, "weight decay")
    momentum: float = _option(0.9, "momentum of sgd")
    nesterov: bool = _option(False, "Nesterov momentum of sgd")
    gradient_clip: float = _option(5.0, "largest norm of the gradient; 0 is off")
    ema: float = _option(
        0.0, "decay of the averaged weights that are evaluated and saved; 0 is off"
    )
    mixup: float = _option(0.0, "alpha of mixup; with cutmix too, one of both is drawn per step")
    cutmix: float = _option(0.0, "alpha of cutmix")
    label_smoothing: float = _option(0.0, "part of the target spread over all classes")
    flip: bool = _option(False, "mirror half of the images")
    crop: int = _option(0, "shift images by up to so many pixels, black beyond the edge")
    resized_crop: float = _option(1.0, "smallest part of an image's area that a crop keeps; 1: off")
    rotation: float = _option(0.0, "largest rotation either way, in degrees")
    scale: float = _option(0.0, "largest change of size: 0.25 is a factor in [0.75, 1.25]")
    translation: float = _option(0.0, "largest shift, as a part of the image's side")
    jitter: float = _option(0.0, "strength of brightness, contrast, saturation and hue")
    precision: str = _option("fp32", "arithmetic of the forward (autocast)")
    evaluations: int = _option(
        10, "held-out evaluations on the way, evenly spaced, the last one in"
    )
    checkpoint_every: int = _option(200, "steps between two checkpoints")
    keep_checkpoints: int = _option(2, "newest checkpoints kept")
    seed: int = _option(0, "of labels, head, order and augmentation")

    def __post_init__(self) -> None:
        for item in fields(self):
            self._check_type(item.name, getattr(self, item.name), str(item.type))
        label_count(self.labels, sys.maxsize)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}: '{value}' given.{did_you_mean(value, allowed)} "
                    f"Allowed: {', '.join(allowed)}"
                )
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not (low <= value < high and math.isfinite(value)):
                least = "above 0" if 0 < low < 1 else f"{low:g} or more"
                most = "" if math.isinf(high) else f" and {'up to' if high > 1 else 'below'} 1"
                raise ValueError(f"{name}: {value} given; it must be {least}{most}")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum > 0):
            raise ValueError("nesterov: it needs optimizer 'sgd' with a momentum above 0")

    def _check_type(self, name: str, value: Any, kind: str) -> None:
        if value is None and "None" in kind:
            return
        wanted: dict[str, tuple[type, ...]] = {
            "bool": (bool,),
            "str": (str,),
            "float": (int, float),
            "int": (int,),
        }
        parts = [part for part in kind.split(" | ") if part != "None"]
        types = tuple(found for part in parts for found in wanted[part])
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"{name}: {value!r} given; it must be of type {' or '.join(parts)}")

    def total_steps(self, labels: int) -> int:
        """Optimizer steps with so many labelled images."""
        if self.steps is not None:
            return self.steps
        batch = min(self.batch_size, labels)
        return max(self.least_steps, math.ceil(self.epochs * labels / batch))

    def essential(self) -> dict[str, Any]:
        """What must be the same for a stopped run to go on."""
        return {name: value for name, value in asdict(self).items() if name not in FREE_ON_RESUME}


def augmentation_of(experiment: ExperimentConfig) -> dict[str, Any]:
    """The run's own augmentation as keys of :class:`FinetuneConfig`."""
    return {name: getattr(experiment.augmentation, name) for name in AUGMENTATION}


def with_head(experiment: ExperimentConfig, head: str | None) -> ExperimentConfig:
    """The run's configuration with another head of its task; None: as it is.

    Raises:
        ValueError: The task has no such head, or one alone.
    """
    if head is None:
        return experiment
    from repfusion_env.config_loading import check, merge, to_dict

    values = to_dict(experiment)
    section = values.get(experiment.task)
    if not isinstance(section, dict) or "head" not in section:
        raise ValueError(f"head: '{head}' given, but task '{experiment.task}' has one head alone")
    return check(merge(values, {f"{experiment.task}.head": head}))


def check_targets(config: FinetuneConfig, annotation: str, *, cross_entropy: bool) -> None:
    """Refuse what the targets cannot follow.

    Args:
        config: The settings.
        annotation: What the task predicts: ``labels``, ``masks``, ``keypoints`` or ``boxes``.
        cross_entropy: Whether the loss takes parts of classes instead of a class.

    Raises:
        ValueError: An option is on that changes an image and not its targets, or mixes targets.
    """
    alone = {} if annotation == "labels" else PIXELS_ALONE
    for name, off in (alone | ({} if cross_entropy else MIXED)).items():
        if getattr(config, name) != off:
            raise ValueError(
                f"{name}: {getattr(config, name)} given, but {annotation} of this task cannot "
                f"follow it; leave it at {off:g}. Images move together with their {annotation} by "
                f"{', '.join(AUGMENTATION)}"
            )


# The published method's second stage for CIFAR-10, by its code.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "published": {
        "epochs": 200.0,
        "least_steps": 1,
        "batch_size": 64,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "schedule": "multistep",
        "warmup": 0.0,
        "gradient_clip": 0.0,
        "flip": True,
        "crop": 4,
    },
}
