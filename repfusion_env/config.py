"""The configuration of an experiment: one frozen dataclass per concern, composed in one.

Values are checked by :mod:`repfusion_env.config_loading`; what the single fields allow stands in
their types, what they must be together in :mod:`repfusion_env.config_rules`. This module imports
nothing heavy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import StrictBool, StrictStr

from repfusion_env.config_agents import BanditConfig, ContrastiveConfig, ReinforceConfig, Sb3Config
from repfusion_env.config_fields import (
    Count,
    Decay,
    Fraction,
    Index,
    NonNegative,
    Positive,
    option,
)
from repfusion_env.config_speed import CacheConfig, SpeedConfig
from repfusion_env.config_tasks import (
    AugmentationConfig,
    DetectionConfig,
    LandmarksConfig,
    SegmentationConfig,
)


@dataclass(frozen=True)
class DataConfig:
    """The image bank that the student learns from and is held out on."""

    shorthand: ClassVar[str] = "name"
    name: StrictStr = option(
        "digits",
        "digits, digit_scenes, cifar10, npz, folder, tiny_imagenet, webdataset, celebamask, "
        "mask_folder, voc_segmentation, oxford_pet, wflw, pts, coco, voc, or your own as "
        "module:function",
    )
    path: StrictStr | None = option(
        None,
        "where the data set lies: a folder, an .npz bank, or a pattern of shards (docs/data.md)",
    )
    download: StrictBool = option(
        False, "let torchvision download CIFAR-10, VOC 2012's or the pets' masks into data.path"
    )
    labels: Literal["given", "clusters"] = option(
        "given", "given, or clusters: pseudo-labels of unlabelled images, by the teacher's features"
    )
    clusters: Count = option(10, "number of pseudo-labels under data.labels clusters")
    image_size: Count | None = option(
        None, "resize to this side in pixels; without it all images must have one size"
    )
    skip_unreadable: Fraction = option(
        0.0, "largest part of the images that may be left out where they cannot be read; 0: none"
    )
    channels: Literal[1, 3] | None = option(
        None, "3: grey images as RGB; 1: RGB images as grey; without it as they are"
    )
    margin: Fraction = option(
        0.25, "wflw, pts: how much larger than the face the square cut out around it is"
    )
    subset: StrictStr | None = option(
        None,
        "hold out only a part of the test faces; wflw: an attribute, such as pose; pts: common, "
        "challenging (300W) or a folder",
    )
    storage: Literal["resident", "stream"] = option(
        "resident",
        "resident: all images on the device; stream: training images are decoded as they are "
        "needed (folder, tiny_imagenet, webdataset)",
    )
    prefetch: Count = option(4, "steps whose images are decoded ahead under data.storage stream")
    decode_threads: Count | None = option(
        None, "threads that decode under data.storage stream; default: the cores, at most 16"
    )
    train_limit: Count | None = option(None, "use only the first so many training images")
    heldout_limit: Count | None = option(None, "use only the first so many held-out images")


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen generative model whose features are distilled."""

    shorthand: ClassVar[str] = "model"
    family: StrictStr = option(
        "auto",
        "auto: by the model's files; unet2d, edm, guided_diffusion, unet2d_condition, dit, pixart, "
        "sd3, flux, autoencoder_kl, gan, flow, timm, or your own as module:function",
    )
    model: StrictStr = option(
        "digits", "digits, digit_scenes (shipped), a local folder or file, or a hub id"
    )
    revision: StrictStr | None = option(None, "commit, tag or branch of the hub repository")
    layers: tuple[StrictStr, ...] = option(
        (), "module paths whose output is the feature, several allowed; none: the family's own"
    )
    options: dict[StrictStr, Any] = option({}, "settings that one family has, by their names")
    input: Literal["noised", "clean"] = option(
        "noised", "noised: the scheduler's add_noise at t; clean: the image itself with t"
    )
    noise: Literal["fresh", "fixed"] = option(
        "fresh", "fresh noise at each visit, or one per (seed, image, timestep)"
    )
    noise_seed: Index | None = option(
        None, "seed of the fixed noise, so that runs of several seeds share it; default: the run's"
    )
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "arithmetic of the teacher's forward, and memory of its weights"
    )
    channels_last: StrictBool = option(False, "memory layout of the teacher's convolutions")
    offload: Literal["none", "cpu"] = option(
        "none", "cpu: weights wait in main memory and visit the device layer by layer"
    )
    batch_size: Count | None = option(
        None, "most images in one forward of the teacher; default: all lanes of the step"
    )
    image_size: Count | None = option(
        None, "side in pixels at which the teacher sees the images; default: as they are"
    )
    standardize: Literal["grid", "timestep"] = option(
        "timestep", "a mean and deviation per channel for each timestep, or one over the whole grid"
    )
    standardize_images: Count = option(
        64, "images (at each timestep) from which mean and deviation are measured"
    )


