"""A teacher's noise process: the image at a timestep, and what the network is told of it.

Every process here is linear: the network's input at timestep ``t`` is ``signal[t] * clean +
spread[t] * noise``, and the network is told ``condition[t]``. Timestep 0 is the least noisy,
whichever way the scheduler of the family counts.

Shape letters: N lanes, C,H,W what noise is added to, T timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from repfusion_env.registry import did_you_mean
from repfusion_env.teachers.base import TeacherError
from repfusion_env.teachers.files.quiet import first_line, quiet_diffusers

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow", "edm", "score")
# Noise levels for networks that know none: those of Ho et al., 2020.
DDPM_TIMESTEPS, DDPM_BETAS = 1000, (1e-4, 0.02)


@dataclass(frozen=True)
class NoiseProcess:
    """Signal, spread and condition by timestep.

    Attributes:
        signal: Factor of the clean image, float32, (T,).
        spread: Factor of the noise, float32, (T,).
        ratio: Signal-to-noise ratio, float32, (T,).
        condition: What the network is told of the timestep, int64 or float32, (T,).
        prediction: What the network's output is: one of :data:`PREDICTIONS`.
        scale: Factor that brings clean images to the range that the network expects.
        offset: What is added after it.
    """

    signal: Tensor
    spread: Tensor
    ratio: Tensor
    condition: Tensor
    prediction: str = "epsilon"
    scale: float = 1.0
    offset: float = 0.0

    def __len__(self) -> int:
        return len(self.signal)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``signal[t] * clean + spread[t] * noise``, (N, C, H, W)."""
        signal = self.signal.index_select(0, timesteps)[:, None, None, None]
        spread = self.spread.index_select(0, timesteps)[:, None, None, None]
        return signal * clean + spread * noise

    def conditions(self, timesteps: Tensor) -> Tensor:
        """What the network is told, (N,)."""
        return self.condition.index_select(0, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """``signal^2 / spread^2``, float32, (N,); infinite where there is no noise."""
        return self.ratio.index_select(0, timesteps)

    def estimate_clean(self, inputs: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """The clean image that the network's output stands for, (N, C, H, W).

        Epsilon: Ho et al., 2020, eq. 15; v: Salimans & Ho, 2022, appendix D; flow: Lipman et al.,
        2023, with the velocity ``noise - clean``; edm: Karras et al., 2022, eq. 7 in units of
        sigma_data; score: Song et al., 2021, the gradient of the log-density (Tweedie's formula).

        Args:
            inputs: Of the network: what :meth:`add_noise` gave.
            output: Of the network.
            timesteps: int64, (N,).
        """
        signal = self.signal.index_select(0, timesteps)[:, None, None, None]
        spread = self.spread.index_select(0, timesteps)[:, None, None, None]
        if self.prediction == "epsilon":
            return (inputs - spread * output) / signal
        if self.prediction == "v_prediction":
            return signal * inputs - spread * output
        if self.prediction == "flow":
            return inputs - spread * output
        if self.prediction == "edm":
            return signal * inputs + spread * output
        if self.prediction == "score":
            return (inputs + spread.square() * output) / signal
        return output

    def to(self, device: torch.device | str) -> NoiseProcess:
        """The same process on ``device``."""
        names = ("signal", "spread", "ratio", "condition")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def variance_preserving(alpha_bars: Tensor, prediction: str = "epsilon") -> NoiseProcess:
    """``sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise`` (Ho et al., 2020, eq. 4).

    Args:
        alpha_bars: Products of ``1 - beta`` by timestep, (T,).
        prediction: What the network's output is.
    """
    alpha_bars = alpha_bars.float()
    return NoiseProcess(
        signal=alpha_bars**0.5,
        spread=(1 - alpha_bars) ** 0.5,
        ratio=alpha_bars / (1 - alpha_bars),
        condition=torch.arange(len(alpha_bars)),
        prediction=prediction,
    )


def noise_levels() -> NoiseProcess:
    """DDPM's linear noise, for networks that have none of their own: equal axis, equal ratios."""
    betas = torch.linspace(*DDPM_BETAS, DDPM_TIMESTEPS, dtype=torch.float64)
    return variance_preserving(torch.cumprod(1 - betas, 0))


def edm(
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    rho: float = 7.0,
    timesteps: int = 1000,
    condition_scale: float = 0.25,
    schedule: str = "karras",
    prediction: str = "edm",
) -> NoiseProcess:
    """Preconditioned noise of Karras et al., "Elucidating the Design Space", 2022.

    Timestep ``t`` has the noise level ``sigma_t`` of eq. 5, from ``sigma_min`` (t = 0) to
    ``sigma_max`` (t = T - 1). The network sees ``c_in (x + sigma noise)`` and is told
    ``ln(sigma) / 4`` (table 1). With images in units of ``sigma_data`` that input has the unit
    variance of ``cos(phi) x + sin(phi) noise``, ``tan(phi) = sigma / sigma_data``.

    Args:
        sigma_min: Least noise level.
        sigma_max: Largest noise level.
        sigma_data: Deviation of the training images.
        rho: How the levels crowd at the low end.
        timesteps: T.
        condition_scale: Factor of ``ln(sigma)`` in what the network is told.
        schedule: "karras" (eq. 5), or "exponential": equal ratios between neighbours.
        prediction: "edm", or "v_prediction" where the output counts with the other sign.
    """
    steps = torch.linspace(0, 1, timesteps, dtype=torch.float64)
    if schedule == "exponential":
        sigmas = (math.log(sigma_min) + steps * math.log(sigma_max / sigma_min)).exp()
    else:
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        sigmas = (low + steps * (high - low)) ** rho
    norm = (sigmas**2 + sigma_data**2).sqrt()
    return NoiseProcess(
        signal=(sigma_data / norm).float(),
        spread=(sigmas / norm).float(),
        ratio=(sigma_data / sigmas).square().float(),
        condition=(condition_scale * sigmas.log()).float(),
        prediction=prediction,
        scale=1 / sigma_data,
    )


def variance_exploding(sigma_min: float, sigma_max: float, timesteps: int) -> NoiseProcess:
    """``x + sigma noise`` with geometric levels; the network is told sigma (Song et al., 2021).

    These networks learn images in [0, 1], and give the score.
    """
    ends = math.log(sigma_min), math.log(sigma_max)
    sigmas = torch.linspace(*ends, timesteps, dtype=torch.float64).exp().float()
    return NoiseProcess(
        torch.ones_like(sigmas), sigmas, sigmas**-2, sigmas, "score", scale=0.5, offset=0.5
    )


def flow_matching(sigmas: Tensor, conditions: Tensor) -> NoiseProcess:
    """``(1 - sigma) x + sigma noise`` (Lipman et al., 2023; Liu et al., 2023).

    Args:
        sigmas: In (0, 1], ascending, (T,).
        conditions: What the network is told at each, (T,).
    """
    sigmas = sigmas.float()
    ratio = ((1 - sigmas) / sigmas).square()
    return NoiseProcess(1 - sigmas, sigmas, ratio, conditions.float(), "flow")


def process_of(scheduler: Mapping[str, Any], model: str) -> NoiseProcess:
    """The noise process of a diffusers scheduler.

    Args:
        scheduler: Content of its ``scheduler_config.json``.
        model: The teacher's name, for the messages.

    Raises:
        TeacherError: It is no scheduler of diffusers, or one whose noise is not known here.
    """
    import diffusers

    name = scheduler.get("_class_name")
    kind: Any = getattr(diffusers, str(name), None)
    is_class = isinstance(kind, type)
    if not (is_class and issubclass(kind, diffusers.SchedulerMixin)):
        known = [known for known in dir(diffusers) if known.endswith("Scheduler")]
        raise TeacherError(
            f"teacher '{model}': its scheduler_config.json names {name!r}, which is no "
            f"scheduler of diffusers.{did_you_mean(str(name), known)}"
        )
    try:
        with quiet_diffusers():
            built = kind.from_config(dict(scheduler))
    except Exception as error:
        raise TeacherError(
            f"teacher '{model}': diffusers cannot build a {name} from its "
            f"scheduler_config.json ({first_line(error)})"
        ) from error
    prediction = str(built.config.get("prediction_type", "epsilon"))
    if str(name).startswith("FlowMatch"):
        return flow_matching(built.sigmas[: len(built.timesteps)].flip(0), built.timesteps.flip(0))
    if str(name).startswith(("EDM", "CMStochastic")):
        settings = built.config
        _check_prediction(prediction, ("epsilon", "v_prediction"), model)
        return edm(
            sigma_min=settings.sigma_min,
            sigma_max=settings.sigma_max,
            sigma_data=settings.sigma_data,
            rho=settings.rho,
            timesteps=settings.num_train_timesteps,
            # Consistency models are told a thousand times what EDM is.
            condition_scale=250.0 if str(name).startswith("CM") else 0.25,
            schedule=str(settings.get("sigma_schedule", "karras")),
            prediction="v_prediction" if prediction == "v_prediction" else "edm",
        )
    if str(name).startswith("ScoreSdeVe"):
        settings = built.config
        return variance_exploding(
            settings.sigma_min, settings.sigma_max, settings.num_train_timesteps
        )
    products = getattr(built, "alphas_cumprod", None)
    if not isinstance(products, Tensor) or products.ndim != 1:
        raise TeacherError(
            f"teacher '{model}': {name} has no alphas_cumprod, and its noise is none of those "
            "known here; a scheduler with discrete timesteps (such as DDPMScheduler), EDM*, "
            "FlowMatch* or ScoreSdeVeScheduler is needed"
        )
    _check_prediction(prediction, ("epsilon", "v_prediction", "sample"), model)
    return variance_preserving(products, prediction)


def _check_prediction(prediction: str, allowed: tuple[str, ...], model: str) -> None:
    if prediction not in allowed:
        raise TeacherError(
            f"teacher '{model}': its scheduler_config.json gives prediction_type '{prediction}'; "
            f"allowed: {', '.join(allowed)}.{did_you_mean(prediction, allowed)}"
        )
