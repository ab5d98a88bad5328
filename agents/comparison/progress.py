"""Following the jobs of a comparison: what is done, what failed, how long it will take."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from agents.comparison.engines import run_on
from agents.comparison.headline import headline_of_result
from agents.comparison.jobs import run_job
from agents.comparison.places import Places
from agents.comparison.plan import Plan
from agents.comparison.workers import DONE, FAILED
from repfusion_env.atomic import write_text
from repfusion_env.metric_names import metric_text
from repfusion_env.progress import Progress


def follow(plan: Plan, jobs: Sequence[dict[str, Any]], places: Places) -> list[str]:
    """Run the jobs where ``places`` says, show how far they are, and record failures.

    Returns:
        The state of each job that began, in the order of their ends.
    """
    total = len(plan.arms) * plan.seeds
    before = total - len(jobs)
    states: list[str] = []
    failed = 0
    started: dict[tuple[str, int], float] = {}

    def note_start(job: dict[str, Any]) -> None:
        started[_key(job)] = time.monotonic()

    with Progress(total, "runs", description="compare", initial=before) as progress:
        for outcome in run_on(run_job, jobs, places, plan.folder, started=note_start):
            states.append(outcome.state)
            name, seed = _key(outcome.job)
            spent = time.monotonic() - started[name, seed]
            if outcome.state == DONE:
                plan.failure_path(name, seed).unlink(missing_ok=True)
                _say(f"{name}, seed {seed}: {_found(outcome.value)} ({spent:.0f} s)")
            elif outcome.state == FAILED:
                failed += 1
                text = json.dumps({"error": str(outcome.value)}, ensure_ascii=False) + "\n"
                write_text(plan.failure_path(name, seed), text)
                _say(f"{name}, seed {seed}: FAILED: {outcome.value}")
            done = before + sum(state == DONE for state in states)
            progress.update(done, failed=failed)
    return states


def _key(job: dict[str, Any]) -> tuple[str, int]:
    return job["arm"]["name"], int(job["seed"])


def _found(result: dict[str, Any]) -> str:
    """A result in a few words."""
    reward = "" if result["reward"] is None else f"reward {result['reward']:.3f}, "
    headline = headline_of_result(result)
    kind = "linear" if headline.name == "accuracy" else "head"
    values = [
        metric_text(value, percent=headline.percent).replace(" %", "%")
        for task, value in result[headline.name].items()
        if task.startswith(kind)
    ]
    named = "linear probe" if kind == "linear" else f"{headline.text} on frozen features"
    return f"{reward}{named} {' / '.join(values) or 'not measured'}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
