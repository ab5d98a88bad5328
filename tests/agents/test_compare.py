"""The comparison: its statistics, its plan, its workers, and one small comparison as a whole."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rliable import metrics

from agents import compare
from agents.comparison.arms import Arm, chosen_arms, own_arm, shipped_arms
from agents.comparison.plan import Plan, load_plan, save_plan
from agents.comparison.statistics import (
    Estimate,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
    trimmed_means,
    verdict,
    wins,
)
from agents.comparison.summary import summarize
from agents.comparison.tables import markdown, spreadsheet
from agents.comparison.workers import DONE, FAILED, STOPPED, run_jobs
from repfusion_env.config_loading import ConfigError, load_config

GRID = {"timesteps.values": [0, 400, 800]}


def make_plan(folder: Path, arms: str = "fixed,random,ucb,untrained", seeds: int = 4) -> Plan:
    """A plan over a grid of three timesteps."""
    config = load_config("debug", GRID)
    known = chosen_arms(shipped_arms(config), arms.split(","))
    return Plan(folder, "debug", config, known, seeds, ("10%", "100%"), 2, None)


def write_result(
    plan: Plan, arm: str, seed: int, reward: float | None, accuracy: float, images: int = 1000
) -> None:
    """A result as a job writes it."""
    teacher = {"setup": 0 if reward is None else 100, "training": 0 if reward is None else images}
    result = {
        "arm": arm,
        "seed": seed,
        "reward": reward,
        "decisions": images,
        "teacher_evaluations": teacher,
        "accuracy": {"linear 10%": accuracy, "linear 100%": accuracy + 0.1, "knn 10%": accuracy},
        "chosen": {},
        "seconds": {"training": 10.0, "around": 2.0, "probe": 1.0, "finetune": 0.0},
        "machine": {"processor": "abacus"},
    }
    if reward is not None:
        result |= {
            "reward_of": {"fixed": {"0": -1.0, "400": -2.0}, "best_per_image": -0.75},
            "timestep": {"mean": 0.0, "deviation": 0.0},
        }
    plan.result_path(arm, seed).write_text(json.dumps(result), encoding="utf-8")


@pytest.fixture
def filled(tmp_path: Path) -> Plan:
    """Fixed timesteps whose best one differs between seeds, random, and a bandit above both."""
    plan = make_plan(tmp_path / "out")
    save_plan(plan)
    for seed in range(4):
        best = 0 if seed < 3 else 400
        for timestep in (0, 400, 800):
            reward = (-0.5 if timestep == best else -1.0) - 0.01 * seed
            write_result(plan, f"fixed-{timestep}", seed, reward, 0.6 + timestep / 8000)
        write_result(plan, "random", seed, -2.0 - 0.01 * seed, 0.4)
        write_result(plan, "ucb", seed, -0.3 - 0.01 * seed, 0.7 + 0.01 * seed)
        write_result(plan, "untrained", seed, None, 0.3)
    return plan


def test_trimmed_means_and_wins_are_those_of_rliable_on_every_resample() -> None:
    generator = np.random.default_rng(0)
    scores, others = generator.normal(size=(6, 5, 3)), generator.normal(0.3, 1, size=(6, 4, 3))
    others[0, 0] = scores[0, 0]  # ties
    assert trimmed_means(scores.reshape(6, -1)) == pytest.approx(
        [metrics.aggregate_iqm(one) for one in scores]
    )
    for one, two in zip(scores, others, strict=True):
        assert wins(one, two).mean() == pytest.approx(metrics.probability_of_improvement(one, two))


def test_bootstrap_intervals_are_the_quantiles_over_all_possible_resamples() -> None:
    scores, others = np.array([0.1, 0.2, 0.9, 0.4]), np.array([0.15, 0.3, 0.35, 0.05])
    draws = [list(rows) for rows in itertools.product(range(4), repeat=4)]
    means = [metrics.aggregate_iqm(scores[rows][:, None]) for rows in draws]
    found = interquartile_mean(scores)
    assert found.value == pytest.approx(metrics.aggregate_iqm(scores[:, None]))
    exact = np.quantile(means, [0.025, 0.975])
    assert [found.low, found.high] == pytest.approx(exact, abs=0.02)
    better = wins(scores[:, None], others[:, None])
    pairs = [better[np.ix_(one, two)].mean() for one in draws for two in draws[::5]]
    improvement = probability_of_improvement(scores, others)
    exact = np.quantile(pairs, [0.025, 0.975])
    assert [improvement.low, improvement.high] == pytest.approx(exact, abs=0.07)


def test_tasks_of_one_run_are_resampled_together() -> None:
    """Twice the same task tells no more than once; resampled apart it would."""
    scores = np.random.default_rng(1).normal(size=8)
    once, twice = interquartile_mean(scores), interquartile_mean(np.stack([scores, scores], 1))
    assert (once.low, once.high) == pytest.approx((twice.low, twice.high))


def test_paired_differences_have_the_t_interval_of_scipy() -> None:
    from scipy import stats

    values, others = [0.5, 0.7, 0.65, 0.9], [0.4, 0.75, 0.5, 0.6]
    found = paired_difference(values, others)
    expected = stats.ttest_rel(values, others).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert np.isnan(paired_difference([1.0], [0.5]).low)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 0.3, "beats"),
        (-0.3, -0.1, "below"),
        (-0.04, 0.1, "reaches"),
        (-0.06, 0.1, "open"),
        (np.nan, np.nan, "open"),
    ],
)
def test_a_verdict_needs_an_interval_that_tells(low: float, high: float, word: str) -> None:
    assert verdict(Estimate(0.0, low, high, 5), margin=0.05) == word


def test_the_best_fixed_timestep_is_chosen_per_seed_and_costs_the_sweep(filled: Plan) -> None:
    summary = summarize(filled)
    assert summary.chosen == {0: 0, 1: 0, 2: 0, 3: 400}
    best = summary.runs["best-fixed"]
    assert best.scores("reward") == pytest.approx([-0.5, -0.51, -0.52, -0.53])
    assert best.scores("linear 10%") == pytest.approx([0.6, 0.6, 0.6, 0.65])
    assert summary.cost("best-fixed") == 3 * 1100
    assert summary.sweep_cost is not None
    assert summary.cost("ucb") / summary.sweep_cost == pytest.approx(1 / 3)
    difference = summary.difference("ucb", "best-fixed", "reward")
    assert difference is not None and difference.value == pytest.approx(0.2)
    assert summary.verdict("ucb", "reward") == "beats"
    assert summary.margin("reward") == pytest.approx(0.1 * 0.515)


def test_a_seed_with_an_incomplete_sweep_has_no_best_fixed_timestep(filled: Plan) -> None:
    filled.result_path("fixed-800", 1).unlink()
    assert sorted(summarize(filled).chosen) == [0, 2, 3]
    for seed in (0, 2, 3):
        filled.result_path("fixed-800", seed).unlink()
    summary = summarize(filled)
    assert not summary.chosen and "no best fixed t" in markdown(summary)


def test_arms_without_a_reward_are_compared_by_accuracy_alone(filled: Plan) -> None:
    summary = summarize(filled)
    assert summary.estimate("untrained", "reward") is None
    assert summary.improvement("untrained", "random", ["reward"]) is None
    worse = summary.improvement("untrained", "random", summary.stage_two)
    assert worse is not None and worse.value == 0.0
    gain = summary.gain("ucb", summary.stage_two)
    assert gain is not None and gain.value == pytest.approx(0.315)


def test_the_report_holds_every_run_and_answers_the_question(filled: Plan) -> None:
    summary = summarize(filled)
    text = markdown(summary)
    row = next(line for line in text.splitlines() if line.startswith("| UCB | 33.3%"))
    assert "**beats** +0.200 [+0.200, +0.200]" in row
    rows = list(csv.DictReader(spreadsheet(summary).splitlines()))
    assert len(rows) == 24
    one = next(row for row in rows if row["arm"] == "ucb" and row["seed"] == "2")
    assert float(one["reward"]) == pytest.approx(-0.32)
    assert int(one["teacher_evaluations_training"]) == 1000


def test_what_a_cache_spared_a_run_counts_and_other_machines_are_told(filled: Plan) -> None:
    """UCB came after all others: with a shared cache its own images through the teacher are few."""
    before = summarize(filled).cost("ucb")
    for seed in range(4):
        path = filled.result_path("ucb", seed)
        result = json.loads(path.read_text(encoding="utf-8"))
        result["teacher_evaluations"] |= {"training": 30, "cached": 970}
        result["machine"] = {"processor": "slide rule"}
        path.write_text(json.dumps(result), encoding="utf-8")
    summary = summarize(filled)
    assert summary.cost("ucb") == before
    assert "2 kinds of machine in all" in markdown(summary)
    rows = csv.DictReader(spreadsheet(summary).splitlines())
    row = next(row for row in rows if row["arm"] == "ucb")
    parts = ("setup", "training", "cached")
    assert [row[f"teacher_evaluations_{part}"] for part in parts] == ["100", "30", "970"]


def test_own_arms_and_patterns_choose_what_they_say() -> None:
    known = shipped_arms(load_config("debug", GRID))
    assert list(chosen_arms(known, ["fixed-4*", "simple"])) == ["fixed-400", "random", "annealed"]
    arm = own_arm("wide={command: train_reinforce, reinforce.hidden: [128], label: wider}")
    assert (arm.label, arm.group, arm.overrides) == ("wider", "rl", {"reinforce.hidden": [128]})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arms", "thomson"], "there is no arm 'thomson'. Did you mean 'thompson'?"),
        (["--arm", "x={command: train_reinforc}"], "Did you mean 'train_reinforce'?"),
        (["--arm", "x={reinforce.baselin: value}"], "arm 'x': reinforce.baselin"),
        (["--arms", "random", "--labels", "110%"], "--labels: '110%' given"),
        (["--arms", "random", "--seeds", "0"], "--seeds: '0' given"),
        (["--arms", "random", "--finetune.stepz", "3"], "Did you mean 'steps'?"),
        (["--arms", "random", "--run.decision", "3"], "there is no such option"),
        (["--arms", "dqn", "--env.action", "continuous"], "arm 'dqn'"),
        (["--arm", "x={command: train_control, arguments: --method simcr}"], "'simclr'?"),
        (["--report"], "holds no comparison"),
        (["--arms", ","], "--arms: no arm is named"),
        (["--arm", "random={command: train_bandit}"], "--arm random: that name is taken"),
        (["--arm", "best-fixed={}"], "--arm best-fixed: that name is taken"),
        (["--arm", "rl={}"], "--arm rl: that name is taken"),
        (["--arm", "x={group: fixed}"], "--arm x: there is no group 'fixed'"),
        (["--arm", "x={arguments: 5}"], "arguments: '5' given; train_reinforce has of its own"),
        (["--arms", "random", "--finetune.steps", "["], "--finetune.steps: '[' is not valid YAML"),
        (["--arms", "random", "--seeds", "\N{SUPERSCRIPT TWO}"], "must be a whole number from 1"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compare.main(["--config", "debug", "--out", str(out), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_takes_further_arms_but_no_other_settings(tmp_path: Path) -> None:
    from agents.comparison.plan import extended

    old = make_plan(tmp_path, "random,ucb")
    save_plan(old)
    assert load_plan(tmp_path) == old
    both = extended(old, make_plan(tmp_path, "fixed-400", seeds=2))
    assert (list(both.arms), both.seeds) == (["random", "ucb", "fixed-400"], 4)
    changed = load_config("debug", GRID | {"run.decisions": 1600})
    with pytest.raises(ConfigError, match=r"run\.decisions 800, not 1600"):
        extended(old, Plan(tmp_path, "debug", changed, {}, 4, old.labels, 2, None))


def test_a_report_without_results_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(make_plan(tmp_path))
    assert compare.main(["--out", str(tmp_path), "--report"]) == 2
    assert "holds no result yet" in capsys.readouterr().err


def test_jobs_go_seed_by_seed_with_the_long_ones_first(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "random,simclr,untrained", seeds=2)
    save_plan(plan)
    write_result(plan, "simclr", 1, None, 0.5)
    order = [(job["seed"], job["arm"]["name"]) for job in plan.jobs()]
    assert order == [
        (0, "simclr"),
        (0, "random"),
        (0, "untrained"),
        (1, "random"),
        (1, "untrained"),
    ]


def work(job: str) -> Any:
    """Runs in a worker process."""
    if job == "raise":
        raise ValueError("no such luck")
    if job == "die":
        os._exit(7)
    if job == "wait":
        time.sleep(60)
    return os.getpid(), os.environ["OMP_NUM_THREADS"]


@pytest.mark.slow
def test_workers_are_reused_and_a_failure_or_death_costs_one_job_alone() -> None:
    jobs = ["first", "raise", "second", "die", "third"]
    found = {outcome.job: outcome for outcome in run_jobs(work, jobs, 1)}
    assert [found[job].state for job in jobs] == [DONE, FAILED, DONE, FAILED, DONE]
    assert found["first"].value[0] == found["second"].value[0] != os.getpid()
    assert found["first"].value[0] != found["third"].value[0]
    assert found["third"].value[1] == "1"
    assert found["raise"].value == "ValueError: no such luck"
    assert "exit code 7" in found["die"].value


@pytest.mark.slow
def test_a_worker_that_died_while_it_waited_costs_the_next_job_alone() -> None:
    states = {}
    for outcome in run_jobs(work, ["first", "second", "third"], 1):
        states[outcome.job] = outcome.state
        if outcome.job == "first":  # it waits for the next job, which is handed out after this
            os.kill(outcome.value[0], signal.SIGKILL)
            time.sleep(0.5)  # until its end of the pipe is closed
    assert states == {"first": DONE, "second": FAILED, "third": DONE}


@pytest.mark.slow
def test_an_interruption_stops_running_jobs_and_starts_no_others() -> None:
    def interrupt(job: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    started = time.monotonic()
    outcomes = list(run_jobs(work, ["wait", "never"], 1, started=interrupt))
    assert [(outcome.job, outcome.state) for outcome in outcomes] == [("wait", STOPPED)]
    assert time.monotonic() - started < 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_comparison_runs_reports_failures_and_goes_on_where_it_was(
    tmp_path: Path,
    experiment: Callable[..., Path],
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = experiment(**{"run.decisions": 16, "evaluation.images": 8, "timesteps.count": 2})
    out = tmp_path / "out"
    arguments = ["--config", str(config), "--out", str(out), "--seeds", "1", "--jobs", "1"]
    arguments += ["--labels", "50%", "100%", "--draws", "1", "--finetune.steps", "2"]
    bad = "bad={command: train_reinforce, optimizer.learning_rate: 1.0e+30}"
    bad = bad[:-1] + ", optimizer.nonfinite_patience: 1, optimizer.gradient_clip: 0.0}"
    assert compare.main([*arguments, "--arms", "fixed,untrained", "--arm", bad]) == 1
    assert "bad, seed 0: FAILED" in capsys.readouterr().err
    result = json.loads((out / "results" / "fixed-0--seed-0.json").read_text(encoding="utf-8"))
    summary = json.loads((out / "runs/fixed-0/seed-0/summary.json").read_text(encoding="utf-8"))
    assert result["reward"] == summary["reward"]["learned"]
    assert result["teacher_evaluations"] == summary["teacher_evaluations"]
    tasks = [f"{kind} {text}" for kind in ("linear", "knn", "finetune") for text in ("50%", "100%")]
    assert sorted(result["accuracy"]) == sorted(tasks)
    assert "## Failed runs" in (out / "table.md").read_text(encoding="utf-8")
    assert (out / "arms.png").read_bytes()[:4] == b"\x89PNG"

    before = (out / "results" / "fixed-0--seed-0.json").stat().st_mtime_ns
    assert compare.main(["--out", str(out)]) == 1  # tries the failed one again, keeps the others
    assert (out / "results" / "fixed-0--seed-0.json").stat().st_mtime_ns == before


def test_an_arm_survives_being_written_and_read() -> None:
    arm = Arm("x", "X", "train_sb3", "rl", {"sb3.algo": "dqn"}, ("--a", "b"), timestep=None)
    assert Arm.from_dict(json.loads(json.dumps(arm.as_dict()))) == arm
