"""From YAML, dictionaries and command lines to a checked :class:`ExperimentConfig`, and back.

All that is wrong is reported at once, a sentence each, before anything heavy loads.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from repfusion_env.config import ExperimentConfig
from repfusion_env.config_rules import conflicts
from repfusion_env.registry import did_you_mean

PACKAGE = Path(__file__).resolve().parent
# Keys at the top level that are written out as those of both networks.
OF_BOTH = ("precision", "channels_last")
NETWORKS = ("teacher", "student")


class ConfigError(ValueError):
    """A configuration that cannot be used; ``problems`` holds one sentence each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class _GivenTwice(yaml.MarkedYAMLError):
    """A key stands twice in one mapping, of which YAML would take the last without a word."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as text; people mean a number, as YAML 1.2 has it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping each of whose keys is given once."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _GivenTwice(problem=key.value, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that :class:`_Loader` would read as a number."""


_NUMBER = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def parse_yaml(text: str) -> Any:
    """``yaml.safe_load`` in which ``1e-4`` is a number."""
    return yaml.load(text, Loader=_Loader)


def config_folder() -> Path:
    """Where the shipped configurations are: in the installed package, or in the checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def read_config_file(config: str | Path) -> dict[str, Any]:
    """The keys of one YAML file, laid over those of the files that its ``base`` names.

    Args:
        config: A path, or the name of a file in :func:`config_folder` with or without ``.yaml``.

    Returns:
        The keys, without ``base``.

    Raises:
        ConfigError: There is no such file, it is no YAML, it is no mapping, or it is built on
            itself.
    """
    return _read(_find(config), ())


def _find(config: str | Path, asked_by: Path | None = None) -> Path:
    """The file that ``config`` names; beside the file that asks, where one does."""
    path = Path(config).expanduser()
    if asked_by is not None:
        path = asked_by.parent / path
    if path.is_file():
        return path
    # `configs/cifar10.yaml` names the shipped file from any folder, a wheel's user's too.
    given = Path(config)
    if given.parent == Path():
        path = config_folder() / f"{given.stem}.yaml"
    elif given.parent.name == "configs":
        path = config_folder() / given.name
    if not path.is_file():
        names = sorted(file.stem for file in config_folder().glob("*.yaml"))
        who = "config" if asked_by is None else f"base of '{asked_by}'"
        raise ConfigError(
            [
                f"{who}: there is no file '{config}'.{did_you_mean(given.stem, names)} "
                f"Shipped: {', '.join(names)}"
            ]
        )
    return path


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a file over its bases'; ``above`` are the files that are built on it."""
    chain = (*above, path.resolve())
    if path.resolve() in above:
        raise ConfigError(
            [f"base: '{path}' is built on itself: {' -> '.join(file.name for file in chain)}"]
        )
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except _GivenTwice as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(
            [f"config: '{path}' gives '{error.problem}' twice in one place (line {line})"]
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(getattr(error, "problem_mark", "")).strip() or "the file is no text"
        raise ConfigError([f"config: '{path}' is not valid YAML ({where})"]) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError([f"config: '{path}' must hold 'key: value' pairs at its top level"])
    if "base" not in content:
        return content
    given = content.pop("base")
    bases = given if isinstance(given, list) and given else [given]
    if not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            [f"base: {given!r} given in '{path}'; it must be a name, a path, or a list of these"]
        )
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, _read(_find(base, path), chain))
    return merge(merged, content)


