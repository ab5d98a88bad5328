"""The model's constants, fitted to what was measured here, and how well they tell the rest.

A step's seconds are the sum, over the kinds of its kernels, of work over rate: FLOPs of
convolutions, FLOPs of products and attention, bytes of all others. The rates are those, none
negative, with the least squares of relative residuals. Each measurement is then predicted once more
by rates that were fitted without it.

Shape letters: N lanes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.scaling.model import Rates, kernel_seconds
from benchmarks.scaling.networks import Student, Teacher
from benchmarks.scaling.work import Work

# SGD with momentum reads three numbers of a parameter and writes two; the average of the weights
# reads two and writes one.
SGD_BYTES = (3 + 2) * 4 + 3 * 4
WIDTHS = {False: 4.0, True: 2.0}  # bytes of a number in fp32 and in bf16
ENDLESS = Rates(math.inf, math.inf, math.inf)


@dataclass(frozen=True)
class Sample:
    """One measurement and the work that it did.

    Attributes:
        name: Of the line.
        seconds: Of one step or forward, the median.
        parts: Work and the number of images that it was done for.
        moved: Bytes moved besides: the optimizer's.
        fast: Whether in bf16.
        fused: Whether compiled.
    """

    name: str
    seconds: float
    parts: tuple[tuple[Work, float], ...]
    moved: float = 0.0
    fast: bool = False
    fused: bool = False

    def predicted(self, rates: Rates) -> float:
        """Seconds at these rates."""
        rates = replace(rates, width=WIDTHS[self.fast], fused=self.fused)
        kernels = sum(kernel_seconds(work, images, rates) for work, images in self.parts)
        return kernels + self.moved / rates.traffic

    @property
    def kernels(self) -> int:
        """How many of them are launched."""
        return sum(len(work.operations) for work, images in self.parts if images)

    def columns(self, kinds: int) -> list[float]:
        """FLOPs of convolutions, FLOPs of products, other bytes; with 2 kinds all FLOPs at once."""
        found = [
            self.predicted(replace(ENDLESS, convolution=1.0)),
            self.predicted(replace(ENDLESS, product=1.0)),
            self.predicted(replace(ENDLESS, traffic=1.0)),
        ]
        return found if kinds == 3 else [found[0] + found[1], found[2]]


@dataclass(frozen=True)
class Fit:
    """Rates and how they do.

    Attributes:
        name: Of the samples' kind.
        rates: FLOP/s and bytes/s; infinite where the measurements leave nothing to that kind.
        samples: What was fitted.
        fitted: Seconds that the rates give each of them.
        others: Seconds by rates fitted to the others alone; empty with too few of them.
    """

    name: str
    rates: Rates
    samples: tuple[Sample, ...]
    fitted: tuple[float, ...]
    others: tuple[float, ...]

    @property
    def error(self) -> float:
        """Root mean square of the relative residuals."""
        return _rms(self.samples, self.fitted)

    @property
    def error_of_others(self) -> float | None:
        """The same of predictions for what was not fitted."""
        return _rms(self.samples, self.others) if self.others else None


def fit(name: str, samples: Sequence[Sample]) -> Fit:
    """Fit the rates: three, or two (all FLOPs alike) where there are three samples or fewer.

    Raises:
        ValueError: There are fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"'{name}': {len(samples)} measurements given; 2 or more are needed")
    kinds = 3 if len(samples) > 3 else 2
    rates = _rates(samples, kinds)
    others: list[float] = []
    if len(samples) > kinds:
        for index, left_out in enumerate(samples):
            rest = [*samples[:index], *samples[index + 1 :]]
            others.append(left_out.predicted(_rates(rest, kinds)))
    fitted = tuple(sample.predicted(rates) for sample in samples)
    return Fit(name, rates, tuple(samples), fitted, tuple(others))


def step_samples(
    steps: Mapping[str, Any], teacher: Teacher, student: Student
) -> dict[str, list[Sample]]:
    """The lines of ``python -m benchmarks.throughput``, part ``steps``, by kind of arithmetic.

    Args:
        steps: That part of the file.
        teacher: The network that it ran.
        student: Likewise.
    """
    kinds: dict[str, list[Sample]] = {}
    for name, line in steps["lines"].items():
        setting = line["setting"]
        # The published policy is another network, whose work is not counted.
        if setting is None and "without policy" not in name:
            continue
        parts = _setting_parts(setting, line["lanes"], teacher, student)
        fast = setting is not None and setting["fast"]
        fused = setting is not None and setting["compiled"]
        kind = "fp32" if not fast else "bf16, compiled" if fused else "bf16"
        seconds = float(np.median(line["seconds_per_step"]))
        moved = SGD_BYTES * student.parameters
        kinds.setdefault(kind, []).append(Sample(name, seconds, parts, moved, fast, fused))
    return kinds


def _setting_parts(
    setting: Mapping[str, Any] | None, lanes: float, teacher: Teacher, student: Student
) -> tuple[tuple[Work, float], ...]:
    if setting is None:
        return ((teacher.whole, lanes), (student.training, lanes))
    # Lanes of one image share the student's passes, not the teacher's.
    images = lanes / setting["group"]
    parts = [(student.training, images)]
    if setting["cache"] == "off":
        parts.append((teacher.cut, lanes))
    if setting["reward"] == "student_lookahead" and setting["start"] == "updated":
        parts.append((student.inference, images))
    return tuple(parts)


def forward_samples(
    results: Sequence[Mapping[str, Any]], works: Mapping[str, tuple[Mapping[str, Work], int]]
) -> list[Sample]:
    """The forwards of ``python -m benchmarks.teachers`` whose work is known.

    Args:
        results: Of that file.
        works: By the model's name there: work by the column's name, and the images of a batch.
    """
    samples = []
    for result in results:
        known, images = works.get(result["model"], ({}, 0))
        for part, spread in result["milliseconds_per_image"].items():
            if part in known:
                seconds = spread["median"] / 1000 * images
                name = f"{result['model']}, {part}"
                samples.append(Sample(name, seconds, ((known[part], images),)))
    return samples


def _rates(samples: Sequence[Sample], kinds: int) -> Rates:
    from scipy.optimize import nnls

    rows = np.array([sample.columns(kinds) for sample in samples])
    rows /= np.array([[sample.seconds] for sample in samples])
    # Columns of like size: FLOPs count in billions, bytes in millions.
    scale = np.maximum(rows.max(axis=0), np.finfo(float).tiny)
    found, _ = nnls(rows / scale, np.ones(len(rows)))
    rates = [
        float(s / cost) if cost > 0 else math.inf for cost, s in zip(found, scale, strict=True)
    ]
    return Rates(rates[0], rates[-2], rates[-1])


def _rms(samples: Sequence[Sample], predicted: Sequence[float]) -> float:
    errors = [p / s.seconds - 1 for s, p in zip(samples, predicted, strict=True)]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))
