"""What a teacher offers a student, by layer and timestep, before anything is trained.

:func:`measure` gives a :class:`Landscape`; ``python -m repfusion_env.landscape`` is the command
around it. Names are imported when they are first asked for, so that the command refuses bad input
without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repfusion_env.landscapes.landscape import Landscape
    from repfusion_env.landscapes.measuring import measure
    from repfusion_env.landscapes.settings import LandscapeSettings

__all__ = ["Landscape", "LandscapeSettings", "measure"]

_HOMES = {"Landscape": "landscape", "LandscapeSettings": "settings", "measure": "measuring"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
