"""Timing several ways of doing one thing in one run, so that they meet the same machine.

Ways are called lines. In each round every line runs a few steps, in an order that changes from
round to round; whatever slows the machine for a while slows the neighbours alike, so ratios are
taken within a round and their median over rounds is what counts.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

BF16_FLAGS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Line:
    """One way of doing the work.

    Attributes:
        name: Key of the results.
        step: Does the step with this number.
        inside: Seconds spent so far in the part of the steps that is watched, or None.
        repeat: Makes a sample so many times longer, for steps much shorter than the others'.
    """

    name: str
    step: Callable[[int], object]
    inside: Callable[[], float] | None = None
    repeat: int = 1


@dataclass(frozen=True)
class Timing:
    """Samples of one line.

    Attributes:
        seconds: Per step, one entry per round.
        outside: Share of the watched part's time that the step spends around it, per round.
    """

    seconds: tuple[float, ...]
    outside: tuple[float, ...] = ()


def interleave(
    lines: Sequence[Line],
    *,
    rounds: int,
    steps: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Time all lines, round by round.

    Args:
        lines: What is compared.
        rounds: Samples per line. One more round runs first and is thrown away: it pays for memory,
            primitives and compilation.
        steps: Per sample of a line with ``repeat`` 1.
        device: Waited for at both ends of a sample.
        progress: Told of each round.

    Returns:
        The samples by line.
    """
    seconds: dict[str, list[float]] = {line.name: [] for line in lines}
    outside: dict[str, list[float]] = {line.name: [] for line in lines if line.inside}
    numbers = dict.fromkeys(seconds, 0)
    for round_ in range(-1, rounds):
        for line in _order(lines, round_):
            before = line.inside() if line.inside else 0.0
            _wait(device)
            started = time.perf_counter()
            for _ in range(steps * line.repeat):
                line.step(numbers[line.name])
                numbers[line.name] += 1
            _wait(device)
            elapsed = time.perf_counter() - started
            if round_ < 0:
                continue
            seconds[line.name].append(elapsed / (steps * line.repeat))
            if line.inside:
                watched = line.inside() - before
                outside[line.name].append((elapsed - watched) / watched)
        progress(f"round {round_ + 1} of {rounds}" if round_ >= 0 else "warmed up")
    return {
        name: Timing(tuple(samples), tuple(outside.get(name, ())))
        for name, samples in seconds.items()
    }


def ratios(above: Timing, below: Timing) -> list[float]:
    """How many times as fast ``above`` is as ``below``, round by round."""
    return [b / a for a, b in zip(above.seconds, below.seconds, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(found: Mapping[str, float], form: str) -> str:
    """A spread as ``median [min, max]``, each in ``form``."""
    middle, low, high = (format(found[key], form) for key in ("median", "min", "max"))
    return f"{middle} [{low}, {high}]"


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on; figures of two machines do not compare.

    ``others`` is for the share of :class:`Bystanders`, which is known at the end.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": _cpu("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "bf16_instructions": [flag for flag in BF16_FLAGS if flag in _cpu("flags").split()],
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "others": None,
    }


class Bystanders:
    """What other processes do to the machine meanwhile, from its making on. Linux only."""

    def __init__(self) -> None:
        self._started = self._now()

    def share(self) -> float | None:
        """Part of the machine's cores that other processes kept busy, in [0, 1]."""
        if self._started is None:
            return None
        now = self._now()
        assert now is not None
        wall, busy, ours = (b - a for a, b in zip(self._started, now, strict=True))
        return max(0.0, busy - ours) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        table = Path("/proc/stat")
        if not table.is_file():
            return None
        user, nice, system, _, _, irq, softirq = map(int, table.read_text().split()[1:8])
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        times = os.times()
        # Processes of ours are no bystanders, once they have ended.
        ours = times.user + times.system + times.children_user + times.children_system
        return time.monotonic(), busy, ours


def machine_lines(facts: Mapping[str, Any]) -> list[str]:
    """The facts of :func:`machine` as lines of a list."""
    instructions = ", ".join(facts["bf16_instructions"]) or "no bf16 instructions"
    shown = facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores, {instructions}"
    others = "" if facts["others"] is None else f"; other processes used {facts['others']:.0%}"
    return [
        f"- machine: {shown}; {facts['threads']} threads",
        f"- software: torch {facts['torch']}, Python {facts['python']}, {facts['system']}",
        f"- date: {facts['date']}{others}",
    ]


def _order(lines: Sequence[Line], round_: int) -> list[Line]:
    """Rotated by one each round, and backwards in every second: no line always follows another."""
    shift = round_ % len(lines)
    order = [*lines[shift:], *lines[:shift]]
    return order[::-1] if round_ % 2 else order


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu(key: str) -> str:
    """An entry of the first processor in Linux's table, or nothing."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for row in table.read_text(encoding="utf-8").splitlines():
            name, _, value = row.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
