"""What a landscape's figures call teachers, layers and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from repfusion_env.landscapes.landscape import Landscape
from repfusion_env.layer_names import short_names


def teacher_name(found: Landscape) -> str:
    """The teacher's name; of a folder on this machine its last part."""
    folder = found.teacher.startswith(("/", ".", "~"))
    return last_part(found.teacher) if folder else found.teacher


def reward_name(found: Landscape) -> str:
    """The kind of reward, with its unit where that is known."""
    return f"{found.reward_kind} (nats)" if found.run is None else found.reward_kind


def last_part(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def layer_names(layers: Sequence[str], most: int) -> list[str]:
    """Whole names where all of them have room."""
    fits = all(len(layer) <= most for layer in layers)
    return list(layers) if fits else short_names(layers, most)


def number(value: float) -> str:
    """Three digits, with a minus sign."""
    text = f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """With its sign and three decimals."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
