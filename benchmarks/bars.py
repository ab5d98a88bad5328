"""What was aimed at, and whether a run of :mod:`benchmarks.throughput` reaches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Parts = Mapping[str, Any]
Found = tuple[float, str] | None  # a value and where it was found


@dataclass(frozen=True)
class Bar:
    """One aim.

    Attributes:
        name: What is measured.
        limit: What it has to be, on a CPU.
        cuda: What it has to be on CUDA; None: the same.
        most: The limit is the largest that may be, not the smallest.
        form: How values are shown.
        find: The value in the parts of a run, or None where it was not measured.
        only_cuda: There is no such aim for a CPU.
    """

    name: str
    limit: float
    find: Callable[[Parts], Found]
    cuda: float | None = None
    most: bool = False
    form: str = ".2f"
    only_cuda: bool = False


def _fastest(parts: Parts, cached: bool) -> Found:
    """The published step's own work: the fastest setting that does it, against it.

    An environment has no policy; beside the setting stands what is left without the published one.
    """
    steps = parts.get("steps")
    if steps is None:
        return None
    found = [
        (ratio["published step"]["median"], name)
        for name, ratio in steps["ratios"].items()
        if _same_work(steps["lines"][name]["setting"])
        and (steps["lines"][name]["setting"]["cache"] != "off") is cached
    ]
    if not found:
        return None
    value, name = max(found)
    like = steps["ratios"][name]["published step without policy"]["median"]
    return value, f"{name} ({like:.2f} without its policy)"


def _same_work(setting: Mapping[str, Any]) -> bool:
    return setting["reward"] == "teacher_probe" and setting["group"] == 1


def _dearest(parts: Parts, line: str) -> Found:
    costs = parts.get("costs")
    if costs is None:
        return None
    return max((found[line]["median"], name) for name, found in costs["settings"].items())


def _utilisation(parts: Parts) -> Found:
    shares = parts.get("device", {}).get("utilisation")
    return max(((share, name) for name, share in shares.items()), default=None) if shares else None


def _growth(parts: Parts) -> Found:
    flat = parts.get("memory", {}).get("flat")
    return max((found["growth"], mode) for mode, found in flat.items()) if flat else None


def _ranks(key: str) -> Callable[[Parts], Found]:
    def find(parts: Parts) -> Found:
        value = parts.get("ranks", {}).get(key)
        if isinstance(value, Mapping):
            value = value["median"]
        return None if value is None else (float(value), f"ranks: {key}")

    return find


BARS = (
    Bar("times the published step, on line, same work", 6.0, lambda p: _fastest(p, False), 10.0),
    Bar("times the published step, cache warm, same work", 12.0, lambda p: _fastest(p, True), 25.0),
    Bar(
        "on-line step, share of the measured bf16 peak",
        0.4,
        _utilisation,
        form=".1%",
        only_cuda=True,
    ),
    Bar(
        "environment layer over the bare trainer",
        0.03,
        lambda p: _dearest(p, "environment"),
        most=True,
        form=".2%",
    ),
    Bar(
        "SB3 adapter over the bare trainer",
        0.10,
        lambda p: _dearest(p, "adapter"),
        most=True,
        form=".2%",
    ),
    Bar("growth of memory over 5,000 steps", 0.01, _growth, most=True, form=".2%"),
    Bar("decisions/s of two processes against one, a core each", 1.8, _ranks("speedup")),
    Bar(
        "gradients of two processes against the full batch on one, relative error",
        1e-5,
        _ranks("gradient_error"),
        most=True,
        form=".1e",
    ),
)


def judge(parts: Parts, *, cuda: bool, bars: Iterable[Bar] = BARS) -> list[dict[str, Any]]:
    """Every bar against the parts that were measured.

    Returns:
        Per bar ``name``, ``needs`` (text), ``limit``, ``value``, ``from`` and ``met``; the last
        three are None where it was not measured or does not apply.
    """
    rows = []
    for bar in bars:
        limit = bar.cuda if cuda and bar.cuda is not None else bar.limit
        found = None if bar.only_cuda and not cuda else bar.find(parts)
        value, source = found or (None, None)
        met = None
        if value is not None:
            met = value <= limit if bar.most else value >= limit
        rows.append(
            {
                "name": bar.name,
                "needs": f"{'at most' if bar.most else 'at least'} {limit:{bar.form}}",
                "limit": limit,
                "value": value,
                "from": source,
                "met": met,
                "shown": None if value is None else f"{value:{bar.form}}",
            }
        )
    return rows


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The result of :func:`judge` in Markdown."""
    lines = ["| bar | needs | measured | in | met |", "| --- " * 5 + "|"]
    words = {None: "not measured", True: "yes", False: "**no**"}
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['needs']} | {row['shown'] or ''} | {row['from'] or ''} | "
            f"{words[row['met']]} |"
        )
    return "\n".join(lines)
