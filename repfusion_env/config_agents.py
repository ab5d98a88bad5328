"""What configures agents and the self-supervision beside them; see `repfusion_env.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import StrictBool, StrictStr

from repfusion_env.config_fields import (
    Count,
    Fraction,
    Index,
    NonNegative,
    Positive,
    PositiveFraction,
    option,
)


@dataclass(frozen=True)
class ReinforceConfig:
    """The REINFORCE agent."""

    shorthand: ClassVar[str] = "baseline"
    baseline: Literal["none", "batch", "value", "group"] = option(
        "batch", "what is subtracted from the reward"
    )
    learning_rate: Positive = option(
        1e-3, "step size of the policy (and value) network but its output bias"
    )
    bias_learning_rate: Positive = option(
        0.03, "step size of the network's output bias: of what is good for all images alike"
    )
    hidden: tuple[Count, ...] = option((64,), "widths of the policy's hidden layers")
    network: Literal["auto", "mlp", "cnn"] = option(
        "auto", "auto: cnn on pixels, mlp on embeddings"
    )
    entropy_start: NonNegative = option(0.3, "weight of the entropy bonus at the beginning")
    entropy_end: NonNegative = option(0.0, "weight of the entropy bonus once it has decayed")
    entropy_decay: Fraction = option(1.0, "part of the run over which it decays linearly")
    gradient_clip: NonNegative = option(1.0, "largest norm of the policy's gradient; 0 is off")
    normalize_advantage: StrictBool = option(True, "divide advantages by their deviation")


@dataclass(frozen=True)
class Sb3Config:
    """The Stable-Baselines3 agents."""

    shorthand: ClassVar[str] = "algo"
    algo: StrictStr = option("ppo", "ppo, a2c, dqn, qrdqn, trpo, recurrent_ppo, maskable_ppo, ...")
    policy: StrictStr = option("auto", "policy class by SB3's name; auto fits the algorithm")
    arguments: dict[StrictStr, Any] = option({}, "keyword arguments of the algorithm's class")
    device: StrictStr = option("cpu", "device of the policy; an MLP belongs on the CPU")


@dataclass(frozen=True)
class BanditConfig:
    """Policies that do not learn, and bandits."""

    shorthand: ClassVar[str] = "algo"
    algo: StrictStr = option(
        "random", "random, fixed, annealed, epsilon_greedy, ucb, thompson, linear"
    )
    timestep: Index | None = option(None, "the timestep of 'fixed'; one of the grid")
    start: Index | None = option(None, "first timestep of 'annealed'; default: the grid's highest")
    end: Index | None = option(None, "last timestep of 'annealed'; default: the grid's lowest")
    epsilon: Fraction = option(0.1, "part of the choices that epsilon_greedy draws at random")
    exploration: NonNegative = option(
        1.0, "width of the optimism of ucb, or of the draws of thompson and linear; 0: greedy"
    )
    discount: PositiveFraction = option(
        0.99, "weight of a step's rewards one step later: the student's needs change"
    )
    ridge: Positive = option(1.0, "ridge penalty of linear")


@dataclass(frozen=True)
class ContrastiveConfig:
    """Self-supervision beside the distillation: SimCLR's loss on two augmented views."""

    shorthand: ClassVar[str] = "weight"
    weight: NonNegative = option(0.0, "weight of the NT-Xent loss beside the distillation; 0: off")
    temperature: Positive = option(0.5, "temperature of NT-Xent")
    hidden: Count = option(256, "width of the projection head's hidden layer")
    projection: Count = option(128, "width of the projection head's output")
    crop: PositiveFraction = option(0.3, "smallest part of an image's area that a view keeps")
    flip: StrictBool = option(True, "mirror half of the views")
    jitter: Fraction = option(0.4, "strength of brightness, contrast, saturation and hue; 0: off")