def load_config(
    config: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ExperimentConfig:
    """Read, merge and check a configuration.

    Args:
        config: A path, a name under ``configs/``, or a mapping of overrides of ``digits``; None
            is ``digits``.
        overrides: Keys that replace those of ``config``: nested (``{"teacher": {"model": ...}}``),
            dotted (``{"teacher.model": ...}``), or a section's main key by the section's name
            (``{"reward": "teacher_probe"}``).

    Returns:
        The checked configuration.

    Raises:
        ConfigError: With every problem found, one sentence each.
        TypeError: ``config`` is neither text, path nor mapping.
    """
    if isinstance(config, ExperimentConfig):
        base: dict[str, Any] = to_dict(config)
    elif config is None:
        base = read_config_file("digits")
    elif isinstance(config, Mapping):
        base = merge(read_config_file("digits"), config)
    elif isinstance(config, str | Path):
        base = read_config_file(config)
    else:
        raise TypeError(
            f"config must be a path, the name of a shipped configuration or a mapping, "
            f"not {type(config).__name__}"
        )
    return check(merge(base, overrides or {}))


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``overrides`` laid over it, key by key; neither is changed."""
    merged = _expand(base)
    for path, value in _leaves(_expand(overrides)):
        node = merged
        for key in path[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        node[path[-1]] = value
    return merged


def check(values: Mapping[str, Any]) -> ExperimentConfig:
    """Build the configuration from nested ``values``; raises as :func:`load_config` does."""
    expanded = _expand(values)
    problems: list[str] = []
    try:
        config = _adapter().validate_python(expanded)
    except ValidationError as error:
        details = error.errors()
        problems += [_sentence(detail) for detail in details]
        # What is left without the refused keys may still conflict; say that too, all at once.
        config = _adapter().validate_python(_without(expanded, [item["loc"] for item in details]))
    problems += conflicts(config)
    if problems:
        raise ConfigError(problems)
    return config


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, lists and numbers (JSON-able)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def to_yaml(config: ExperimentConfig) -> str:
    """The configuration as YAML that :func:`load_config` reads back to an equal one."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def sections() -> dict[str, type]:
    """The nested dataclasses by the name of their section."""
    hints = typing.get_type_hints(ExperimentConfig)
    return {
        name: hint
        for name, hint in hints.items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


def options() -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every option as (dotted path, field, type), top level first."""
    hints = typing.get_type_hints(ExperimentConfig, include_extras=True)
    nested = sections()
    for item in dataclasses.fields(ExperimentConfig):
        if item.name not in nested:
            yield item.name, item, hints[item.name]
    for section, kind in nested.items():
        section_hints = typing.get_type_hints(kind, include_extras=True)
        for item in dataclasses.fields(kind):
            yield f"{section}.{item.name}", item, section_hints[item.name]


def _expand(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and shorthands (``reward: teacher_probe``) written out as nested keys."""
    nested = sections()
    expanded: dict[str, Any] = {}
    # A section's own key, given beside it, says more than the key of both.
    both = {f"{part}.{key}": values[key] for key in OF_BOTH if key in values for part in NETWORKS}
    for key, value in {**both, **values}.items():
        if key in OF_BOTH:
            continue
        path = str(key).split(".")
        if len(path) == 1 and path[0] in nested and not _is_section(nested[path[0]], value):
            path.append(nested[path[0]].shorthand)  # type: ignore[attr-defined]
        if isinstance(value, Mapping):
            value = dict(value)
        if path == ["distillation", "losses"] and isinstance(value, str):
            value = {value: 1.0}
        node = expanded
        for part in path[:-1]:
            if not isinstance(node.get(part), dict):
                # A value and keys below it cannot both be; the keys, given later, are judged.
                node[part] = {}
            node = node[part]
        if isinstance(value, dict) and isinstance(node.get(path[-1]), dict):
            node[path[-1]] = {**node[path[-1]], **value}
        else:
            node[path[-1]] = value
    return expanded


def _is_section(kind: type, value: Any) -> bool:
    if value is None:
        return False
    if not isinstance(value, Mapping):
        return dataclasses.is_dataclass(value)
    # `distillation: {hint: 1, cosine: 2}` gives the shorthand's mapping, not the section's keys.
    holds_mapping = isinstance(getattr(kind(), kind.shorthand), dict)  # type: ignore[attr-defined]
    names = {item.name for item in dataclasses.fields(kind)}
    return not (holds_mapping and value and not names & set(value))


def _leaves(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    nested = sections()
    for key, value in values.items():
        if isinstance(value, Mapping) and not prefix and key in nested:
            yield from _leaves(value, (key,))
        else:
            yield (*prefix, key), value


def _without(values: Mapping[str, Any], paths: list[tuple[int | str, ...]]) -> dict[str, Any]:
    """``values`` without the sections' keys (or whole top-level keys) that ``paths`` lead to."""
    nested = sections()
    kept = {key: dict(item) if isinstance(item, Mapping) else item for key, item in values.items()}
    for path in paths:
        holder = kept.get(str(path[0]))
        if len(path) > 1 and path[0] in nested and isinstance(holder, dict):
            holder.pop(str(path[1]), None)
        else:
            kept.pop(str(path[0]), None)
    return kept


@functools.cache
def _adapter() -> TypeAdapter[ExperimentConfig]:
    for kind in (ExperimentConfig, *sections().values()):
        kind.__pydantic_config__ = ConfigDict(  # type: ignore[attr-defined]
            extra="forbid", allow_inf_nan=False
        )
    return TypeAdapter(ExperimentConfig)


def _sentence(detail: Any) -> str:
    """One of pydantic's findings in our words."""
    path = ".".join(str(part) for part in detail["loc"] if not _is_tag(part))
    given, context = detail["input"], detail.get("ctx", {})
    if detail["type"] == "unexpected_keyword_argument":
        known = every = [name for name, _, _ in options()]
        parent = path.rpartition(".")[0]
        if not parent:
            known = [*sections(), *(name for name in known if "." not in name)]
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
        close = close or [name for name in every if name.endswith("." + path.split(".")[-1])][:1]
        hint = f" Did you mean '{close[0]}'?" if close else ""
        siblings = [name for name in known if name.rpartition(".")[0] == parent]
        allowed = f" Allowed: {', '.join(siblings)}." if siblings and not close else ""
        return f"{path}: there is no such key.{hint}{allowed}"
    if detail["type"] == "literal_error":
        return f"{path}: {given!r} given; allowed: {context['expected']}.{_close(given, context)}"
    limits = {
        "greater_than": "it must be greater than {gt}",
        "greater_than_equal": "it must be {ge} or more",
        "less_than": "it must be less than {lt}",
        "less_than_equal": "it must be {le} or less",
        "finite_number": "it must be a finite number",
    }
    if detail["type"] in limits:
        return f"{path}: {given!r} given; {limits[detail['type']].format(**context)}"
    wanted = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text",
        "tuple": "a list",
        "dict": "'name: value' pairs",
        "dataclass": "a section of 'key: value' pairs",
        "none": "null",
    }
    kind = detail["type"].partition("_")[0]
    return f"{path}: {given!r} given; it must be {wanted.get(kind, detail['msg'].lower())}"


def _is_tag(part: int | str) -> bool:
    # Pydantic marks a mapping's key as such; the user's path has no such part.
    return part == "[key]"


def _close(given: Any, context: Mapping[str, Any]) -> str:
    return did_you_mean(str(given), re.findall(r"'([^']*)'", str(context.get("expected", ""))))


def accepts_text(kind: Any) -> bool:
    """Whether an option's type takes plain text, so that a command line gives it unparsed."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return accepts_text(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return any(accepts_text(part) for part in typing.get_args(kind))
    if origin is typing.Literal:
        return all(isinstance(value, str) for value in typing.get_args(kind))
    return kind is str
