"""The teacher as a denoising autoencoder: what one step gives back of a noised image.

Shape letters: T timesteps, M images, C,H,W image, c,h,w what the network sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from repfusion_env.config import ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.noise import derive_seed, keyed_noise
from repfusion_env.teachers import describe_teacher, load_teacher
from repfusion_env.teachers.detect import family_of
from repfusion_env.teachers.reading.network import NetworkTeacher

# Families whose network predicts what its noise process says.
DENOISERS = (
    "unet2d",
    "edm",
    "guided_diffusion",
    "unet2d_condition",
    "dit",
    "pixart",
    "sd3",
    "flux",
)
IMAGES, CHUNK, SHOWN, COLUMNS = 128, 64, 4, 7


@dataclass(frozen=True)
class Denoising:
    """One-step reconstructions of held-out images.

    Attributes:
        error: (T,) mean squared error over images and pixels (or latents), in units of the clean
            images' variance: 0 is perfect, 1 is no better than their mean.
        shown: Timesteps of the pictures.
        clean: (S, c, h, w) of the pictures' images.
        noised: (len(shown), S, c, h, w) what the network sees there.
        restored: The same, its estimates of the clean image.
        images: (S, C, H, W) in [-1, 1].
    """

    error: np.ndarray
    shown: tuple[int, ...]
    clean: np.ndarray
    noised: np.ndarray
    restored: np.ndarray
    images: np.ndarray


def measure_denoising(
    config: ExperimentConfig,
    bank: ImageBank,
    timesteps: tuple[int, ...],
    report: Callable[[int], None] = lambda done: None,
) -> Denoising | str:
    """Reconstruct the first held-out images from every timestep.

    Images are noised whatever ``teacher.input`` is: that is what the network was trained on.

    Args:
        config: Its section ``teacher``.
        bank: Held-out images, on the device.
        timesteps: T of them.
        report: Called with the number of timesteps done.

    Returns:
        The measurement, or a sentence that says why there is none.
    """
    family = family_of(config.teacher)
    if family not in DENOISERS:
        return f"The teacher's family '{family}' has no denoiser whose output could be shown."
    card = describe_teacher(config.teacher)
    layers = card.layers_available
    deepest = layers[-1] if card.trace is None else card.trace.last(layers)
    whole = replace(config.teacher, layers=(deepest,))
    teacher = load_teacher(whole, device=bank.images.device)
    assert isinstance(teacher, NetworkTeacher)
    for tap in teacher.taps:
        tap.remove()
    ids = torch.arange(min(IMAGES, len(bank)), device=bank.images.device)
    clean = torch.cat([teacher.encode(bank.pixels(part)).float() for part in ids.split(CHUNK)])
    bounds = clean.amin(), clean.amax()
    variance = clean.var(0, correction=0).mean().clamp_min(1e-12)
    places = sorted({round(x) for x in np.linspace(0, len(timesteps) - 1, COLUMNS)})
    seed = derive_seed(0, "landscape denoising")
    errors, noised, restored = [], [], []
    for place, timestep in enumerate(timesteps):
        total = torch.zeros((), dtype=torch.float64, device=clean.device)
        for part in ids.split(CHUNK):
            at = torch.full_like(part, timestep)
            noise = keyed_noise(
                tuple(clean.shape[1:]),  # type: ignore[arg-type]
                seed,
                part,
                at,
                torch.zeros_like(part),
            )
            inputs = teacher.add_noise(clean[part], noise, at)
            output = _output(teacher, inputs, at)
            if output is None:
                return f"The network of family '{family}' returns no image that could be shown."
            found = teacher.process.estimate_clean(inputs, output, at)
            # With hardly any signal left, a small error of the noise is a huge one of the image.
            found = found.clamp(*bounds)
            total += (found - clean[part]).double().square().mean((1, 2, 3)).sum()
            if place in places and int(part[0]) == 0:
                noised.append(inputs[:SHOWN].cpu().numpy())
                restored.append(found[:SHOWN].cpu().numpy())
        errors.append(float(total / len(ids) / variance))
        report(place + 1)
    return Denoising(
        error=np.array(errors),
        shown=tuple(timesteps[place] for place in places),
        clean=clean[:SHOWN].cpu().numpy(),
        noised=np.stack(noised),
        restored=np.stack(restored),
        images=bank.pixels(ids[:SHOWN]).cpu().numpy(),
    )


def _output(teacher: NetworkTeacher, inputs: Tensor, timesteps: Tensor) -> Tensor | None:
    """What the whole network returns, (N, c, h, w); None where that is no image."""
    with torch.inference_mode():
        given = inputs.to(teacher.dtype).contiguous(memory_format=teacher.layout)
        output = teacher.plan.run(teacher.network, given, teacher.process.conditions(timesteps))
    output = getattr(output, "sample", output)
    while isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 4:
        return None
    if output.shape[2:] != inputs.shape[2:] or output.shape[1] < inputs.shape[1]:
        return None
    # A network that learned its variance returns it behind the prediction.
    return output[:, : inputs.shape[1]].float().clone()
