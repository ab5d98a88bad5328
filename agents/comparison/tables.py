"""The comparison in Markdown and as rows for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

import numpy as np

from agents.comparison.arms import BEST_FIXED, GROUPS, RANDOM
from agents.comparison.statistics import Estimate
from agents.comparison.summary import REWARD, Summary

MINUS = "\N{MINUS SIGN}"
NAMES = {
    "linear": "linear probe",
    "head": "head on frozen features",
    "finetune": "fine-tuned",
    "knn": "nearest neighbours",
}


def task_name(task: str) -> str:
    """What a task is called in headings."""
    if task == REWARD:
        return "held-out reward"
    kind, _, labels = task.partition(" ")
    return f"{NAMES.get(kind, kind)}, {label_name(labels)}"


def label_name(labels: str) -> str:
    """``"1%"`` as ``1 %``, a count as it is."""
    return f"{labels[:-1]} %" if labels.endswith("%") else labels


def markdown(summary: Summary) -> str:
    """The whole report."""
    parts = [
        f"# Comparison: {summary.plan.name}",
        _facts(summary),
        *_arms(summary),
        *_question(summary),
        *_sweep(summary),
        *_improvement(summary),
        *_neighbours(summary),
        *_failures(summary),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(summary: Summary) -> str:
    plan, machine = summary.plan, summary.machine
    counts = sorted({len(runs.values) for runs in summary.runs.values()})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    budget = "no fine-tuning"
    if plan.finetune is not None:
        given = ", ".join(f"{key} {value}" for key, value in plan.finetune.items())
        budget = f"fine-tuning with {given or 'the defaults'}"
    lines = [
        f"- {_count(len(summary.shown), 'arm')}"
        + (f" and a sweep over {_count(len(summary.sweep), 'timestep')}" if summary.sweep else "")
        + f", {seeds} {'seed' if seeds == '1' else 'seeds'}, {plan.config.run.decisions:,} "
        "decisions (images seen) for each run",
        f"- {'labels' if _classes(summary) else 'labelled images'} in stage 2: "
        f"{', '.join(map(label_name, plan.labels))}; {_subsets(summary)}; "
        f"{budget}",
        "- cells: interquartile mean over seeds [95 % percentile bootstrap interval]; "
        f"{_what(summary)}",
        f"- {machine.get('processor', 'unknown processor')}, {machine.get('threads', '?')} thread "
        f"for each run, {machine.get('device', '?')}, torch {machine.get('torch', '?')}, "
        f"{machine.get('date', '')}"
        + (
            f"; {machine['kinds']} kinds of machine in all, whose seconds do not compare"
            if machine.get("kinds", 1) > 1
            else ""
        ),
    ]
    if plan.config.cache.store != "off":
        lines.append(
            "- teacher features came from a cache that runs share: images that it spared a run are "
            "counted as if they had gone through the teacher, those of the set-up excepted; "
            "seconds depend on which run came first"
        )
    if summary.chosen:
        chosen = ", ".join(str(timestep) for timestep in summary.chosen.values())
        lines.append(
            "- best fixed t: for each seed the timestep of the highest held-out reward, chosen in "
            f"hindsight from the whole sweep ({chosen}); its cost is the sweep's"
        )
    elif summary.sweep:
        lines.append("- no best fixed t: no seed has its sweep complete")
    return "\n".join(lines)


def _classes(summary: Summary) -> bool:
    return summary.headline.name == "accuracy"


def _what(summary: Summary) -> str:
    """What the numbers beside the rewards are."""
    return "accuracies in %" if _classes(summary) else summary.headline.legend


def _subsets(summary: Summary) -> str:
    """On which labelled images stage 2 is trained."""
    if _classes(summary):
        return (
            f"probes averaged over {summary.plan.draws} random labelled subsets, the same for all "
            "arms of a seed"
        )
    return (
        "heads on frozen features and fine-tuning on one random subset of the images, the same for "
        "all arms of a seed"
    )


def _arms(summary: Summary) -> list[str]:
    tasks = [REWARD, *summary.stage_two]
    heads = ["arm", *map(task_name, tasks), "images through the teacher", "seconds"]
    rows = []
    for group, heading in GROUPS.items():
        names = [name for name in summary.shown if summary.runs[name].arm.group == group]
        if names:
            rows.append([f"**{heading}**", *[""] * (len(heads) - 1)])
        for name in names:
            cells = [_cell(summary, name, task) for task in tasks]
            spent = f"{summary.time(name, 'training', 'around'):,.0f}"
            rows.append([_label(summary, name), *cells, f"{summary.cost(name):,.0f}", spent])
    notes = [
        f"- {runs.arm.label}: {runs.arm.note}"
        for runs in summary.runs.values()
        if runs.arm.note and runs.arm.group != "fixed"
    ]
    return [
        "## Arms",
        _table(heads, rows, left=1),
        "Seconds are those of stage 1 with its evaluation, mean over seeds. Images through the "
        "teacher are those of set-up and training.",
        *(["\n".join(notes)] if notes else []),
    ]


def _question(summary: Summary) -> list[str]:
    """Whether learned choice reaches the best fixed timestep, and at what cost."""
    if BEST_FIXED not in summary.runs or not summary.learned or summary.sweep_cost is None:
        return []
    tasks = [REWARD, *summary.stage_two]
    heads = ["policy", "cost, of the sweep", *map(task_name, tasks)]
    rows = []
    for name in summary.learned:
        cells = []
        for task in tasks:
            found = summary.difference(name, BEST_FIXED, task)
            word = summary.verdict(name, task)
            if word == "below" and summary.sign(task) < 0:
                word = "worse"
            told = "" if found is None else _difference(found, summary.scale(task))
            cells.append(told and f"**{word}** {told}")
        # A sweep can be free: its teacher's set-up has been cached by others.
        cost = f"{summary.cost(name) / summary.sweep_cost:.1%}" if summary.sweep_cost else ""
        rows.append([_label(summary, name), cost, *cells])
    margin = summary.margin(REWARD)
    headroom = summary.runs[BEST_FIXED].headroom
    text = [
        "## Does learned choice reach the best fixed timestep, and does it beat it?",
        "Paired differences seed by seed, learned minus best fixed, with the 95 % interval of "
        f"Student's t; {_units(summary)}. **beats**, **below**: the interval is "
        f"above or below 0{_reversed(summary)}. **reaches**: it holds 0 and no loss larger than "
        f"{margin:.3f} in reward (a tenth of the best fixed timestep's) or {_allowed(summary)}. "
        "**open**: it holds 0 and larger losses; more seeds would tell. Intervals are "
        "not corrected for the number of comparisons.",
        _table(heads, rows, left=1),
    ]
    if headroom:
        mean = float(np.mean(list(headroom.values())))
        text.append(
            "On the best fixed t's own students, the best timestep for each held-out image would "
            f"earn {_number(mean, signed=True)} in reward above the best one for all: the most "
            "that choosing per sample could add there, noise of the reward included."
        )
    return text


def _units(summary: Summary) -> str:
    if _classes(summary):
        return "accuracies in points"
    sense = "" if summary.headline.higher_is_better else ", of which fewer are better"
    return f"the others in {summary.headline.points}{sense}"


def _reversed(summary: Summary) -> str:
    """Of an error a positive difference is a loss, which the word ``below`` would hide."""
    if summary.headline.higher_is_better:
        return ""
    return f" (of {summary.headline.text} **beats**, **worse**: below or above it)"


def _allowed(summary: Summary) -> str:
    """The loss with which a policy still reaches the best fixed timestep."""
    if _classes(summary):
        return "1 point of accuracy"
    if summary.headline.higher_is_better and summary.headline.percent:
        return f"1 point of {summary.headline.text}"
    return f"a tenth of the best fixed timestep's {summary.headline.text}"


def _sweep(summary: Summary) -> list[str]:
    if not summary.sweep:
        return []
    tasks = [REWARD, *summary.stage_two]
    heads = ["t", *map(task_name, tasks), "best in"]
    rows = []
    for name in summary.sweep:
        timestep = summary.runs[name].arm.timestep
        cells = [_cell(summary, name, task) for task in tasks]
        wins = sum(chosen == timestep for chosen in summary.chosen.values())
        rows.append([str(timestep), *cells, _count(wins, "seed") if wins else ""])
    return ["## The sweep over fixed timesteps", _table(heads, rows)]


def _improvement(summary: Summary) -> list[str]:
    others = [name for name in (RANDOM, BEST_FIXED) if name in summary.runs]
    if not others:
        return []
    kinds = [("reward", [REWARD])]
    if summary.stage_two:
        kinds.append((summary.headline.text, list(summary.stage_two)))
    heads = ["arm"]
    heads += [f"{kind}, over {_label(summary, name)}" for name in others for kind, _ in kinds]
    headline = summary.headline
    side = "above" if headline.higher_is_better else "below"
    if summary.stage_two:
        unit = ", points" if headline.percent else ""
        heads.append(f"{headline.text} {side} random t{unit}")
    rows = []
    for name in summary.shown:
        cells = []
        for other in others:
            for _, tasks in kinds:
                found = None if name == other else summary.improvement(name, other, tasks)
                cells.append("" if found is None else _interval(found, "{:.2f}"))
        if summary.stage_two:
            gain = summary.gain(name, summary.stage_two)
            cells.append("" if gain is None else _difference(gain, headline.scale))
        rows.append([_label(summary, name), *cells])
    return [
        "## Probability of improvement",
        "How likely a run of the arm is better than a run of the other, [95 % percentile bootstrap "
        f"interval]; {headline.text}: mean over {_kinds(summary)} at all numbers of labels. "
        f"Last column: interquartile mean over those tasks and seeds of the {headline.text} {side} "
        "the mean of random timesteps.",
        _table(heads, rows, left=1),
    ]


def _neighbours(summary: Summary) -> list[str]:
    tasks = [task for task in summary.tasks if task.startswith("knn")]
    if not tasks:
        return []
    rows = [
        [_label(summary, name), *(_cell(summary, name, task) for task in tasks)]
        for name in summary.shown
    ]
    return ["## Nearest neighbours", _table(["arm", *map(task_name, tasks)], rows, left=1)]


def _failures(summary: Summary) -> list[str]:
    if not summary.failures:
        return []
    lines = [f"- {arm}, seed {seed}: {why}" for (arm, seed), why in summary.failures.items()]
    return ["## Failed runs", "\n".join(lines)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _label(summary: Summary, name: str) -> str:
    return summary.runs[name].arm.label


def _kinds(summary: Summary) -> str:
    """What stage 2 has measured beside nearest neighbours."""
    probes = "linear probes" if _classes(summary) else "heads on frozen features"
    return f"{probes} and fine-tuning" if summary.plan.finetune is not None else probes


def _cell(summary: Summary, name: str, task: str) -> str:
    found, scale = summary.estimate(name, task), summary.scale(task)
    if found is None:
        return ""
    return _interval(found, "{:.3f}" if scale == 1 else "{:.1f}", scale)


def _interval(found: Estimate, form: str, scale: float = 1.0) -> str:
    def text(value: float) -> str:
        return form.format(scale * value).replace("-", MINUS)

    if not np.isfinite(found.low):
        return text(found.value)
    return f"{text(found.value)} [{text(found.low)}, {text(found.high)}]"


def _difference(found: Estimate, scale: float) -> str:
    return _interval(found, "{:+.3f}" if scale == 1 else "{:+.1f}", scale)


def _number(value: float, *, signed: bool = False) -> str:
    return f"{value:+.3f}".replace("-", MINUS) if signed else f"{value:.3f}".replace("-", MINUS)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 0) -> str:
    """Markdown; the first ``left`` columns to the left, the others to the right."""
    rule = [":---" if place < left else "---:" for place in range(len(heads))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))


def spreadsheet(summary: Summary) -> str:
    """One row for each run, as CSV."""
    results = summary.plan.results()
    parts = ("training", "around", "probe", "finetune")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["arm", "group", "seed", *summary.tasks, "timestep_mean", "timestep_deviation"]
        + ["decisions"]
        + [f"teacher_evaluations_{part}" for part in ("setup", "training", "cached")]
        + [f"seconds_{part}" for part in parts]
    )
    for (name, seed), result in results.items():
        values = summary.runs[name].values[seed]
        timestep = result.get("timestep") or {}
        costs = result["teacher_evaluations"]
        writer.writerow(
            [name, summary.runs[name].arm.group, seed]
            + [values.get(task, "") for task in summary.tasks]
            + [timestep.get("mean", ""), timestep.get("deviation", ""), result["decisions"]]
            + [costs["setup"], costs["training"], costs.get("cached", 0)]
            + [round(result["seconds"].get(part, 0.0), 3) for part in parts]
        )
    return out.getvalue()
