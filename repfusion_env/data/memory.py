"""What a bank needs of the machine's memory, said before anything is decoded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

GIB = 2**30
# A bank smaller than this is nobody's worry, and a line about it only noise.
WORTH_A_LINE = GIB
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def machine_memory() -> int | None:
    """Main memory that this process may use, in bytes; None where the system does not say.

    In a container the smaller of the machine's and the container's.
    """
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    for limit in _CGROUP_LIMITS:
        try:
            found = min(found, int(limit.read_text(encoding="ascii")))
        except (OSError, ValueError):  # not a container, or one without a limit ("max")
            continue
    return found if found > 0 else None


def reserve(
    name: str, counts: tuple[int, int], shape: tuple[int, int, int], *, masks: bool = False
) -> None:
    """Say what the two banks of one data set need, and refuse what does not fit.

    Args:
        name: Of the data set.
        counts: Training and held-out images.
        shape: (C, H, W) of one image, one byte each.
        masks: Whether each has a mask beside it, one byte for each of its pixels.

    Raises:
        ValueError: The banks are larger than the machine's memory.
    """
    channels, height, width = shape
    need = sum(counts) * (channels + masks) * height * width
    have = machine_memory()
    what = (
        f"{counts[0]:,} training and {counts[1]:,} held-out images of {channels}x{height}x{width}"
        f"{' and their masks' if masks else ''}"
    )
    if have is not None and need > have:
        raise ValueError(
            f"data set '{name}': {what} need {need / GIB:.1f} GiB, but this machine has "
            f"{have / GIB:.1f} GiB; give a smaller data.image_size, or data.train_limit"
        )
    if need >= WORTH_A_LINE:
        of = "" if have is None else f" of {have / GIB:.1f} GiB"
        print(f"data set '{name}': {what} take {need / GIB:.1f} GiB{of}", file=sys.stderr)
