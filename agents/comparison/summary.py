"""From single results to what they say together.

Shape letters: n seeds, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.comparison.arms import BEST_FIXED, RANDOM, Arm
from agents.comparison.headline import Headline, headline_of_result
from agents.comparison.plan import Plan
from agents.comparison.statistics import (
    Estimate,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
    verdict,
)

REWARD = "reward"
# A learned arm reaches the best fixed timestep where it can lose no more than this: of rewards and
# of errors, as a part of the best fixed's own; of accuracies, mIoU and mAP, in points.
OWN_PART, POINTS = 0.1, 0.01

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Runs:
    """The runs of one arm.

    Attributes:
        arm: The arm.
        values: Reward and the headline metric by seed, then task; what was not measured is not in
            it.
        evaluations: Images through the teacher by seed, set-up and training.
        seconds: By seed, then part (``training``, ``around``, ``probe``, ``finetune``).
        timesteps: Mean and deviation of the chosen ones by seed, where there are any.
        headroom: By seed, what the best timestep for each held-out image would earn above the best
            one for all on the student of this run.
    """

    arm: Arm
    values: dict[int, dict[str, float]]
    evaluations: dict[int, int]
    seconds: dict[int, dict[str, float]]
    timesteps: dict[int, dict[str, float]]
    headroom: dict[int, float]

    def scores(self, task: str, seeds: Sequence[int] | None = None) -> list[float]:
        """Of the runs that have the task, by rising seed."""
        kept = sorted(self.values) if seeds is None else seeds
        return [self.values[seed][task] for seed in kept if task in self.values[seed]]

    def table(self, tasks: Sequence[str]) -> np.ndarray:
        """(n, T) of the runs that have all ``tasks``."""
        rows = [
            [run[task] for task in tasks]
            for _, run in sorted(self.values.items())
            if all(task in run for task in tasks)
        ]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(tasks))


@dataclass(frozen=True)
class Summary:
    """All that is reported.

    Attributes:
        plan: What was to be compared.
        tasks: What was measured, the reward first.
        headline: The metric of all but the reward.
        runs: By arm; the best fixed one among them where there is a whole sweep.
        chosen: The best fixed timestep by seed.
        sweep_cost: Images through the teacher in one whole sweep, mean over seeds; None without.
        failures: By arm and seed.
        machine: Of the last result; ``kinds``: how many different ones there are.
    """

    plan: Plan
    tasks: tuple[str, ...]
    headline: Headline
    runs: dict[str, Runs]
    chosen: dict[int, int]
    sweep_cost: float | None
    failures: dict[tuple[str, int], str]
    machine: dict[str, Any]

    def estimate(self, arm: str, task: str) -> Estimate | None:
        """Interquartile mean of a task; None where the arm does not have it."""
        scores = self.runs[arm].scores(task)
        return interquartile_mean(np.array(scores)) if scores else None

    def gain(self, arm: str, tasks: Sequence[str]) -> Estimate | None:
        """Interquartile mean over runs and tasks of what an arm is better than random timesteps.

        Than the mean of random's runs in each task, as tasks with more labels would otherwise lie
        in the outer quarters whatever the arm.
        """
        if RANDOM not in self.runs or not tasks:
            return None
        scores, random = self.runs[arm].table(tasks), self.runs[RANDOM].table(tasks)
        if not len(scores) or not len(random):
            return None
        signs = np.array([self.sign(task) for task in tasks])
        return interquartile_mean(signs * (scores - random.mean(axis=0)))

    def difference(self, arm: str, other: str, task: str) -> Estimate | None:
        """Paired difference of two arms over the seeds that both have; None where there is none.

        In the task's own sense: of an error a negative one is good.
        """
        if other not in self.runs:
            return None
        one, two = self.runs[arm].values, self.runs[other].values
        seeds = [s for s in sorted(one.keys() & two.keys()) if task in one[s] and task in two[s]]
        if not seeds:
            return None
        return paired_difference([one[s][task] for s in seeds], [two[s][task] for s in seeds])

    def improvement(self, arm: str, other: str, tasks: Sequence[str]) -> Estimate | None:
        """Probability that a run of ``arm`` is better than one of ``other``."""
        if other not in self.runs or not tasks:
            return None
        signs = np.array([self.sign(task) for task in tasks])
        one, two = (signs * self.runs[name].table(tasks) for name in (arm, other))
        return probability_of_improvement(one, two) if len(one) and len(two) else None

    def verdict(self, arm: str, task: str) -> str | None:
        """Whether a policy reaches the best fixed timestep; see :func:`statistics.verdict`."""
        found = self.difference(arm, BEST_FIXED, task)
        if found is None:
            return None
        if self.sign(task) < 0:
            found = Estimate(-found.value, -found.high, -found.low, found.runs)
        return verdict(found, self.margin(task))

    def sign(self, task: str) -> float:
        """Times which a higher value of the task is a better one."""
        return 1.0 if task == REWARD else self.headline.sign

    def scale(self, task: str) -> float:
        """From a value of the task to what is shown."""
        return 1.0 if task == REWARD else self.headline.scale

    def margin(self, task: str) -> float:
        """The most that a policy may lose and still reach the best fixed timestep."""
        if task != REWARD and self.headline.higher_is_better and self.headline.percent:
            return POINTS
        scores = self.runs[BEST_FIXED].scores(task) if BEST_FIXED in self.runs else []
        if not scores:
            return 0.0
        # Of the task loss itself: what is gained over random may be large only because some
        # timesteps are ruinous, and would excuse any policy that avoids these.
        return OWN_PART * abs(float(np.mean(scores)))

    def cost(self, arm: str) -> float:
        """Images through the teacher in one run, mean over seeds."""
        return float(np.mean(list(self.runs[arm].evaluations.values())))

    def time(self, arm: str, *parts: str) -> float:
        """Seconds of one run in ``parts``, mean over seeds."""
        spent = self.runs[arm].seconds.values()
        return float(np.mean([sum(run.get(part, 0.0) for part in parts) for run in spent]))

    @property
    def stage_two(self) -> tuple[str, ...]:
        """The tasks of a head on frozen features or of fine-tuning."""
        return tuple(t for t in self.tasks if t.startswith(("linear", "head", "finetune")))

    @property
    def shown(self) -> list[str]:
        """The arms but for the single fixed timesteps, which have a table of their own."""
        return [name for name, runs in self.runs.items() if runs.arm.group != "fixed"]

    @property
    def learned(self) -> list[str]:
        """The policies that learn."""
        return [name for name, runs in self.runs.items() if runs.arm.learned]

    @property
    def sweep(self) -> list[str]:
        """The fixed arms by rising timestep."""
        fixed = [name for name, runs in self.runs.items() if runs.arm.group == "fixed"]
        return sorted(fixed, key=lambda name: self.runs[name].arm.timestep or 0)


def summarize(plan: Plan) -> Summary:
    """Read a comparison's results.

    The best fixed timestep is chosen for each seed by held-out reward, in hindsight; its runs cost
    what the whole sweep costs. Seeds whose sweep is not complete have none.
    """
    results = plan.results()
    runs = {}
    for name, arm in plan.arms.items():
        found = {seed: results[name, seed] for seed in range(plan.seeds) if (name, seed) in results}
        if found:
            runs[name] = _runs(arm, found)
    planned = [name for name, arm in plan.arms.items() if arm.group == "fixed"]
    chosen: dict[int, int] = {}
    sweep_cost = None
    best = _best_fixed(planned, runs)
    if best is not None:
        chosen, best_runs = best
        sweep_cost = float(np.mean(list(best_runs.evaluations.values())))
        # It stands before the policies, after the other references.
        place = sum(1 for item in runs.values() if item.arm.group == "reference")
        items = list(runs.items())
        runs = dict([*items[:place], (BEST_FIXED, best_runs), *items[place:]])
    names = dict.fromkeys(task for run in runs.values() for v in run.values.values() for task in v)
    last = list(results.values())[-1:] or [{"machine": {}}]
    return Summary(
        plan=plan,
        tasks=tuple(sorted(names, key=_task_order(plan.labels))),
        headline=headline_of_result(next(iter(results.values()), {})),
        runs=runs,
        chosen=chosen,
        sweep_cost=sweep_cost,
        failures=plan.failures(),
        machine=dict(last[0]["machine"]) | {"kinds": _kinds(results.values())},
    )


def _kinds(results: Iterable[Result]) -> int:
    """On how many kinds of machine runs took place."""
    keys = ("processor", "device", "torch")
    return len({tuple(result["machine"].get(key) for key in keys) for result in results})


def _runs(arm: Arm, results: Mapping[int, Result]) -> Runs:
    values, headroom = {}, {}
    for seed, result in results.items():
        reward = result["reward"]
        values[seed] = {} if reward is None else {REWARD: float(reward)}
        values[seed] |= result[headline_of_result(result).name]
        of = result.get("reward_of") or {}
        if of.get("fixed") and of.get("best_per_image") is not None:
            headroom[seed] = float(of["best_per_image"]) - max(of["fixed"].values())
    return Runs(
        arm=arm,
        values=values,
        evaluations={
            seed: sum(result["teacher_evaluations"].values()) for seed, result in results.items()
        },
        seconds={seed: dict(result["seconds"]) for seed, result in results.items()},
        timesteps={
            seed: result["timestep"] for seed, result in results.items() if result.get("timestep")
        },
        headroom=headroom,
    )


def _best_fixed(
    planned: Sequence[str], runs: dict[str, Runs]
) -> tuple[dict[int, int], Runs] | None:
    """Timestep by seed and the runs with it, at the cost of the sweep."""
    if len(planned) < 2 or any(name not in runs for name in planned):
        return None
    sweep = [runs[name] for name in planned]
    seeds = set.intersection(*(set(run.values) for run in sweep))
    seeds = {seed for seed in seeds if all(REWARD in run.values[seed] for run in sweep)}
    if not seeds:
        return None
    best = {seed: max(sweep, key=lambda run: run.values[seed][REWARD]) for seed in sorted(seeds)}
    arm = Arm(
        BEST_FIXED,
        "best fixed t",
        "none",
        "reference",
        note="for each seed the t of the highest held-out reward, in hindsight; costs the sweep",
    )
    parts = {part for run in sweep for seconds in run.seconds.values() for part in seconds}
    combined = Runs(
        arm=arm,
        values={seed: run.values[seed] for seed, run in best.items()},
        evaluations={seed: sum(run.evaluations[seed] for run in sweep) for seed in best},
        seconds={
            seed: {part: sum(run.seconds[seed].get(part, 0.0) for run in sweep) for part in parts}
            for seed in best
        },
        timesteps={seed: run.timesteps[seed] for seed, run in best.items() if run.timesteps},
        headroom={seed: run.headroom[seed] for seed, run in best.items() if run.headroom},
    )
    return {seed: int(run.arm.timestep or 0) for seed, run in best.items()}, combined


def _task_order(labels: Sequence[str]) -> Any:
    kinds = (REWARD, "linear", "head", "finetune", "knn")

    def key(task: str) -> tuple[int, int]:
        kind, _, amount = task.partition(" ")
        place = labels.index(amount) if amount in labels else len(labels)
        return (kinds.index(kind) if kind in kinds else len(kinds), place)

    return key


def as_dict(summary: Summary) -> dict[str, Any]:
    """The summary for ``results.json``: estimates, differences, probabilities, verdicts."""

    def plain(found: Estimate | None) -> dict[str, Any] | None:
        return None if found is None else found.as_dict()

    plan = summary.plan
    better = "above" if summary.headline.higher_is_better else "below"
    arms: dict[str, Any] = {}
    for name, runs in summary.runs.items():
        tasks = [task for task in summary.tasks if runs.scores(task)]
        cost = summary.cost(name)
        arms[name] = {
            "label": runs.arm.label,
            "group": runs.arm.group,
            "note": runs.arm.note,
            "seeds": sorted(runs.values),
            "iqm": {task: plain(summary.estimate(name, task)) for task in tasks},
            "mean": {task: float(np.mean(runs.scores(task))) for task in tasks},
            f"{summary.headline.name}_{better}_random": plain(
                summary.gain(name, summary.stage_two)
            ),
            "teacher_evaluations": cost,
            "cost_of_sweep": cost / summary.sweep_cost if summary.sweep_cost else None,
            "seconds": {
                part: summary.time(name, part)
                for part in ("training", "around", "probe", "finetune")
            },
            "headroom": float(np.mean(list(runs.headroom.values()))) if runs.headroom else None,
            "difference": {
                f"to {other}": {
                    task: plain(summary.difference(name, other, task)) for task in tasks
                }
                for other in (BEST_FIXED, RANDOM)
                if other in summary.runs and other != name
            },
            "improvement": {
                f"over {other}": {
                    "reward": plain(summary.improvement(name, other, [REWARD])),
                    summary.headline.name: plain(
                        summary.improvement(name, other, summary.stage_two)
                    ),
                }
                for other in (BEST_FIXED, RANDOM)
                if other in summary.runs and other != name
            },
            "verdict": (
                {task: summary.verdict(name, task) for task in tasks} if runs.arm.learned else None
            ),
        }
    from repfusion_env.config_loading import to_dict

    return {
        "name": plan.name,
        "machine": summary.machine,
        "seeds": plan.seeds,
        "labels": list(plan.labels),
        "draws": plan.draws,
        "finetune": plan.finetune,
        "metric": summary.headline.as_dict(),
        "best_fixed": {str(seed): timestep for seed, timestep in summary.chosen.items()},
        "sweep_teacher_evaluations": summary.sweep_cost,
        "margins": {task: summary.margin(task) for task in summary.tasks},
        "arms": arms,
        "failures": {f"{arm}, seed {seed}": why for (arm, seed), why in summary.failures.items()},
        "config": to_dict(plan.config),
    }
