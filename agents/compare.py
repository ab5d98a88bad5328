"""Arms against each other over seeds: which timestep teaches best, and does choosing it pay?

    python agents/compare.py --config digits --seeds 5 --jobs 4 --out comparisons/digits
    python agents/compare.py --out comparisons/digits              # go on after Ctrl-C
    python agents/compare.py --out comparisons/digits --report     # draw again from what is there
    python agents/compare.py --config digits --seeds 2 --arms random,fixed-80,rl
    python agents/compare.py --out comparisons/digits --engine ray     # over a cluster

Every arm is a training command with options, see ``agents/comparison/arms.py``; each (arm, seed) is
a run folder of that command, probes of frozen features and fine-tuning at each number of labels,
and a result. Options beside those of ``--help`` are the configuration's, ``--key value``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from agents.command_line import INTERRUPTED, guarded, parse
from agents.comparison.arms import (
    COMMANDS,
    PIXEL_PROBE,
    Arm,
    arm_config,
    chosen_arms,
    own_arm,
    shipped_arms,
)
from agents.comparison.places import (
    PROCESSES,
    RAY,
    Places,
    cluster_places,
    local_places,
    used_devices,
)
from agents.comparison.plan import Plan, extended, held, load_plan, save_plan
from agents.sb3_algorithms import conflicts as sb3_conflicts
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import ConfigError, parse_yaml
from repfusion_env.ranks import refuse_several
from repfusion_env.registry import did_you_mean
from repfusion_env.stage2.labels import label_count
from repfusion_env.stage2.settings import ANNOTATIONS, FinetuneConfig, check_targets, with_head

PROG = "compare"
FAILED = 1
# More images than any bank has, while it is not known how many there are.
MANY = 10**12
# Hundreds are run; nothing is chosen by what is measured on the way.
FINETUNE = {"steps": 200, "batch_size": 64, "evaluations": 1}
# The session's own probe is replaced by those of stage 2; one checkpoint is enough to go on from.
LEAN = ("--evaluation.probe_images", "500", "--run.keep_checkpoints", "1")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Said as all other problems are, without the usage."""
        raise ConfigError([message.removeprefix("argument ")])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        usage="python -m agents.compare [--config FILE] [--out FOLDER] [--seeds N] [--jobs N] "
        "[--arms A,B,...] [--key value ...]",
        description="Compare ways to train a student over seeds: references, fixed timesteps, "
        "bandits, reinforcement learning, labels, self-supervision. Goes on where it was "
        "interrupted.",
        epilog="Further options are the configuration's (--run.decisions 25600), for all arms, and "
        "the fine-tuning's (--finetune.steps 200). See docs/comparison.md.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="configuration of all arms (default: digits)")
    add("--out", metavar="FOLDER", help="folder of the comparison (default: comparisons/CONFIG)")
    add("--seeds", metavar="N", help="runs of each arm, seeds 0 to N - 1 (default: 5)")
    add(
        "--jobs",
        metavar="N",
        help="runs at a time, one thread each (default: the cores; with GPUs, what --jobs-per-gpu "
        "says; on a cluster, what it has room for)",
    )
    add("--jobs-per-gpu", metavar="N", help="runs that share a GPU (default: 1)")
    add(
        "--engine",
        metavar="NAME",
        help="processes of this machine, or ray: a cluster (default: processes)",
    )
    add("--address", metavar="HOST:PORT", help="Ray's (default: one that is found, else local)")
    add("--arms", metavar="A,B,...", help="arms, groups or patterns like 'fixed-*' (default: all)")
    add(
        "--arm",
        metavar="NAME={...}",
        action="append",
        default=[],
        help="an arm of your own: NAME='{command: train_reinforce, reinforce.baseline: value}'",
    )
    add("--labels", nargs="+", metavar="L", help="labels of stage 2 (default: 1%% 10%% 100%%)")
    add(
        "--draws",
        metavar="N",
        help="labelled subsets that probes of classes are averaged over (default: 5)",
    )
    add("--no-finetune", action="store_true", help="probes only")
    add("--report", action="store_true", help="draw again from the results that are there")
    add("--list", action="store_true", help="print the arms and exit")
    return parser


def _number(name: str, text: str | None, default: int, least: int = 1) -> int:
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ConfigError([f"--{name}: '{text}' given; it must be a whole number from {least}"])
    return int(text)


