"""Statistics for few runs: interquartile means, probability of improvement, paired differences.

Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", NeurIPS
2021. What is estimated is as rliable has it, and its point estimates are taken from there; the
bootstrap is drawn here, with a generator of its own and for all resamples at once. rliable's own
draws from NumPy's global state, and for each task apart. Here tasks are measured on the same
student (other numbers of labels), so a resample takes a seed's tasks together: apart, intervals
would be too narrow. With one task the two are the same.

Shape letters: n, m runs (seeds), T tasks, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 5_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN bounds where there are too few runs for one."""

    value: float
    low: float
    high: float
    runs: int

    def as_dict(self) -> dict[str, float | int | None]:
        """JSON-able; bounds that there are not become None."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        known = {key: float(x) if np.isfinite(x) else None for key, x in numbers.items()}
        return known | {"runs": self.runs}


def interquartile_mean(scores: np.ndarray, *, seed: int = 0) -> Estimate:
    """Mean of the middle half of all scores, with a percentile bootstrap interval.

    Args:
        scores: (n, T), or (n,) for one task.
        seed: Of the resamples.
    """
    from rliable import metrics

    scores = _table(scores)
    value = float(metrics.aggregate_iqm(scores))
    if len(scores) < 2:
        return Estimate(value, np.nan, np.nan, len(scores))
    drawn = scores[_resamples(len(scores), seed)]  # (R, n, T)
    return _with_interval(value, trimmed_means(drawn.reshape(len(drawn), -1)), len(scores))


def trimmed_means(values: np.ndarray) -> np.ndarray:
    """Mean of each row of (R, M) without its lowest and its highest quarter, (R,)."""
    cut = int(0.25 * values.shape[1])
    return np.sort(values, axis=1)[:, cut : values.shape[1] - cut].mean(axis=1)


def probability_of_improvement(
    scores: np.ndarray, others: np.ndarray, *, seed: int = 0
) -> Estimate:
    """How likely a run of one arm is better than a run of the other, mean over tasks.

    Ties count half. The arms' runs are resampled independently of each other.

    Args:
        scores: (n, T) or (n,).
        others: (m, T) or (m,).
        seed: Of the resamples.
    """
    from rliable import metrics

    scores, others = _table(scores), _table(others)
    value = float(metrics.probability_of_improvement(scores, others))
    if min(len(scores), len(others)) < 2:
        return Estimate(value, np.nan, np.nan, min(len(scores), len(others)))
    better = wins(scores, others)  # (n, m)
    rows = _resamples(len(scores), seed)  # (R, n)
    columns = _resamples(len(others), seed + 1)  # (R, m)
    drawn = better[rows[:, :, None], columns[:, None, :]].mean(axis=(1, 2))
    return _with_interval(value, drawn, min(len(scores), len(others)))


def wins(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of tasks in which each run of (n, T) beats each run of (m, T), ties half, (n, m)."""
    differences = scores[:, None, :] - others[None, :, :]
    return ((differences > 0) + 0.5 * (differences == 0)).mean(axis=2)


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mean of the differences seed by seed, with the 95 % interval of Student's t distribution.

    Raises:
        ValueError: They differ in number, or there are none.
    """
    from scipy import stats

    if len(values) != len(others) or not len(values):
        raise ValueError(f"paired values: {len(values)} and {len(others)} given; equally many")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    count, mean = len(differences), float(differences.mean())
    if count < 2:
        return Estimate(mean, np.nan, np.nan, count)
    error = float(differences.std(ddof=1) / np.sqrt(count))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1)) * error
    return Estimate(mean, mean - half, mean + half, count)


def verdict(difference: Estimate, margin: float) -> str:
    """What a difference to a reference says.

    ``beats`` and ``below``: the interval lies above or below 0. ``reaches``: it holds 0 and ends
    above ``-margin``. ``open``: it holds 0 and more than a margin below it; more seeds would tell.
    """
    if not np.isfinite(difference.low):
        return "open"
    if difference.low > 0:
        return "beats"
    if difference.high < 0:
        return "below"
    return "reaches" if difference.low > -margin else "open"


def _table(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    return scores[:, None] if scores.ndim == 1 else scores


def _resamples(runs: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(runs, size=(RESAMPLES, runs))


def _with_interval(value: float, drawn: np.ndarray, runs: int) -> Estimate:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), runs)
