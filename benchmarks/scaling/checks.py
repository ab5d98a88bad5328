"""The part of the model that is about many processes, checked against processes of this machine.

Shape letters: N lanes, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.scaling.fit import SGD_BYTES
from benchmarks.scaling.hardware import ring
from benchmarks.scaling.model import GRADIENT_BYTES
from benchmarks.scaling.networks import Student


@dataclass(frozen=True)
class RingFit:
    """Constants of :func:`benchmarks.scaling.hardware.ring` on this machine.

    Attributes:
        bandwidth: Bytes/s one way.
        hop: Seconds.
        rows: (W, bytes, measured seconds, the model's seconds) of each measurement.
        machine: Where they were taken.
    """

    bandwidth: float
    hop: float
    rows: tuple[tuple[int, int, float, float], ...]
    machine: Mapping[str, Any] | None = None

    @property
    def error(self) -> float:
        """Root mean square of the relative residuals."""
        errors = [predicted / measured - 1 for _, _, measured, predicted in self.rows]
        return math.sqrt(sum(error**2 for error in errors) / len(errors))

    def seconds(self, size: float, ranks: int) -> float:
        """Of one all-reduce."""
        return ring(size, ranks, self.bandwidth, self.hop)


def fit_ring(
    results: Sequence[Mapping[str, Any]], machine: Mapping[str, Any] | None = None
) -> RingFit:
    """Fit both constants, least squares of relative residuals.

    Args:
        results: Of ``python -m benchmarks.scaling.collectives``.
        machine: Where they were taken.
    """
    from scipy.optimize import nnls

    measured = np.array([result["seconds"]["median"] for result in results])
    keys = [(int(result["ranks"]), int(result["bytes"])) for result in results]
    # The model is linear in the inverse bandwidth and the hop.
    bytes_ = np.array([ring(size, ranks, 1.0, 0.0) for ranks, size in keys])
    hops = np.array([ring(0.0, ranks, 1.0, 1.0) for ranks, _ in keys])
    scale = np.array([bytes_.max(), hops.max()])
    rows = np.stack([bytes_, hops], 1) / scale / measured[:, None]
    inverse, hop = nnls(rows, np.ones(len(rows)))[0] / scale
    bandwidth = 1 / inverse if inverse > 0 else math.inf
    found = [
        (ranks, size, float(seconds), ring(size, ranks, bandwidth, hop))
        for (ranks, size), seconds in zip(keys, measured, strict=True)
    ]
    return RingFit(float(bandwidth), float(hop), tuple(found), machine)


@dataclass(frozen=True)
class RanksCheck:
    """Several processes against one.

    Attributes:
        name: Of the run.
        alone: Decisions/s of one process.
        ranks: W.
        predicted: Ratio of decisions/s that the model gives.
        measured: That was measured.
    """

    name: str
    alone: float
    ranks: int
    predicted: float
    measured: float


def predicted_ratio(
    seconds: float, ranks: int, student: Student, fit: RingFit, traffic: float
) -> float:
    """Decisions/s of W processes over those of one, all lanes together the same.

    Args:
        seconds: Of one process's step.
        ranks: W, each with its share of the lanes and a core of its own.
        student: Whose gradients and batch statistics are reduced.
        fit: Of the all-reduce.
        traffic: Bytes/s of a process: the optimizer's part is not shared.
    """
    optimizer = SGD_BYTES * student.parameters / traffic
    shared = (seconds - optimizer) / ranks
    gradients = fit.seconds(GRADIENT_BYTES * student.parameters, ranks)
    norms = 2 * student.norms * fit.seconds(4096, ranks)
    return seconds / (shared + optimizer + gradients + norms)
