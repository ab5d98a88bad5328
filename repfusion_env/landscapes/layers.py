"""Which layers of a teacher are looked at where none are named."""

from __future__ import annotations

from collections.abc import Sequence

SPREAD = 6


def spread_of_layers(
    available: Sequence[str], own: Sequence[str], count: int = SPREAD
) -> tuple[str, ...]:
    """Blocks from shallow to deep, evenly spaced, with the teacher's own layers among them.

    A block is an outermost module with layers inside it: what is inside says little that the block
    does not say. Blocks that hold one of the teacher's own layers are left to it.

    Args:
        available: Layers in the order of the forward.
        own: Layers that must be among them.
        count: How many, own ones included.
    """
    outer = [
        name
        for name in available
        if _inside(name, available) and not any(name.startswith(f"{up}.") for up in available)
    ]
    # A network without nesting has its modules alone.
    candidates = [name for name in outer if "sampler" not in name] or list(available)
    others = [name for name in candidates if name not in own and not _inside(name, own)]
    wanted = min(max(count - len(own), 0), len(others))
    stride = (len(others) - 1) / max(wanted - 1, 1)
    picked = {others[round(index * stride)] for index in range(wanted)}
    places = {name: place for place, name in enumerate(available)}
    return tuple(sorted({*picked, *own}, key=lambda name: places.get(name, 0)))


def _inside(name: str, others: Sequence[str]) -> bool:
    """Whether any of ``others`` is a part of the module ``name``."""
    return any(other.startswith(f"{name}.") for other in others)
