"""Keys of the configuration as options of a command: ``--key value`` and ``--key=value``."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from repfusion_env.config_loading import (
    NETWORKS,
    OF_BOTH,
    ConfigError,
    accepts_text,
    options,
    parse_yaml,
    sections,
)
from repfusion_env.registry import did_you_mean


def read_options(
    arguments: Sequence[str],
    problems: list[str],
    *,
    aliases: Mapping[str, str] | None = None,
    own: Mapping[str, bool] | None = None,
    known: Sequence[str] = (),
) -> dict[str, Any]:
    """Words of a command line as dotted overrides of a configuration.

    Args:
        arguments: The words that the command's own parser left over.
        problems: A sentence is appended for each word that cannot be used.
        aliases: Short options for keys, e.g. ``{"algo": "sb3.algo"}``.
        own: Options of the command itself whose text is passed on as it is, by name, and whether
            each is a switch.
        known: Further option names of the command, for the closest match.

    Returns:
        Values by key; those of ``own`` among them.
    """
    aliases, own = aliases or {}, own or {}
    kinds = {name: kind for name, _, kind in options()}
    kinds |= {key: kinds[f"{NETWORKS[0]}.{key}"] for key in OF_BOTH}
    allowed = [*kinds, *sections(), *aliases, *own, *known]
    found: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"'{word}': options look like --key value")
            continue
        given, equals, text = word[2:].partition("=")
        key = aliases.get(given, given)
        usable = key in kinds or key in sections() or _is_entry(key, kinds) or key in own
        if not equals:
            if words and not words[0].startswith("--"):
                text = words.pop(0)
            elif own.get(key) or (key in kinds and is_switch(kinds[key])):
                text = "true"
            elif usable:
                problems.append(f"--{given}: a value is missing")
                continue
        if not usable:
            problems.append(f"--{given}: there is no such option.{did_you_mean(given, allowed)}")
            continue
        try:
            found[key] = text if key in own else _value(text, kinds.get(key))
        except yaml.YAMLError:
            problems.append(f"--{given}: '{text}' is not valid YAML")
    return found


def key_overrides(arguments: Sequence[str], command: argparse.ArgumentParser) -> dict[str, Any]:
    """``--key value`` and ``--key=value`` pairs of configuration keys.

    Args:
        arguments: The words that ``command`` left over.
        command: The command's own parser; its options are known for the closest match.

    Raises:
        ConfigError: With a sentence for each that is none.
    """
    problems: list[str] = []
    own = [action.option_strings[-1][2:] for action in command._actions]
    found = read_options(arguments, problems, known=own)
    if problems:
        raise ConfigError(problems)
    return found


def _value(text: str, kind: Any) -> Any:
    if kind is not None and accepts_text(kind):
        return None if text == "null" else text
    value = parse_yaml(text)
    # One value stands for a list of one: --teacher.layers mid_block
    return [value] if _takes_list(kind) and isinstance(value, str | int) else value


def _is_entry(key: str, kinds: dict[str, Any]) -> bool:
    """``distillation.losses.hint``: one entry of a mapping."""
    parent = key.rpartition(".")[0]
    return parent in kinds and typing.get_origin(kinds[parent]) is dict


def is_switch(kind: Any) -> bool:
    """Whether a key of this type is a bool, which needs no value on a command line."""
    return kind is bool or (
        typing.get_origin(kind) is typing.Annotated and typing.get_args(kind)[0] is bool
    )


def _takes_list(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple or any(
        typing.get_origin(part) is tuple for part in typing.get_args(kind)
    )
