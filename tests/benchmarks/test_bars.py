"""What was aimed at, held against what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.bars import BARS, judge, table


def _setting(**changes: Any) -> dict[str, Any]:
    return {"setting": {"reward": "teacher_probe", "group": 1, "cache": "off"} | changes}


def _ratio(value: float) -> dict[str, Any]:
    return {
        "published step": {"median": value, "min": 0.0, "max": 99.0},
        "published step without policy": {"median": value / 2, "min": 0.0, "max": 99.0},
    }


PARTS: dict[str, Any] = {
    "steps": {
        "lines": {
            "slow": _setting(),
            "fast": _setting(),
            "other work": _setting(reward="student_lookahead"),
            "grouped": _setting(group=4),
            "cached": _setting(cache="memory"),
        },
        "ratios": {
            "slow": _ratio(3.0),
            "fast": _ratio(7.0),
            "other work": _ratio(50.0),
            "grouped": _ratio(60.0),
            "cached": _ratio(11.0),
        },
    },
    "costs": {
        "settings": {
            "a": {"environment": {"median": 0.01}, "adapter": {"median": 0.02}},
            "b": {"environment": {"median": 0.04}, "adapter": {"median": 0.05}},
        }
    },
    "device": {"utilisation": {"fast": 0.41}},
    "memory": {"flat": {"on line": {"growth": 0.001}, "cache": {"growth": -0.2}}},
    "ranks": {"speedup": {"median": 1.9}, "gradient_error": 2e-4},
}


def _met(parts: dict[str, Any], *, cuda: bool) -> list[tuple[Any, Any, Any]]:
    return [(row["value"], row["from"], row["met"]) for row in judge(parts, cuda=cuda)]


def test_the_best_of_equal_work_counts_for_speed_and_the_worst_for_cost():
    assert _met(PARTS, cuda=False) == [
        (7.0, "fast (3.50 without its policy)", True),
        (11.0, "cached (5.50 without its policy)", False),
        (None, None, None),
        (0.04, "b", False),
        (0.05, "b", True),
        (0.001, "on line", True),
        (1.9, "ranks: speedup", True),
        (2e-4, "ranks: gradient_error", False),
    ]


def test_a_gpu_has_bars_of_its_own():
    rows = judge(PARTS, cuda=True)
    assert [row["needs"] for row in rows[:3]] == [
        "at least 10.00",
        "at least 25.00",
        "at least 40.0%",
    ]
    assert [row["met"] for row in rows[:3]] == [False, False, True]


@pytest.mark.parametrize("part", list(PARTS))
def test_what_was_not_measured_is_not_judged(part):
    rows = judge({key: value for key, value in PARTS.items() if key == part}, cuda=True)
    assert len(rows) == len(BARS)
    assert 0 < sum(row["met"] is not None for row in rows) < len(BARS)
    assert "| not measured |" in table(rows)


def test_the_table_says_what_is_missed():
    lines = table(judge(PARTS, cuda=False)).splitlines()
    assert lines[2] == (
        "| times the published step, on line, same work | at least 6.00 | 7.00 | "
        "fast (3.50 without its policy) | yes |"
    )
    assert lines[3].endswith("| 11.00 | cached (5.50 without its policy) | **no** |")
