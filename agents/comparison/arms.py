"""What is compared: each arm is a training command with options.

To add one of your own, no line here is needed: ``--arm NAME='{command: train_reinforce, key:
value}'``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import ConfigError, check, merge, parse_yaml, to_dict
from repfusion_env.registry import did_you_mean

# No student: classifiers of pixels on the teacher's own features.
PIXEL_PROBE = "pixel_probe"

COMMANDS: dict[str, str] = {
    "train_reinforce": "agents.train_reinforce",
    "train_sb3": "agents.train_sb3",
    "train_bandit": "agents.train_bandit",
    "train_control": "agents.train_control",
    "none": "",  # the student as it is born
    PIXEL_PROBE: "",
}

# By name: what stands above a group's arms in tables. Learned groups choose by what they see.
GROUPS: dict[str, str] = {
    "reference": "References",
    "fixed": "Fixed timestep (the sweep)",
    "simple": "Policies that do not learn",
    "bandit": "Bandits",
    "rl": "Reinforcement learning",
    "labels": "Labels reach the backbone",
    "self": "Self-supervised",
    "own": "Own arms",
}
LEARNED = ("bandit", "rl")
BEST_FIXED = "best-fixed"
RANDOM = "random"


@dataclass(frozen=True)
class Arm:
    """One way to train a student.

    Attributes:
        name: Of its folder and on the command line.
        label: In tables and figures.
        command: Key of :data:`COMMANDS`.
        overrides: Configuration keys, dotted, laid over the comparison's configuration.
        arguments: Further words of the command line.
        group: Key of :data:`GROUPS`.
        note: What a reader must know of it.
        effort: Seconds relative to a REINFORCE run, roughly; long ones begin first.
        timestep: Of a fixed arm.
    """

    name: str
    label: str
    command: str
    group: str
    overrides: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    note: str = ""
    effort: float = 1.0
    timestep: int | None = None

    @property
    def learned(self) -> bool:
        """Whether it is a policy that learns from rewards."""
        return self.group in LEARNED

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; :meth:`from_dict` reads it back."""
        return asdict(self) | {"arguments": list(self.arguments)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Arm:
        """From :meth:`as_dict`."""
        return cls(**(values | {"arguments": tuple(values["arguments"])}))


def shipped_arms(config: ExperimentConfig) -> dict[str, Arm]:
    """All arms under a configuration, by name; the sweep is one for each timestep of its grid."""
    grid = config.timesteps.grid()
    seen = min(grid, key=lambda timestep: abs(timestep - config.observation.timestep))
    arms = [
        Arm(
            "untrained",
            "untrained",
            "none",
            "reference",
            note="initial weights; fine-tuned, it is supervised learning with so many labels",
            effort=0.1,
        ),
        Arm(
            "supervised",
            "supervised",
            "train_control",
            "reference",
            arguments=("--method", "supervised"),
            note="no teacher; all labels in stage 1, whatever stage 2 is given",
            effort=0.6,
        ),
        *(
            Arm(
                f"fixed-{timestep}",
                f"fixed t = {timestep}",
                "train_bandit",
                "fixed",
                {"bandit.algo": "fixed", "bandit.timestep": timestep},
                timestep=timestep,
            )
            for timestep in grid
        ),
        _bandit(RANDOM, "random t", "simple"),
        _bandit(
            "annealed", "annealed t", "simple",
            note="from the grid's highest to its lowest, where it is judged",
        ),
        _bandit("epsilon_greedy", "epsilon-greedy", "bandit"),
        _bandit("ucb", "UCB", "bandit"),
        _bandit("thompson", "Thompson", "bandit"),
        _bandit("linear", "linear contextual", "bandit", effort=1.1),
        *(
            _reinforce(f"reinforce-{baseline}", f"REINFORCE, {baseline}", "rl", baseline)
            for baseline in ("none", "batch", "value")
        ),
        _reinforce(
            "reinforce-group", "REINFORCE, group", "rl", "group", {"env.group_size": 4},
            note="4 lanes hold the same image, so a step has a quarter as many different ones",
        ),
        *(
            Arm(algo, algo.upper(), "train_sb3", "rl", {"sb3.algo": algo}, effort=effort)
            for algo, effort in (("ppo", 1.3), ("a2c", 1.2), ("dqn", 1.2))
        ),
        _reinforce(
            "supervised-distillation", "supervised distillation", "labels", "batch",
            {"distillation.task_weight": 1.0},
            note="REINFORCE; the labels' loss reaches the backbone too",
        ),
        Arm(
            "simclr",
            "SimCLR",
            "train_control",
            "self",
            arguments=("--method", "simclr"),
            note="no teacher, no labels",
            effort=1.5,
        ),
        Arm(
            "joint",
            "SimCLR + distillation",
            "train_bandit",
            "self",
            {"bandit.algo": "fixed", "bandit.timestep": seen, "contrastive.weight": 1.0},
            note=f"label-free; fixed t = {seen}",
            effort=1.7,
        ),
    ]  # fmt: skip
    if config.task == "segmentation":
        place = next(i for i, arm in enumerate(arms) if arm.group != "reference")
        arms.insert(place, _pixel_probe())
    return {arm.name: arm for arm in arms}


def _pixel_probe() -> Arm:
    return Arm(
        "pixel-probe",
        "pixel probe",
        PIXEL_PROBE,
        "reference",
        note="no student: classifiers of single pixels on the teacher's features (DatasetDDPM), "
        "where 50 images or fewer are labelled",
        effort=2.0,
    )


def _bandit(name: str, label: str, group: str, *, note: str = "", effort: float = 1.0) -> Arm:
    overrides = {"bandit.algo": name}
    return Arm(name, label, "train_bandit", group, overrides, note=note, effort=effort)


def _reinforce(
    name: str,
    label: str,
    group: str,
    baseline: str,
    further: dict[str, Any] | None = None,
    *,
    note: str = "",
) -> Arm:
    overrides = {"reinforce.baseline": baseline, **(further or {})}
    return Arm(name, label, "train_reinforce", group, overrides, note=note)


def own_arm(text: str, known: Collection[str] = ()) -> Arm:
    """An arm from ``NAME={command: train_reinforce, key: value, ...}``.

    ``label``, ``group``, ``note`` and ``arguments`` (a list of words) are the arm's; all other keys
    are the configuration's.

    Args:
        text: As given.
        known: Names that are taken, beside those of groups and of the best fixed timestep.

    Raises:
        ConfigError: It cannot be read, its name is taken, or it names no command or group.
    """
    name, equals, rest = text.partition("=")
    name = name.strip()
    if not equals or not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ConfigError(
            [f"--arm: '{text}' given; write NAME='{{command: train_reinforce, key: value}}', the "
             "name of letters, digits, '_', '-' and '.'"]
        )  # fmt: skip
    if name in (BEST_FIXED, *GROUPS, *known):
        raise ConfigError([f"--arm {name}: that name is taken; choose another one"])
    try:
        values = parse_yaml(rest)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError([f"--arm {name}: '{rest}' is no mapping like {{command: train_sb3}}"])
    values = {str(key): value for key, value in values.items()}
    command = str(values.pop("command", "train_reinforce"))
    group = str(values.pop("group", "rl" if command in ("train_reinforce", "train_sb3") else "own"))
    # The sweep is over the grid: a further arm in it would be chosen as a best fixed timestep.
    groups = [key for key in GROUPS if key != "fixed"]
    problems = [
        f"--arm {name}: there is no {what} '{given}'.{did_you_mean(given, table)} "
        f"Allowed: {', '.join(table)}"
        for what, given, table in (("command", command, COMMANDS), ("group", group, groups))
        if given not in table
    ]
    if problems:
        raise ConfigError(problems)
    words = values.pop("arguments", [])
    words = words if isinstance(words, list) else str(words).split()
    return Arm(
        name,
        str(values.pop("label", name)),
        command,
        group,
        note=str(values.pop("note", "")),
        arguments=tuple(map(str, words)),
        overrides=values,
    )


def chosen_arms(known: dict[str, Arm], wanted: Sequence[str]) -> dict[str, Arm]:
    """The arms called ``wanted``: names, groups, or patterns such as ``fixed-*``.

    Raises:
        ConfigError: Something is neither.
    """
    names: list[str] = []
    problems = [] if wanted else ["--arms: no arm is named; give names, groups or patterns"]
    for word in wanted:
        found = [name for name, arm in known.items() if arm.group == word]
        found = [word] if word in known else found or fnmatch.filter(known, word)
        if not found:
            allowed = [*(name for name, arm in known.items() if arm.group != "fixed"), *GROUPS]
            hint = did_you_mean(word, [*known, *GROUPS])
            problems.append(
                f"--arms: there is no arm '{word}'.{hint} Allowed: {', '.join(allowed)}, fixed-<t> "
                "for a t of the grid, or a pattern like 'reinforce-*'"
            )
        names += found
    if problems:
        raise ConfigError(problems)
    return {name: arm for name, arm in known.items() if name in names}


def arm_config(config: ExperimentConfig, arm: Arm) -> ExperimentConfig:
    """The configuration of one arm's runs; raises :class:`ConfigError` where it does not fit."""
    try:
        return check(merge(to_dict(config), arm.overrides))
    except ConfigError as error:
        raise ConfigError([f"arm '{arm.name}': {text}" for text in error.problems]) from None
