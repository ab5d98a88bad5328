"""The history of speed: what is kept, what is compared, what is told."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.history import FOLDER, changes, entry, last_like, main


def result(ratio: float = 6.0, date: str = "2026-11-23 10:00 UTC", **machine: Any) -> Any:
    """As benchmarks.throughput writes it, as far as the history reads it."""
    facts = {"cpu": "EPYC", "gpu": None, "cores": 4, "threads": 4, "date": date, "others": 0.0}
    line = {"decisions_per_second": {"median": 20.0 * ratio}}
    share = {"median": 0.01}
    return {
        "format": 1,
        "smoke": False,
        "machine": facts | machine,
        "parts": {
            "steps": {
                "size": {"lanes": 64},
                "lines": {"fast": line},
                "ratios": {"fast": {"published step": {"median": ratio}}},
            },
            "costs": {"settings": {"fast": {"environment": share, "adapter": share}}},
        },
    }


def run(folder: Path, given: Any, *arguments: str) -> int:
    file = folder / "given.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    return main([str(file), "--folder", str(folder / "history"), *arguments])


def test_a_step_that_became_slower_ends_in_exit_code_1(tmp_path, capsys):
    assert run(tmp_path, result(6.0)) == 0
    assert "nothing to compare with" in capsys.readouterr().out
    assert run(tmp_path, result(5.5, "2026-11-24 10:00 UTC")) == 0  # 8 %
    assert run(tmp_path, result(4.9, "2026-11-25 10:00 UTC")) == 1  # 11 % below the last
    printed = capsys.readouterr()
    assert "against the run of 2026-11-24 10:00 UTC" in printed.out
    assert "| fast | 5.500 | 4.900 | **+10.9%** |" in printed.out
    assert printed.err.count("slower by more than 10%: fast") == 1
    assert len(list((tmp_path / "history").glob("*.json"))) == 3


def test_an_overhead_that_grew_by_a_tenth_of_the_trainer_is_told(tmp_path, capsys):
    assert run(tmp_path, result()) == 0
    slow = result(date="2026-11-24 10:00 UTC")
    slow["parts"]["costs"]["settings"]["fast"]["adapter"] = {"median": 0.12}
    assert run(tmp_path, slow) == 1
    assert "slower by more than 10%: adapter, fast" in capsys.readouterr().err


def test_machines_and_sizes_of_other_kinds_are_not_compared(tmp_path):
    assert run(tmp_path, result(6.0)) == 0
    later = "2026-11-24 10:00 UTC"
    assert run(tmp_path, result(1.0, later, gpu="H100"), "--dry-run") == 0
    assert run(tmp_path, result(1.0, later, cores=8), "--dry-run") == 0
    larger = result(1.0, later)
    larger["parts"]["steps"]["size"]["lanes"] = 128
    assert run(tmp_path, larger, "--dry-run") == 0
    assert run(tmp_path, result(1.0, later), "--dry-run") == 1
    assert len(list((tmp_path / "history").glob("*.json"))) == 1


def test_lines_that_only_one_run_has_are_left_out():
    old, new = entry(result()), entry(result())
    new = deepcopy(new)
    new["ratios"]["new line"] = 1.0
    new["costs"].clear()
    assert [row["name"] for row in changes(new, old)] == ["fast"]


@pytest.mark.parametrize(
    ("changes_", "sentence"),
    [
        ({"format": 2}, "in format 1 is needed; this one has the format 2"),
        ({"smoke": True}, "a smoke run's figures mean nothing"),
        ({"parts": {}}, "the part 'steps' is missing"),
    ],
)
def test_what_is_no_measurement_is_refused(tmp_path, capsys, changes_, sentence):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, result() | changes_)
    assert sentence in capsys.readouterr().err


def test_a_damaged_entry_is_named(tmp_path, capsys):
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "old.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, result())
    assert "old.json: this is no entry of the history" in capsys.readouterr().err


def test_the_entries_that_are_shipped_can_be_read():
    last_like(entry(result()), FOLDER)
    for file in FOLDER.glob("*.json"):
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert kept["ratios"] and set(kept["ratios"]) < set(kept["lines"])
