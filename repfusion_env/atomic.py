"""Files that are there whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears under ``path`` when the block ends, replacing an older one.

    The bytes go to a temporary file in the same folder, reach the disk, and are then renamed. If
    the block raises, the temporary file is removed and ``path`` stays as it was; a killed process
    leaves the temporary file (see :func:`remove_leftovers`).

    Args:
        path: The file to write; its folder must exist.

    Yields:
        The open temporary file, seekable.

    Raises:
        OSError: The disk is full, the folder cannot be written, and the like.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 through :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def remove_leftovers(folder: str | Path, pattern: str) -> None:
    """Remove the temporary files that killed processes left of files named like ``pattern``.

    Only for a folder that no other process writes to at the moment.
    """
    for temporary in Path(folder).glob(f".{pattern}.*.tmp"):
        temporary.unlink(missing_ok=True)


def sync_folder(folder: str | Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