def _plan(chosen: argparse.Namespace, others: list[str]) -> Plan:
    """What the command line asks for, checked whole before anything is run.

    Raises:
        ConfigError: With everything that is wrong.
    """
    name = Path(chosen.config or "digits").stem
    folder = Path(chosen.out or f"comparisons/{name}")
    old = load_plan(folder)
    settled = chosen.arms or chosen.arm or chosen.labels or chosen.draws or chosen.no_finetune
    if old is not None and not (chosen.config or others or settled):
        return _with_seeds(old, chosen)
    if chosen.report:
        raise ConfigError(
            [f"--report: '{folder}' holds no comparison" if old is None
             else "--report: it draws what is there; give --out alone"]
        )  # fmt: skip
    finetune, others = _finetuning(others, chosen.no_finetune)
    config = parse(
        ["--config", chosen.config or "digits", *LEAN, *others], prog=PROG, description=""
    ).config
    assert config is not None
    _check_finetuning(config, finetune)
    known = shipped_arms(config)
    own = [own_arm(text, known) for text in chosen.arm]
    known |= {arm.name: arm for arm in own}
    wanted = None if chosen.arms is None else [w for w in chosen.arms.split(",") if w]
    arms = known if wanted is None else chosen_arms(known, [*wanted, *(a.name for a in own)])
    _check_arms(config, arms)
    plan = Plan(
        folder=folder,
        name=name,
        config=config,
        arms=arms,
        seeds=_number("seeds", chosen.seeds, 5),
        labels=_labels(chosen.labels or ["1%", "10%", "100%"]),
        draws=_number("draws", chosen.draws, 5),
        finetune=finetune,
    )
    return plan if old is None else extended(old, plan)


def _with_seeds(plan: Plan, chosen: argparse.Namespace) -> Plan:
    """A comparison that goes on, with more seeds where they are asked for."""
    return dataclasses.replace(
        plan, seeds=max(plan.seeds, _number("seeds", chosen.seeds, plan.seeds))
    )


def _check_arms(config: ExperimentConfig, arms: dict[str, Arm]) -> None:
    """Refuse before the first run what any arm could not do."""
    problems: list[str] = []
    for arm in arms.values():
        try:
            experiment = arm_config(config, arm)
        except ConfigError as error:
            problems += error.problems
            continue
        problems += [f"arm '{arm.name}': {text}" for text in _conflicts(arm, experiment)]
    if problems:
        raise ConfigError([*problems, "--arms chooses which arms are compared"])


def _conflicts(arm: Arm, config: ExperimentConfig) -> list[str]:
    """What the arm's command says of its options."""
    if arm.command == PIXEL_PROBE and config.task != "segmentation":
        return [f"task: '{config.task}' given; command '{PIXEL_PROBE}' needs segmentation"]
    if not COMMANDS[arm.command]:
        return []
    module = importlib.import_module(COMMANDS[arm.command])
    own: dict[str, Any] = getattr(module, "OPTIONS", {})
    words = list(arm.arguments)
    given = dict(zip(words[::2], words[1::2], strict=False))
    unknown = [word for word in given if word.removeprefix("--") not in own]
    if unknown or len(words) % 2:
        allowed = ", ".join(f"--{name} VALUE" for name in own) or "none"
        return [f"arguments: '{' '.join(words)}' given; {arm.command} has of its own: {allowed}"]
    if not own:
        return list(getattr(module, "conflicts", sb3_conflicts)(config))
    settings = {name: given.get(f"--{name}", option.default) for name, option in own.items()}
    problems = [
        f"--{name}: it must be given" if settings[name] is None else f"--{name}: {problem}"
        for name, option in own.items()
        if settings[name] is None or (problem := option.check(settings[name]))
    ]
    return problems or list(module.conflicts(config, settings))


def _labels(given: Sequence[str]) -> tuple[str, ...]:
    """The numbers of labels, each once; whether there are so many is known with the data."""
    problems = []
    for text in given:
        try:
            label_count(text, MANY)
        except ValueError as error:
            problems.append(f"--{error}")
    if problems:
        raise ConfigError(problems)
    return tuple(dict.fromkeys(given))


def _finetuning(others: list[str], without: bool) -> tuple[dict[str, Any] | None, list[str]]:
    """The fine-tuning's keys, and the words that are not its."""
    keys: dict[str, Any] = dict(FINETUNE)
    rest = []
    position = 0
    while position < len(others):
        word = others[position]
        position += 1
        if not word.startswith("--finetune."):
            rest.append(word)
            continue
        key, equals, text = word.removeprefix("--finetune.").partition("=")
        if not equals:
            if position == len(others):
                raise ConfigError([f"--finetune.{key}: a value is missing"])
            text = others[position]
            position += 1
        try:
            keys[key.replace("-", "_")] = parse_yaml(text)
        except yaml.YAMLError:
            raise ConfigError([f"--finetune.{key}: '{text}' is not valid YAML"]) from None
    return None if without else _checked(keys), rest


