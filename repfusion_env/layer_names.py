"""Module paths short enough for a tick label or a title."""

from __future__ import annotations

from collections.abc import Sequence


def short_names(names: Sequence[str], most: int) -> list[str]:
    """The parts that tell names apart, in at most ``most`` characters.

    ``mid_block.resnets.1.conv2`` and ``up_blocks.0.resnets.1.conv2`` become ``mid_block`` and
    ``up_blocks``: parts that all begin with are left out, and those after the first that differ,
    as far as the names stay different. What is still too long loses its middle.
    """
    paths = [name.split(".") for name in names]
    if len(set(names)) == len(names) > 1:
        while all(len(path) > 1 for path in paths) and len({path[0] for path in paths}) == 1:
            paths = [path[1:] for path in paths]
        longest = max(len(path) for path in paths)
        kept = next(
            count
            for count in range(1, longest + 1)
            if len({tuple(path[:count]) for path in paths}) == len(paths)
        )
        paths = [path[:kept] for path in paths]
    return [shortened(".".join(path), most) for path in paths]


def shortened(text: str, most: int) -> str:
    """``text`` with its middle left out where it is longer than ``most`` characters."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
