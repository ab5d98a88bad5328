"""The comparison of policies over seeds: its arithmetic, and a small form of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from warm_processes import CONTEXT

from benchmarks.learning import compare, main, run_seed
from repfusion_env.config_loading import load_config, to_dict


def test_confidence_interval_is_students_over_paired_differences() -> None:
    values = [
        {"learned": 1.0, "random": 0.0, "best fixed": 1.0},
        {"learned": 12.0, "random": 10.0, "best fixed": 12.0},
        {"learned": 5.0, "random": 2.0, "best fixed": 5.0},
    ]
    found = compare(values)
    assert found["mean"] == {"learned": 6.0, "random": 4.0, "best fixed": 6.0}
    # Differences 1, 2, 3: mean 2, deviation 1; the table's t(2) at 97.5 % is 4.30265.
    half = 4.30265 / 3**0.5
    assert found["gain"]["random"] == pytest.approx(
        {"mean": 2.0, "low": 2.0 - half, "high": 2.0 + half}, abs=1e-5
    )
    assert found["gain"]["best fixed"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_seed_reports_what_the_training_command_wrote(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = to_dict(load_config(tiny | {"run": {"decisions": 80}}))
    found = run_seed(config, 3, str(tmp_path), threads=1)
    summary = json.loads((tmp_path / "seed-3" / "summary.json").read_text(encoding="utf-8"))
    fixed = summary["reward"]["fixed"]
    assert found["reward"]["learned"] == summary["reward"]["learned"]
    assert found["reward"]["random"] == pytest.approx(sum(fixed.values()) / len(fixed))
    assert found["reward"]["best fixed"] == max(fixed.values()) == fixed[found["fixed"]]
    # The student that is probed here has been written to a file and read again.
    assert found["accuracy"]["96"]["learned"] == summary["student"]["linear_probe_accuracy"]
    assert set(found["accuracy"]) == {"50", "96"}


def test_arms_are_three_different_students_of_one_seed(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    config = to_dict(load_config(tiny | {"run": {"decisions": 40}}))
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    found, again = (run_seed(config, 5, str(folder), threads=1) for folder in (first, second))
    assert found["accuracy"] == again["accuracy"]
    assert found["reward"] == again["reward"]
    assert len({tuple(row.values()) for row in found["accuracy"].values()}) > 1


@pytest.mark.slow
def test_command_runs_seeds_in_their_own_processes(
    tiny: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from repfusion_env.config_loading import to_yaml

    # They are spawned, which takes far longer than all that they do here.
    monkeypatch.setattr("benchmarks.learning.get_context", lambda method: CONTEXT)
    # Two threads each would wait for one another more than they compute.
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    config, out = tmp_path / "tiny.yaml", tmp_path / "learning.json"
    config.write_text(to_yaml(load_config(tiny)), encoding="utf-8")
    options = ["--seeds", "2", "--jobs", "2", "--run.decisions", "40", "--json", str(out)]
    assert main(["--config", str(config), *options]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert result["runs"][0]["reward"] != result["runs"][1]["reward"]
    assert result["config"]["run"]["decisions"] == 40
    rows = [row.split("|")[1].strip() for row in capsys.readouterr().out.splitlines() if "|" in row]
    assert rows[2:] == ["held-out reward"] + [
        f"linear probe accuracy, {labels} labels" for labels in (50, 96)
    ]


def test_single_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--seeds", "1"])
    assert "--seeds: 1 given; an interval needs 2 or more" in capsys.readouterr().err


def test_unknown_option_is_refused_with_the_closest_match(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--reward.knid", "student"]) == 2
    assert "Did you mean 'reward.kind'?" in capsys.readouterr().err


def test_actions_that_reinforce_cannot_choose_are_refused_before_any_seed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--env.action", "continuous_timestep"]) == 2
    assert "error: env.action: REINFORCE draws from categories" in capsys.readouterr().err
