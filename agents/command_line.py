"""The command line that the training scripts share: every key of the configuration is an option."""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from repfusion_env.command_line import INTERRUPTED, is_ours
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import (
    ConfigError,
    check,
    merge,
    options,
    read_config_file,
    sections,
)
from repfusion_env.config_options import read_options
from repfusion_env.ranks import refuse_several, say
from repfusion_env.runs import name_problem

USAGE_ERROR = 2

# By the agent's family; all other agents are those of SB3.
SCRIPTS = {
    "reinforce": "train_reinforce",
    "bandit": "train_bandit",
    "control": "train_control",
}


@dataclass(frozen=True)
class OwnOption:
    """An option that one command has beside the keys of the configuration; kept with the run.

    Attributes:
        metavar: What its value is called; ``BOOL`` may stand without one and is then true.
        help: For ``--help``.
        default: Without the option; None: it must be given.
        check: What is wrong with a value, as the end of a sentence; None where nothing is.
    """

    metavar: str
    help: str
    default: str | None
    check: Callable[[str], str | None]


@dataclass(frozen=True)
class Command:
    """What the command line asked for.

    Attributes:
        config: The checked configuration; None with ``--resume``.
        label: Name of the configuration, for the run folder.
        resume: Run folder to go on with, or None.
        settings: Values of the command's own options; empty with ``--resume``.
    """

    config: ExperimentConfig | None
    label: str
    resume: Path | None
    settings: dict[str, str] = field(default_factory=dict)


def parse(
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    default_config: str = "digits",
    aliases: dict[str, str] | None = None,
    conflicts: Callable[[ExperimentConfig], list[str]] = lambda config: [],
    hidden: Sequence[str] = (),
    own: Mapping[str, OwnOption] | None = None,
    several: bool = False,
) -> Command:
    """Read the command line and refuse at once what cannot be run.

    Args:
        argv: Arguments; default: those of the process.
        prog: Name of the command for the help.
        description: What the command does.
        default_config: Configuration without ``--config``.
        aliases: Short options for keys, e.g. ``{"algo": "sb3.algo"}``.
        conflicts: What the command itself cannot do with a configuration, a sentence each.
        hidden: Sections of the configuration that do not concern the command; its help is silent
            about them.
        own: The command's own options by name.
        several: Whether several processes may run the command together.

    Raises:
        ConfigError: With everything that is wrong, one sentence each.
        SystemExit: After ``--help``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen, others = _essentials(prog).parse_known_args(arguments)
    if chosen.help:
        base = read_config_file(chosen.config or default_config)
        name = chosen.config or default_config
        _help(prog, description, base, name, aliases or {}, hidden, own or {}).print_help()
        raise SystemExit(0)
    if not several:
        refuse_several(prog)
    if chosen.resume is not None:
        if others or chosen.config:
            raise ConfigError(
                ["--resume: a run goes on with its own configuration; give no other options"]
            )
        return Command(None, "", Path(chosen.resume))
    name = chosen.config or default_config
    problems: list[str] = []
    overrides = read_options(
        others,
        problems,
        aliases=aliases,
        own={key: item.metavar == "BOOL" for key, item in (own or {}).items()},
        known=("config", "resume", "help"),
    )
    settings = _settings(overrides, own or {}, problems)
    try:
        config = check(merge(read_config_file(name), overrides))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    problems += conflicts(config)
    taken = name_problem(config)
    if taken is not None:
        problems.append(taken)
    if problems:
        raise ConfigError(problems)
    return Command(config, _label(Path(name)), None, settings)


def guarded(main: Callable[[], int], prog: str) -> int:
    """Run a command: problems of the input end in sentences on stderr and exit code 2.

    A ValueError of any other library is a defect of ours and keeps its traceback.
    """
    try:
        return main()
    except ValueError as error:
        if not is_ours(error):
            raise
        for sentence in str(error).splitlines():
            say(f"{prog}: error: {sentence}")
        return USAGE_ERROR
    except KeyboardInterrupt:
        say("stopped before training began")
        return INTERRUPTED
    except BrokenPipeError:
        # Somebody closed our output, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def script_of(agent: str) -> str:
    """Name of the command that trains ``agent``, e.g. ``control-simclr``."""
    return SCRIPTS.get(agent.partition("-")[0], "train_sb3")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Said as all other problems are, without the usage."""
        raise ConfigError([message.removeprefix("argument ")])


