"""The folder of a comparison: what is compared in it, and which results are there.

OUT/comparison.json               configuration, arms, seeds, labels and fine-tuning
configs/<arm>.yaml            each arm's whole configuration
runs/<arm>/seed-<n>/          run folders, as the training commands leave them
logs/<arm>--seed-<n>.log      what a run's commands printed
results/<arm>--seed-<n>.json  what it came to; where there is one, the run is done
failures/<arm>--seed-<n>.json why it failed; the next call tries again
results.json, results.csv, table.md, *.png
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agents.comparison.arms import Arm, arm_config
from repfusion_env.atomic import write_text
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import ConfigError, check, merge, to_dict, to_yaml
from repfusion_env.folder_lock import FolderTaken, lock_folder

FILE = "comparison.json"


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        folder: The comparison's.
        name: Of the configuration file, for headings.
        config: Of all arms, before each one's own keys.
        arms: By name.
        seeds: 0, 1, ... up to this number.
        labels: Of stage 2, as given: ``"1%"`` or a count.
        draws: Random labelled subsets that a probe is averaged over.
        finetune: Keys of the fine-tuning's configuration; None: no fine-tuning.
    """

    folder: Path
    name: str
    config: ExperimentConfig
    arms: dict[str, Arm]
    seeds: int
    labels: tuple[str, ...]
    draws: int
    finetune: dict[str, Any] | None = field(default=None)

    def result_path(self, arm: str, seed: int) -> Path:
        """Where the result of one run belongs."""
        return self.folder / "results" / f"{arm}--seed-{seed}.json"

    def failure_path(self, arm: str, seed: int) -> Path:
        """Where it is said why a run failed."""
        return self.folder / "failures" / f"{arm}--seed-{seed}.json"

    def results(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What is there, by arm and seed."""
        found = {}
        for arm in self.arms:
            for seed in range(self.seeds):
                path = self.result_path(arm, seed)
                if path.is_file():
                    found[arm, seed] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def failures(self) -> dict[tuple[str, int], str]:
        """Runs without a result whose last attempt failed, and why."""
        found = {}
        for arm in self.arms:
            for seed in range(self.seeds):
                path = self.failure_path(arm, seed)
                if path.is_file() and not self.result_path(arm, seed).is_file():
                    found[arm, seed] = str(json.loads(path.read_text(encoding="utf-8"))["error"])
        return found

    def jobs(self) -> list[dict[str, Any]]:
        """The runs without a result, seed by seed, in each seed the long ones first."""
        order = sorted(self.arms.values(), key=lambda arm: -arm.effort)
        return [
            {
                "folder": str(self.folder),
                "arm": arm.as_dict(),
                "seed": seed,
                "labels": list(self.labels),
                "draws": self.draws,
                "finetune": self.finetune,
            }
            for seed in range(self.seeds)
            for arm in order
            if not self.result_path(arm.name, seed).is_file()
        ]


def save_plan(plan: Plan) -> None:
    """Write the plan and each arm's configuration into the comparison's folder.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        for name in ("configs", "logs", "runs", "results", "failures"):
            (plan.folder / name).mkdir(parents=True, exist_ok=True)
        for arm in plan.arms.values():
            overrides = {"run.folder": str(plan.folder / "runs" / arm.name)}
            config = check(merge(to_dict(arm_config(plan.config, arm)), overrides))
            write_text(plan.folder / "configs" / f"{arm.name}.yaml", to_yaml(config))
        text = json.dumps(_as_dict(plan), indent=1, ensure_ascii=False) + "\n"
        write_text(plan.folder / FILE, text)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError([f"--out: '{plan.folder}' cannot be written: {reason}"]) from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the comparison's folder and keep others from running it at the same time.

    Raises:
        ConfigError: Another process runs it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, what="comparison")
    except FolderTaken as error:
        raise ConfigError(
            [f"--out: comparison '{folder}' is being run by {error}; wait for it to end, or choose "
             "another --out"]
        ) from None  # fmt: skip
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError([f"--out: '{folder}' cannot be written: {reason}"]) from None
    try:
        yield
    finally:
        os.close(lock)


def load_plan(folder: Path) -> Plan | None:
    """The plan of a comparison's folder; None where there is none.

    Raises:
        ConfigError: Its file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Plan(
            folder=folder,
            name=str(values["name"]),
            config=check(values["config"]),
            arms={name: Arm.from_dict(arm) for name, arm in values["arms"].items()},
            seeds=int(values["seeds"]),
            labels=tuple(values["labels"]),
            draws=int(values["draws"]),
            finetune=values["finetune"],
        )
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            [f"'{path}' is damaged ({type(error).__name__}: {error}); choose another --out"]
        ) from None


def extended(old: Plan, new: Plan) -> Plan:
    """The new plan with the arms of the old one beside its own, where both can share a folder.

    Raises:
        ConfigError: Results in the folder were measured with other settings.
    """
    problems = [
        f"--out: '{old.folder}' holds a comparison with {key} {_short(before)}, not {_short(after)}"
        for key, before, after in _differences(old, new)
    ]
    if problems:
        raise ConfigError([*problems, "choose another --out, or give the same settings"])
    return replace(new, arms=old.arms | new.arms, seeds=max(old.seeds, new.seeds))


def _differences(old: Plan, new: Plan) -> list[tuple[str, Any, Any]]:
    pairs = [
        (f"{section}.{key}", value, after)
        for section, before in to_dict(old.config).items()
        for key, value, after in _entries(before, to_dict(new.config)[section])
    ]
    pairs += [("--labels", list(old.labels), list(new.labels)), ("--draws", old.draws, new.draws)]
    pairs += [("--finetune", old.finetune, new.finetune)]
    for name in old.arms.keys() & new.arms.keys():
        before, after = old.arms[name], new.arms[name]
        pairs.append((f"arm '{name}'", _essence(before), _essence(after)))
    return [(key.rstrip("."), before, after) for key, before, after in pairs if before != after]


def _entries(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict):
        return [(key, value, after.get(key)) for key, value in before.items()]
    return [("", before, after)]


def _essence(arm: Arm) -> dict[str, Any]:
    return {"command": arm.command, "arguments": list(arm.arguments), **arm.overrides}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def _as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "config": to_dict(plan.config),
        "arms": {name: arm.as_dict() for name, arm in plan.arms.items()},
        "seeds": plan.seeds,
        "labels": list(plan.labels),
        "draws": plan.draws,
        "finetune": plan.finetune,
    }
