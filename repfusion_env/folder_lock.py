"""One process at a time in a folder: a lock that the system drops with its process."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from pathlib import Path

FILE = ".lock"


class FolderTaken(Exception):
    """Another process holds the folder's lock; the text says which one."""


def lock_folder(folder: Path, *, what: str = "folder") -> int:
    """Hold ``folder/.lock`` until the returned descriptor is closed or the process ends.

    The file stays when the lock is dropped; that it is there means nothing.

    Args:
        folder: Must exist.
        what: What the folder holds, for the warning.

    Returns:
        A file descriptor, for :func:`os.close`.

    Raises:
        FolderTaken: It is held already.
        OSError: The file cannot be made.
    """
    descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl
    except ImportError:  # Windows has no such locks.
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise FolderTaken(holder or "another process") from None
        warnings.warn(
            f"the file system of '{folder}' has no locks ({error.strerror}); "
            f"see to it that one process writes to the {what}",
            stacklevel=4,
        )
        return descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
