"""The types of configuration values, and how a field says what it is for."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, Strict

T = TypeVar("T")

Count = Annotated[int, Strict(), Gt(0)]
Index = Annotated[int, Strict(), Ge(0)]
Number = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Gt(0)]
NonNegative = Annotated[float, Strict(), Ge(0)]
Fraction = Annotated[float, Strict(), Ge(0), Le(1)]
PositiveFraction = Annotated[float, Strict(), Gt(0), Le(1)]
Decay = Annotated[float, Strict(), Ge(0), Lt(1)]


def _switch(value: Any) -> Any:
    """What YAML makes of the words ``on`` and ``off`` is given back as these."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


OffAutoOn = Annotated[Literal["off", "auto", "on"], BeforeValidator(_switch)]
Store = Annotated[Literal["off", "memory", "disk", "auto"], BeforeValidator(_switch)]


def option(default: T, help: str) -> T:
    """A dataclass field with its default and the sentence that ``--help`` prints."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})  # type: ignore[return-value]
    return field(default=default, metadata={"help": help})
