"""Data sets that torchvision fetches, each compared with its known MD5 before it is unpacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def fetched(what: str, root: Path, fetch: Callable[[], object]) -> None:
    """Run ``fetch``; whatever goes wrong is one sentence.

    Args:
        what: The data set's own name.
        root: Where it goes.
        fetch: Downloads and unpacks.

    Raises:
        ValueError: It did not work.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        fetch()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason"
        raise ValueError(
            f"data.download: {what} could not be fetched into '{root}' "
            f"({type(error).__name__}: {reason})"
        ) from error