@dataclass(frozen=True)
class TimestepConfig:
    """The timestep grid: what the agent may choose from (0 = clean, larger = noisier)."""

    shorthand: ClassVar[str] = "values"
    values: tuple[Index, ...] | None = option(None, "the grid, listed; replaces the four below")
    count: Count = option(25, "number of timesteps in the grid")
    first: Index = option(0, "lowest timestep of the grid")
    last: Index = option(960, "highest timestep of the grid")
    spacing: Literal["linear", "quadratic"] = option(
        "linear", "even steps, or steps that grow from low to high noise"
    )
    min_snr: NonNegative = option(
        0.0, "action masks close timesteps whose signal-to-noise ratio is below this"
    )

    def grid(self) -> tuple[int, ...]:
        """The timesteps of the grid, length K, in the order of the actions."""
        if self.values is not None:
            return self.values
        if self.count == 1:
            return (self.first,)
        power = {"linear": 1, "quadratic": 2}[self.spacing]
        span = self.last - self.first
        fractions = (index / (self.count - 1) for index in range(self.count))
        return tuple(self.first + round(span * fraction**power) for fraction in fractions)


@dataclass(frozen=True)
class StudentConfig:
    """The recognition network that learns from the teacher's features."""

    shorthand: ClassVar[str] = "name"
    name: StrictStr = option(
        "small_cnn",
        "small_cnn, small_pyramid, resnet18, mobilenetv2, wideresnet28_2, bisenet_resnet18, "
        "bisenet_resnet50, torchvision/<name>, timm/<name>, or your own as module:function",
    )
    pretrained: StrictBool = option(False, "start from the library's weights")
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "arithmetic of the student (autocast; fp16 scales the loss)"
    )
    channels_last: StrictBool = option(False, "memory layout of the student's convolutions")
    ema: Decay = option(
        0.0, "decay of the averaged student that evaluation uses (published: 0.999); 0 is off"
    )


@dataclass(frozen=True)
class DistillationConfig:
    """What the student matches: a weighted sum of losses on pooled or dense features."""

    shorthand: ClassVar[str] = "losses"
    losses: dict[StrictStr, NonNegative] = option(
        {"hint": 1.0},
        "weights by name: hint, l1, normalized_l2, cosine, attention, rkd_distance, rkd_angle, "
        "similarity_preserving, pkt, correlation_congruence, dist, vid, factor_transfer, infonce, "
        "crd",
    )
    options: dict[StrictStr, dict[StrictStr, Any]] = option(
        {}, "settings of single losses, e.g. {crd: {temperature: 0.1}}"
    )
    dense: StrictBool = option(False, "match feature maps position by position, not their average")
    projection: StrictStr = option(
        "linear",
        "from student to teacher: linear (1x1 on the last stage), stages (1x1 on the stage nearest "
        "to each layer's resolution), pyramid (all stages together)",
    )
    task_weight: NonNegative = option(
        0.0, "above 0 the task loss reaches the student's backbone too, with this weight"
    )


