"""What several families of teachers share in reading a configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from repfusion_env.config import TeacherConfig
from repfusion_env.registry import did_you_mean
from repfusion_env.teachers.base import TeacherError
from repfusion_env.teachers.reading.network import Plan
from repfusion_env.teachers.reading.tracing import Trace

_TRACES: dict[str, Trace] = {}


def known_trace(plan: Plan, configuration: Any) -> Trace:
    """The plan's trace, made once for each architecture: describing comes before loading.

    Args:
        plan: Of the network.
        configuration: All that the architecture depends on, as JSON knows it.
    """
    key = json.dumps([plan.run.__module__, plan.input_shape, configuration], sort_keys=True)
    if key not in _TRACES:
        _TRACES[key] = plan.trace()
    return _TRACES[key]


def side_of(model: str, network: Mapping[str, Any]) -> int:
    """Side of what the network was trained on, by the ``sample_size`` of its configuration.

    Raises:
        TeacherError: The configuration does not say.
    """
    size = network.get("sample_size")
    sides = size if isinstance(size, list | tuple) else [size]
    if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise TeacherError(
            f"teacher '{model}': its config.json gives sample_size {size!r}; "
            "the side of its images in pixels is needed"
        )
    return int(max(sides))


def take_options(config: TeacherConfig, family: str, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """``teacher.options`` over a family's defaults.

    Args:
        config: Whose options they are.
        family: For the message.
        allowed: Default by name; a tuple lists the allowed values, the default first.

    Raises:
        TeacherError: An option is unknown, or its value is none of those allowed.
    """
    for name, value in config.options.items():
        if name not in allowed:
            names = ", ".join(allowed) or "none"
            raise TeacherError(
                f"teacher.options: family '{family}' has no '{name}'."
                f"{did_you_mean(name, allowed)} Allowed: {names}"
            )
        choices = allowed[name]
        if isinstance(choices, tuple) and value not in choices:
            raise TeacherError(
                f"teacher.options.{name}: {value!r} given; allowed: "
                f"{', '.join(map(repr, choices))}.{did_you_mean(str(value), map(str, choices))}"
            )
        if not isinstance(choices, tuple) and choices is not None:
            _check_kind(name, value, choices)
    defaults = {
        name: choices[0] if isinstance(choices, tuple) else choices
        for name, choices in allowed.items()
    }
    return {**defaults, **config.options}


def no_options(config: TeacherConfig, family: str) -> None:
    """Refuse any option: the family has none."""
    take_options(config, family, {})


def _check_kind(name: str, value: Any, default: Any) -> None:
    numbers = (int, float)
    fits = (
        isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
        if isinstance(default, float)
        else type(value) is type(default)
    )
    if not fits:
        kinds: Iterable[tuple[type, str]] = (
            (bool, "true or false"),
            (int, "a whole number"),
            (float, "a number"),
            (str, "text"),
        )
        wanted = next((words for kind, words in kinds if isinstance(default, kind)), "a list")
        if isinstance(value, float) and not math.isfinite(value):
            wanted += ", and finite"
        raise TeacherError(f"teacher.options.{name}: {value!r} given; it must be {wanted}")
