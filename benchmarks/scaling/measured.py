"""What was measured here, read from the files of the other commands, whichever are given.

Shape letters: N lanes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.scaling.checks import RanksCheck, RingFit, fit_ring, predicted_ratio
from benchmarks.scaling.collectives import WAYS
from benchmarks.scaling.fit import Fit, fit, forward_samples, step_samples
from benchmarks.scaling.networks import ADM64, guided, latent_unet, student, teacher
from benchmarks.scaling.work import Work

Fits = tuple[tuple[Mapping[str, Any], Fit], ...]
KINDS = (
    "python -m benchmarks.throughput",
    "python -m benchmarks.teachers",
    "python -m benchmarks.ranks",
    "python -m benchmarks.streaming",
    "python -m benchmarks.scaling.collectives",
)


@dataclass(frozen=True)
class Measured:
    """What the files hold.

    Attributes:
        fits: Machine and rates, by kind of arithmetic.
        ring: Of all-reduces by gloo; None without their file.
        shared: Of those that a run's ranks make on this machine; likewise.
        ranks: Processes against one; empty without.
        decoded: Images/s that one core decodes; None without.
    """

    fits: Fits = ()
    ring: RingFit | None = None
    shared: RingFit | None = None
    ranks: tuple[RanksCheck, ...] = ()
    decoded: float | None = None


def read(paths: Sequence[Path]) -> Measured:
    """Read files of any of :data:`KINDS`.

    Raises:
        ValueError: One cannot be read, is of another kind, or holds no real measurement.
    """
    files = [(path, _load(path)) for path in paths]
    found = Measured()
    for path, file in files:
        if file.get("smoke"):
            raise ValueError(f"'{path}' is of a smoke run, whose figures mean nothing")
        if "parts" in file:
            found = replace(found, fits=(*found.fits, *_steps(file)))
        elif "results" in file:
            found = replace(found, fits=(*found.fits, *_forwards(file)))
        elif "collectives" in file:
            facts, all_reduces = file.get("machine"), file["collectives"]
            ring, shared = (
                fit_ring([one for one in all_reduces if one["by"] == way], facts) for way in WAYS
            )
            found = replace(found, ring=ring, shared=shared)
        elif "decoding" not in file and "gradient_error" not in file:
            raise ValueError(
                f"'{path}' is none of the files that are read; these are what --json of "
                f"{', '.join(KINDS)} writes"
            )
    for _, file in files:
        # By itself or as a part of the large measurement.
        parts = file.get("parts", file)
        ranks = parts.get("ranks", file if "gradient_error" in file else None)
        if ranks is not None and found.shared is not None:
            name = file.get("size", {}).get("student", "resnet18")
            found = replace(found, ranks=_ranks(ranks, name, found))
        streaming = parts.get("streaming", file if "decoding" in file else None)
        if streaming is not None:
            found = replace(found, decoded=_decoded(streaming))
    return found


@functools.cache
def forward_works() -> dict[str, tuple[dict[str, Work], int]]:
    """Work by column, and images of a batch, by the names of :mod:`benchmarks.teacher_material`."""
    ddpm = teacher("DDPM CIFAR-10")
    half = guided("half", replace(ADM64, embedded=96, widths=(96, 192, 288, 384)), head_width=32)
    narrow = latent_unet("narrow", 256, (96, 192, 384, 384), (32, 64, 128, 128))
    # The VAE by itself is cut at its mid-block, which little comes after.
    vae = latent_unet("VAE", 128, (32, 32, 32, 32), (64, 128, 256, 256))
    resnet = student("torchvision/resnet50", 224).inference
    return {
        "ddpm-cifar10-32's UNet2DModel": ({"cut": ddpm.cut, "whole": ddpm.whole}, 16),
        "64x64_diffusion.pt at half width": ({"cut": half.cut, "whole": half.whole}, 8),
        "Stable Diffusion 1.5, narrow, at 256x256": (
            {"cut": narrow.cut, "whole": narrow.whole, "encode": narrow.encoder},
            4,
        ),
        "Stable Diffusion's VAE at half width, 128x128": ({"cut": vae.encoder}, 4),
        "ResNet-50": ({"cut": resnet}, 8),
    }


def _steps(file: Mapping[str, Any]) -> Fits:
    steps = file["parts"].get("steps")
    if steps is None:
        return ()
    kinds = step_samples(steps, teacher("DDPM CIFAR-10"), student(file["size"]["student"], side=32))
    device = file["machine"]["gpu"] or "CPU"
    return tuple(
        (file["machine"], fit(f"steps, {device}, {kind}", samples))
        for kind, samples in kinds.items()
        if len(samples) > 1
    )


def _forwards(file: Mapping[str, Any]) -> Fits:
    samples = forward_samples(file["results"], forward_works())
    if len(samples) < 2:
        return ()
    device = file["machine"]["gpu"] or "CPU"
    return ((file["machine"], fit(f"teachers' forwards, {device}, fp32", samples)),)


def _load(path: Path) -> dict[str, Any]:
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON file: {error}") from error
    if not isinstance(file, dict):
        raise ValueError(f"'{path}' holds a {type(file).__name__}, not a measurement's file")
    return file


def _ranks(part: Mapping[str, Any], name: str, found: Measured) -> tuple[RanksCheck, ...]:
    assert found.shared is not None
    net = student(name, side=32)
    # A core's, where it was told apart; else the optimizer's part is not.
    traffic = min((f.rates.traffic / facts["threads"] for facts, f in found.fits), default=math.inf)
    return tuple(
        RanksCheck(
            line,
            alone=of["one"]["median"],
            ranks=2,
            predicted=predicted_ratio(median(of["seconds_one"]), 2, net, found.shared, traffic),
            measured=of["speedup"]["median"],
        )
        for line, of in part.get("lines", {}).items()
    )


def _decoded(part: Mapping[str, Any]) -> float:
    """Images/s of a core at the largest side that was measured, with one thread decoding."""
    side = max(part["decoding"], key=int)
    return 1 / float(part["decoding"][side]["1"]["core_seconds"])