@dataclass(frozen=True)
class FusionConfig:
    """How several timesteps and layers become one target."""

    shorthand: ClassVar[str] = "weights"
    weights: Literal["fixed", "learned"] = option(
        "fixed", "fixed: mixture and layers below; learned: by the task loss on the fused feature"
    )
    timesteps: tuple[Index, ...] = option(
        (), "timesteps that are part of every target, beside those that the action chooses"
    )
    mixture: tuple[Positive, ...] = option(
        (), "weights of the chosen timesteps, then of fusion.timesteps; none: equal"
    )
    layers: tuple[Positive, ...] = option(
        (), "weights of the layers' losses, in the order of teacher.layers; none: equal"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """How the student, its projection and the task heads are trained."""

    shorthand: ClassVar[str] = "name"
    name: Literal["adamw", "sgd"] = option("adamw", "optimizer of student, projection and heads")
    learning_rate: Positive = option(2e-3, "step size of student and projection")
    head_learning_rate: Positive | None = option(None, "step size of the heads; default: the same")
    momentum: Decay = option(0.9, "momentum of sgd")
    nesterov: StrictBool = option(False, "Nesterov momentum of sgd")
    weight_decay: NonNegative = option(1e-4, "weight decay")
    schedule: Literal["constant", "cosine", "multistep"] = option(
        "constant", "over the run's decisions; multistep divides by 10 at 1/2 and 3/4, as published"
    )
    gradient_clip: NonNegative = option(5.0, "largest norm of the gradient; 0 is off")
    batch_size: Count = option(
        64, "a step with fewer lanes is filled up with the most recent earlier decisions"
    )
    updates: Count = option(
        1,
        "updates of the student in one step, on its batch: the teacher's one pass serves them all",
    )
    nonfinite_patience: Count = option(
        20, "stop after so many steps in a row without a finite loss"
    )


@dataclass(frozen=True)
class RewardConfig:
    """What a decision is worth: minus the student's task loss after distillation."""

    shorthand: ClassVar[str] = "kind"
    kind: StrictStr = option(
        "student_lookahead", "student_lookahead, student, student_gain, teacher_probe"
    )
    lookahead: Literal["gauss_newton", "gradient"] = option(
        "gauss_newton", "the move of the student's feature under student_lookahead"
    )
    student: Literal["updated", "training"] = option(
        "updated",
        "where student_lookahead starts: the student after the update, by a forward of its own; or "
        "the update's own forward, which saves one",
    )
    damping: Positive = option(0.1, "lambda of the Gauss-Newton move")
    eta: Positive = option(0.5, "size of the gradient move")
    probe_hidden: Index = option(
        0, "width of the three-layer head on the teacher's feature (published); 0: one layer"
    )


@dataclass(frozen=True)
class ObservationConfig:
    """What the agent sees of an image."""

    shorthand: ClassVar[str] = "source"
    source: StrictStr = option(
        "teacher", "teacher, student, pixels, torchvision/<name>, timm/<name>, or module:function"
    )
    timestep: Index = option(40, "timestep of the teacher embedding (clean image)")
    pretrained: StrictBool = option(False, "weights of a torchvision or timm embedding")
    student_state: StrictBool = option(
        False, "append the run's progress and the student's current task loss on the image"
    )
    clip: Positive = option(5.0, "bound of the standardized observation")


@dataclass(frozen=True)
class EnvConfig:
    """Lanes, episodes and actions."""

    shorthand: ClassVar[str] = "num_envs"
    num_envs: Count = option(64, "lanes of the vector environment: images per step")
    episode_length: Count = option(1, "decisions per episode; 1 is a contextual bandit")
    group_size: Count = option(1, "neighbouring lanes that hold the same image")
    action: StrictStr = option(
        "discrete",
        "what an action chooses: discrete, continuous, continuous_timestep, layer, "
        "timestep_and_layer, timestep_set, or your own as module:class",
    )
    set_size: Count = option(3, "timesteps of one action under env.action timestep_set")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out images at the end, and on the way."""

    shorthand: ClassVar[str] = "images"
    images: Count | None = option(
        None, "held-out images that the policy is measured on; default: all, as always for students"
    )
    every: Index = option(0, "evaluate the policy every so many steps; 0: at the end only")
    probe_images: Count = option(10_000, "training images of the linear probe, at most")


@dataclass(frozen=True)
class RunConfig:
    """How long a run is and what it leaves behind."""

    shorthand: ClassVar[str] = "decisions"
    decisions: Count = option(
        51_200, "(image, timestep) choices to make in all, rounded up to whole steps and rollouts"
    )
    folder: StrictStr = option("runs", "where run folders are made")
    name: StrictStr | None = option(None, "name of the run folder; default: config, agent, time")
    log_every: Count = option(10, "steps between two rows of metrics")
    checkpoint_every: Count = option(100, "steps between two checkpoints")
    keep_checkpoints: Count = option(3, "checkpoints kept")


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment, whole."""

    seed: Index = option(0, "seed of student, data order, noise and policy")
    device: StrictStr = option("auto", "auto, cpu, cuda or cuda:<index>")
    task: StrictStr = option(
        "classification",
        "classification, segmentation, landmarks, detection, or your own as module:class",
    )
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    landmarks: LandmarksConfig = field(default_factory=LandmarksConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    observation: ObservationConfig = field(default_factory=ObservationConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    sb3: Sb3Config = field(default_factory=Sb3Config)
    bandit: BanditConfig = field(default_factory=BanditConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def total_steps(self) -> int:
        """Steps of the vector environment in the whole run."""
        return math.ceil(self.run.decisions / self.env.num_envs)