def _label(config: Path) -> str:
    """What a run of ``config`` is named after; of a run's own file, what that run was."""
    try:
        about = json.loads((config.parent / "run.json").read_text(encoding="utf-8"))
        return str(about["label"])
    except (OSError, ValueError, KeyError, TypeError):
        return config.stem


def _essentials(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--resume", metavar="RUN_DIR")
    return parser


def _settings(
    overrides: dict[str, Any], own: Mapping[str, OwnOption], problems: list[str]
) -> dict[str, str]:
    """Take the command's own options out of ``overrides`` and check them."""
    settings: dict[str, str] = {}
    for name, option in own.items():
        value = overrides.pop(name, option.default)
        if value is None:
            problems.append(f"--{name}: it must be given; {option.help}")
            continue
        problem = option.check(value)
        if problem is not None:
            problems.append(f"--{name}: {problem}")
        else:
            settings[name] = value
    return settings


def _help(
    prog: str,
    description: str,
    base: dict[str, Any],
    name: str,
    aliases: dict[str, str],
    hidden: Sequence[str],
    own: Mapping[str, OwnOption],
) -> argparse.ArgumentParser:
    needed = "".join(f"--{key} {o.metavar} " for key, o in own.items() if o.default is None)
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"python -m agents.{prog} {needed}[--config FILE] [--resume RUN_DIR] "
        "[--key value ...]",
        description=description,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
        epilog=f"Defaults are those of '{name}'. A section's name alone sets its main key: "
        "--reward teacher_probe is --reward.kind teacher_probe; --precision and --channels_last "
        "are those of teacher and student alike. Lists and mappings are YAML, and "
        "replace the file's: --timesteps.values '[0, 40, 80]', --distillation.losses '{hint: 1, "
        "cosine: 2}' or --distillation.losses.hint 1 --distillation.losses.cosine 2. A BOOL "
        "without a value is true.",
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="store_true", help="show this help and exit")
    general.add_argument("--config", metavar="FILE", help=f"configuration (default: {name})")
    general.add_argument("--resume", metavar="RUN_DIR", help="go on with an interrupted run")
    for key, item in own.items():
        shown = "" if item.default is None else f" (default: {item.default})"
        text = f"{item.help}{shown}".replace("%", "%%")
        general.add_argument(f"--{key}", metavar=item.metavar, help=text)
    config = check(base)
    nested = sections()
    groups = {
        section: parser.add_argument_group(section, (kind.__doc__ or "").strip())
        for section, kind in nested.items()
        if section not in hidden
    }
    short = {key: alias for alias, key in aliases.items()}
    for path, entry, kind in options():
        section, _, key = path.rpartition(".")
        if section in hidden:
            continue
        holder = getattr(config, section) if section else config
        shown = _as_yaml(getattr(holder, key))
        text = f"{entry.metadata.get('help', '')} (default: {shown})".replace("%", "%%")
        names = [f"--{path}"] + ([f"--{short[path]}"] if path in short else [])
        group = groups[section] if section else general
        group.add_argument(*names, metavar=_metavar(kind), help=text)
    return parser


def _as_yaml(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, bool | None):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_as_yaml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_yaml(item)}" for key, item in value.items()) + "}"
    return str(value)


def _metavar(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _metavar(typing.get_args(kind)[0])
    if origin is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    if origin is tuple:
        return "LIST"
    if origin is dict:
        return "MAPPING"
    if origin is None:
        return {int: "INT", float: "NUMBER", bool: "BOOL", str: "TEXT"}.get(kind, "VALUE")
    return next(_metavar(part) for part in typing.get_args(kind) if part is not type(None))