def _checked(keys: dict[str, Any]) -> dict[str, Any]:
    known = [item.name for item in dataclasses.fields(FinetuneConfig)]
    known = [name for name in known if name not in ("labels", "seed")]
    problems = [
        f"--finetune.{key}: there is no such option.{did_you_mean(key, known)} "
        f"Allowed: {', '.join(known)}"
        for key in keys
        if key not in known
    ]
    if not problems:
        try:
            FinetuneConfig(**keys)
        except (TypeError, ValueError) as error:
            problems = [f"--finetune.{error}"]
    if problems:
        raise ConfigError(problems)
    return keys


def _check_finetuning(config: ExperimentConfig, keys: dict[str, Any] | None) -> None:
    """Refuse what the task's targets could not follow, or a head that it does not have."""
    settings = FinetuneConfig(**(keys or {}))
    annotation = ANNOTATIONS.get(config.task, "labels")
    try:
        check_targets(settings, annotation, cross_entropy=annotation == "labels")
        with_head(config, settings.head)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([f"--finetune.{error}"]) from None


def _places(chosen: argparse.Namespace, plan: Plan) -> Places:
    """Where the command line wants the runs to take place."""
    given = {
        name: None if text is None else _number(name, text, 1)
        for name, text in (("jobs", chosen.jobs), ("jobs-per-gpu", chosen.jobs_per_gpu))
    }
    jobs, per_gpu = given["jobs"], given["jobs-per-gpu"]
    engine = chosen.engine or PROCESSES
    devices = used_devices(plan.config, plan.arms.values())
    if engine == RAY:
        return cluster_places(jobs, per_gpu, devices, chosen.address)
    if engine != PROCESSES:
        allowed = (PROCESSES, RAY)
        raise ConfigError(
            [f"--engine: '{engine}' given; allowed: {' or '.join(allowed)}."
             f"{did_you_mean(engine, allowed)}"]
        )  # fmt: skip
    if chosen.address is not None:
        raise ConfigError(
            [f"--address: '{chosen.address}' given, but it is a cluster's; add --engine {RAY}"]
        )
    return local_places(jobs, per_gpu, devices)


def _run(plan: Plan, places: Places) -> int:
    """Run what is missing; returns how it ended as an exit code."""
    from agents.comparison.engines import ENGINES

    with ENGINES[places.engine].open(places), held(plan.folder):
        current = load_plan(plan.folder)
        if current is not None:  # another one may have ended since the command line was read
            plan = extended(current, plan)
        save_plan(plan)
        try:
            code = _follow(plan, places)
        except KeyboardInterrupt:  # the second one, which waits for no report either
            return _stopped(plan, places)
        _report(plan)
    return code


def _follow(plan: Plan, places: Places) -> int:
    """Run the jobs of a plan; returns how it ended."""
    from agents.comparison.progress import follow
    from agents.comparison.workers import STOPPED

    jobs = plan.jobs()
    if not jobs:
        print("every run has its result", file=sys.stderr)
        return 0
    states = follow(plan, jobs, places)
    if STOPPED in states or len(states) < len(jobs):
        return _stopped(plan, places)
    return FAILED if plan.failures() else 0


def _stopped(plan: Plan, places: Places) -> int:
    """Say how to go on; returns the exit code."""
    again = f"python -m agents.compare --out {shlex.quote(str(plan.folder))}"
    if places.engine != PROCESSES:
        again += f" --engine {places.engine}"
    if places.address is not None:
        again += f" --address {shlex.quote(places.address)}"
    print(f"stopped; finished runs stand; go on with: {again}", file=sys.stderr)
    return INTERRUPTED


def _report(plan: Plan) -> None:
    """Tables and figures of what there is."""
    if plan.results():
        from agents.comparison.report import write_report

        write_report(plan)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def run() -> int:
        chosen, others = _parser().parse_known_args(argv)
        refuse_several(PROG)
        if importlib.util.find_spec("rliable") is None:
            raise ConfigError(
                ["compare needs rliable; install it by pip install 'repfusion-env[compare]'"]
            )
        plan = _plan(chosen, others)
        if chosen.list:
            for arm in plan.arms.values():
                print(f"{arm.name:26}{arm.group:11}{arm.label}")
            return 0
        if not chosen.report:
            return _run(plan, _places(chosen, plan))
        if not plan.results():
            raise ConfigError([f"--report: '{plan.folder}' holds no result yet"])
        _report(plan)
        return 0

    return guarded(run, PROG)


if __name__ == "__main__":
    sys.exit(main())
