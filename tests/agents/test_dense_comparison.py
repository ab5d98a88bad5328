"""Comparisons of students for masks, points and boxes: their metric, and its sense."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agents import compare
from agents.comparison import stage_two
from agents.comparison.arms import chosen_arms, shipped_arms
from agents.comparison.figures import draw
from agents.comparison.panel_style import window
from agents.comparison.plan import Plan, save_plan
from agents.comparison.statistics import Estimate
from agents.comparison.summary import as_dict, summarize
from agents.comparison.tables import markdown, spreadsheet
from repfusion_env.config_loading import load_config
from repfusion_env.tasks.pixel_probing import ensemble

GRID = {"timesteps.values": [0, 400, 800]}
DENSE = {
    "distillation.dense": True,
    "segmentation.head": "linear",
    "run.decisions": 16,
    "evaluation.images": 8,
    "timesteps.count": 2,
    "teacher.standardize_images": 16,
}
NME = {"name": "nme", "higher_is_better": False, "percent": True}


@pytest.fixture
def errors(tmp_path: Path) -> Plan:
    """Results of landmarks: the bandit's error is the smallest, the untrained student's huge."""
    config = load_config("debug", GRID | {"task": "landmarks", "distillation.dense": True})
    arms = chosen_arms(shipped_arms(config), ["fixed", "random", "ucb", "linear", "untrained"])
    plan = Plan(tmp_path / "out", "faces", config, arms, 4, ("10%", "100%"), 2, {"steps": 5})
    save_plan(plan)

    def write(arm: str, seed: int, reward: float | None, error: float) -> None:
        result = {
            "arm": arm,
            "seed": seed,
            "reward": reward,
            "decisions": 100,
            "teacher_evaluations": {"setup": 0, "training": 0 if reward is None else 100},
            "nme": {"head 10%": error, "finetune 10%": error - 0.01},
            "metric": NME,
            "metrics": {},
            "seconds": {"training": 1.0},
            "machine": {},
        }
        plan.result_path(arm, seed).write_text(json.dumps(result), encoding="utf-8")

    for seed in range(4):
        for timestep, reward in ((0, -2.0), (400, -1.0), (800, -3.0)):
            write(f"fixed-{timestep}", seed, reward, 0.06 + 0.001 * seed)
        write("random", seed, -2.0, 0.08 + 0.001 * seed)
        write("ucb", seed, -1.0, 0.05 + 0.0011 * seed)
        write("linear", seed, -1.0, 0.07 + 0.0011 * seed)
        write("untrained", seed, None, 0.9)
    return plan


def test_of_errors_the_smaller_one_wins(errors: Plan) -> None:
    summary = summarize(errors)
    task = "head 10%"
    difference = summary.difference("ucb", "best-fixed", task)
    assert difference is not None and difference.value == pytest.approx(-0.00985)
    assert summary.verdict("ucb", task) == "beats"
    assert summary.verdict("linear", task) == "below"
    better = summary.improvement("ucb", "random", summary.stage_two)
    assert better is not None and better.value == 1.0
    worse = summary.improvement("untrained", "random", summary.stage_two)
    assert worse is not None and worse.value == 0.0
    gain = summary.gain("ucb", summary.stage_two)
    assert gain is not None and gain.value == pytest.approx(0.03, abs=0.002)
    # A point of an error of six points would be a lot.
    assert summary.margin(task) == pytest.approx(0.1 * 0.0615)


def test_the_report_names_the_metric_and_its_sense(errors: Plan) -> None:
    summary = summarize(errors)
    text = markdown(summary)
    assert "NME in %, lower is better" in text and "accurac" not in text
    rows = [line for line in text.splitlines() if line.startswith("| UCB |")]
    arms, question = rows[0], rows[1]
    assert "5.2 [5.0, 5.3]" in arms
    assert "**beats** \N{MINUS SIGN}1.0" in question
    worse = next(line for line in text.splitlines() if line.startswith("| linear contextual | 33"))
    assert "**worse** +1.0" in worse and "**below**" not in worse
    one = next(csv.DictReader(spreadsheet(summary).splitlines()))
    assert float(one["head 10%"]) > 0
    numbers = as_dict(summary)
    assert numbers["metric"] == NME
    assert numbers["arms"]["ucb"]["nme_below_random"]["value"] > 0
    assert numbers["arms"]["ucb"]["improvement"]["over random"]["nme"]["value"] == 1.0


def test_figures_of_errors_leave_out_high_outliers(errors: Plan) -> None:
    summary = summarize(errors)
    found = {name: summary.estimate(name, "head 10%") for name in summary.shown}
    low, high = window(found, 100.0, -1.0)
    assert low < 5.0 and 8.2 < high < 50
    figures = draw(summary)
    assert set(figures) == {"arms", "sweep", "cost", "improvement"}
    panels = figures["arms"].axes
    texts = [text.get_text() for axes in panels for text in axes.texts]
    assert texts.count("NME in %, lower is better") == 2
    assert any(text.startswith("90 ") for text in texts)  # the untrained student, at the edge
    left, right = panels[1].get_xlim()
    assert left < right < 50


def test_windows_of_errors_mirror_those_of_accuracies() -> None:
    values = np.array([0.9, 0.88, 0.87, 0.1])
    good = {str(v): Estimate(v, v - 0.01, v + 0.01, 3) for v in values}
    bad = {str(v): Estimate(-v, -v - 0.01, -v + 0.01, 3) for v in values}
    low, high = window(good, 1.0)
    assert window(bad, 1.0, -1.0) == pytest.approx((-high, -low))


def test_the_pixel_probe_is_an_arm_of_segmentation_alone() -> None:
    for task in ("classification", "segmentation", "landmarks", "detection"):
        arms = shipped_arms(load_config("debug", {"task": task, "distillation.dense": True}))
        assert ("pixel-probe" in arms) == (task == "segmentation")


def test_a_comparison_of_segmentation_runs_as_a_whole(
    tmp_path: Path,
    squares: str,
    experiment: Callable[..., Path],
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stage_two, "MOST_IMAGES", 10)
    for name, few in (("PATIENT_EPOCHS", 1), ("PATIENCE", 1)):  # of the pixel probe's training
        monkeypatch.setattr(ensemble, name, few)
    data = {"task": "segmentation", "data.name": "npz", "data.path": squares}
    config = experiment(**DENSE, **data)
    out = tmp_path / "out"
    arguments = ["--config", str(config), "--out", str(out), "--seeds", "1", "--labels", "2"]
    arguments += ["100%", "--finetune.steps", "2", "--finetune.batch_size", "8"]
    assert compare.main([*arguments, "--arms", "fixed-0,pixel-probe"]) == 0
    results = {
        path.name.partition("--")[0]: json.loads(path.read_text(encoding="utf-8"))
        for path in (out / "results").iterdir()
    }
    tasks = ["finetune 100%", "finetune 2", "head 100%", "head 2"]
    fixed = results["fixed-0"]
    assert sorted(fixed["miou"]) == tasks and fixed["reward"] < 0
    assert fixed["metrics"]["head 2"]["miou"] == fixed["miou"]["head 2"]
    probe = results["pixel-probe"]
    assert list(probe["miou"]) == ["head 2"]  # all 48 are more than a few
    assert probe["teacher_evaluations"] == {"setup": 0, "training": 3 * 2}
    assert all("accuracy" not in result for result in results.values())
    assert "mIoU on frozen features" in capsys.readouterr().err
    assert "mIoU in %" in (out / "table.md").read_text(encoding="utf-8")
    assert (out / "arms.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("task", "arguments", "sentence"),
    [
        ("segmentation", ["--finetune.crop", "2"], "--finetune.crop: 2 given, but masks of this"),
        ("detection", ["--finetune.head", "fcm"], "detection.head: 'fcm' given; allowed: 'fcos'"),
        ("landmarks", ["--arms", "pixel-probe"], "there is no arm 'pixel-probe'"),
        ("landmarks", ["--arm", "x={command: pixel_probe}"], "'pixel_probe' needs segmentation"),
    ],
)
def test_what_does_not_fit_the_task_is_refused_before_anything_runs(
    task: str,
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    experiment: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = experiment(task=task, **{"distillation.dense": True}), tmp_path / "out"
    chosen = arguments if "--arms" in arguments else [*arguments, "--arms", "random"]
    assert compare.main(["--config", str(config), "--out", str(out), *chosen]) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()
