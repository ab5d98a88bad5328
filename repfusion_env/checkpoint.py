"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is one file: a line that names the format, a line of JSON (kind, step, size and sha256
of the rest, library versions), then what ``torch.save`` wrote. It is loaded with
``weights_only=True`` alone, so a file from a stranger cannot run code.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import platform
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from repfusion_env.atomic import atomic_file, remove_leftovers

FORMAT = b"repfusion-checkpoint "
# It rises whenever what runs store changes, so that no state of another version is half restored.
VERSION = 2
MAGIC = FORMAT + b"%d\n" % VERSION
HEADER_BYTES = 1024
FILE_NAME = re.compile(r"step-(\d{9,})\.ckpt")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Wider integers take a pickle opcode that weights_only loading refuses.
LARGEST_INTEGER_BITS = 255 * 8 - 1
CHUNK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint could not be written, or none of those found can be used."""


class CheckpointWarning(UserWarning):
    """A damaged or foreign checkpoint was passed over."""


def save_checkpoint(
    folder: str | Path, step: int, state: dict[str, Any], *, kind: str, keep: int
) -> Path:
    """Write ``folder/step-<step>.ckpt`` atomically, then keep the newest ``keep`` checkpoints.

    Checkpoints of later steps than this one are removed too: a run that writes step 200 while
    step 300 exists has left the trajectory that led there, because 300 could not be used. One
    process at a time may write to a folder.

    Args:
        folder: Where checkpoints are; it is made if needed.
        step: Steps done so far, 0 or more.
        state: Nested dicts (keys text or whole numbers), lists and tuples of tensors on any
            device, text, bytes, numbers, bools and None. Tensors are stored on the CPU.
        kind: What the state belongs to; :func:`load_latest` asks for the same.
        keep: How many checkpoints stay, 1 or more.

    Returns:
        The file.

    Raises:
        TypeError: ``state`` holds something else; nothing is written.
        ValueError: ``step`` or ``keep`` is out of range.
        CheckpointError: The disk is full or cannot be written. Older checkpoints stay as they were.
    """
    if step < 0:
        raise ValueError(f"step {step} given; it must be 0 or more")
    if keep < 1:
        raise ValueError(f"keep {keep} given; it must be 1 or more, else nothing would be left")
    if not isinstance(state, dict):
        raise TypeError(f"the state must be a dict, not {type(state).__name__}")
    stored = _storable(state, "state")
    folder = Path(folder)
    path = folder / f"step-{step:09d}.ckpt"
    payload_size = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, "step-*.ckpt")
        with atomic_file(path) as file:
            file.write(MAGIC)
            file.write(_header(kind, step, "", 0))
            payload = _Payload(file)
            torch.save(stored, cast(BinaryIO, payload))
            payload_size = payload.size
            if payload.error is not None:
                raise payload.error
            file.seek(len(MAGIC))
            file.write(_header(kind, step, payload.digest.hexdigest(), payload.size))
    except OSError as error:
        raise CheckpointError(_failure(path, error, payload_size)) from error
    _prune(folder, step, keep)
    return path


def load_latest(folder: str | Path, *, kind: str) -> tuple[int, dict[str, Any]] | None:
    """Read the newest checkpoint that is whole, passing over damaged ones with a warning.

    Args:
        folder: Where :func:`save_checkpoint` wrote.
        kind: The kind that was saved.

    Returns:
        ``(step, state)`` with tensors on the CPU, or None where no checkpoint was ever written.

    Raises:
        CheckpointError: There are checkpoints, but none can be used.
    """
    unusable: list[str] = []
    earlier = 0
    for step, path in reversed(_checkpoints(Path(folder))):
        try:
            state = _read(path, step, kind)
        except _UnusableError as problem:
            unusable.append(f"'{path}' {problem}")
            earlier += isinstance(problem, _EarlierError)
            continue
        if unusable:
            warnings.warn(
                f"checkpoint {'; '.join(unusable)}; using '{path.name}' (step {step}) instead",
                CheckpointWarning,
                stacklevel=2,
            )
        return step, state
    if unusable and earlier == len(unusable):
        raise CheckpointError(
            f"the checkpoints in '{folder}' are of an earlier version of this package, whose runs "
            "cannot be continued with this one: go on with that version, or start a new run"
        )
    if unusable:
        raise CheckpointError(f"no checkpoint in '{folder}' can be used: {'; '.join(unusable)}")
    return None


class _UnusableError(Exception):
    """Why one file is passed over: the end of a sentence that begins with its name."""


class _EarlierError(_UnusableError):
    """An earlier version of this package wrote the file."""


class _Payload:
    """Hashes and counts what passes through to ``file``.

    A write error is kept and later writes are only counted: torch's zip writer must not see the
    failure (it would hide it behind its own), and the message can say how much space is needed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.size += len(data)
        if self.error is None:
            self.digest.update(data)
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """The caller flushes and syncs the file once it is whole."""


def _header(kind: str, step: int, digest: str, size: int) -> bytes:
    """The JSON line, of fixed length so that it can be filled in after the payload is written."""
    content = {
        "kind": kind,
        "step": step,
        "sha256": digest,
        "bytes": size,
        "versions": {
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    line = json.dumps(content).encode("ascii")
    if len(line) >= HEADER_BYTES:
        raise ValueError(f"the kind '{kind[:40]}...' of a checkpoint is too long")
    return line.ljust(HEADER_BYTES - 1) + b"\n"


def _read(path: Path, step: int, kind: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            header = _check(file, step, kind)
            start = file.tell()
            size = path.stat().st_size - start
            if size != header["bytes"]:
                raise _UnusableError(
                    f"is incomplete ({size:,} bytes where {header['bytes']:,} belong)"
                )
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK):
                digest.update(chunk)
            if digest.hexdigest() != header["sha256"]:
                raise _UnusableError("is damaged (its checksum is wrong)")
            file.seek(start)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _UnusableError(f"cannot be read ({error.strerror})") from error
    except (_UnusableError, MemoryError):
        raise
    except Exception as error:
        # The checksum is right, so somebody wrote it so: a pickle of objects or no torch file.
        raise _UnusableError(
            f"holds more than tensors and plain values, or nothing torch can read "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(state, dict):
        raise _UnusableError(f"holds a {type(state).__name__} where a dict belongs")
    return state


def _check(file: BinaryIO, step: int, kind: str) -> dict[str, Any]:
    magic = file.read(len(MAGIC))
    if magic != MAGIC:
        if magic.startswith(FORMAT):
            version = magic[len(FORMAT) :].decode("ascii", "replace").strip()
            earlier = version.isdigit() and int(version) < VERSION
            raise (_EarlierError if earlier else _UnusableError)(
                f"has format version {version}; this package reads version {VERSION}"
            )
        raise _UnusableError("is no checkpoint of this package")
    try:
        header = json.loads(file.read(HEADER_BYTES))
        found = (str(header["kind"]), int(header["step"]), str(header["sha256"]))
        int(header["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise _UnusableError("has a damaged header") from error
    if found[0] != kind:
        raise _UnusableError(f"is of kind '{found[0]}', not '{kind}'")
    if found[1] != step:
        raise _UnusableError(f"says that it is of step {found[1]}")
    return header


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Every checkpoint by its name, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((FILE_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _prune(folder: Path, step: int, keep: int) -> None:
    found = _checkpoints(folder)
    kept = [item for item in found if item[0] <= step][-keep:]
    for item in found:
        if item not in kept:
            item[1].unlink(missing_ok=True)


def _failure(path: Path, error: OSError, payload_size: int) -> str:
    if error.errno not in NO_SPACE:
        return f"checkpoint '{path}' cannot be written: {error.strerror}"
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    reason = {errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "files may not be so large"}
    need = f"{payload_size / 1e6:.1f} MB needed, " if payload_size else ""
    return (
        f"checkpoint '{path}' cannot be written: {reason.get(error.errno, 'the disk is full')} "
        f"({need}{free / 1e6:.1f} MB free); older checkpoints are untouched"
    )


def _storable(value: Any, path: str) -> Any:
    """A copy of ``value`` that ``weights_only`` loading accepts, or a TypeError with its path."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        # torch.save writes a view's whole storage: a row of the image bank would save the bank.
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()
    if type(value) is int and value.bit_length() > LARGEST_INTEGER_BITS:
        raise TypeError(
            f"{path} is a whole number of {value.bit_length()} bits; "
            f"a checkpoint holds up to {LARGEST_INTEGER_BITS}"
        )
    # Exact types: np.float64 is a float, and an IntEnum an int, that loading would refuse.
    if value is None or type(value) in (str, bytes, int, float, bool):
        return value
    if type(value) in (list, tuple):
        return type(value)(_storable(item, f"{path}[{index}]") for index, item in enumerate(value))
    if isinstance(value, dict):
        # A shallow copy keeps the layer versions that `nn.Module.state_dict` hangs on its dict.
        copied = copy.copy(value) if type(value).__name__ == "OrderedDict" else dict(value)
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(
                    f"{path} has the key {key!r} ({type(key).__name__}); "
                    f"keys of a checkpoint are text or whole numbers"
                )
            copied[key] = _storable(item, f"{path}.{key}")
        return copied
    hint = (
        "; store torch.from_numpy(...) of it"
        if isinstance(value, np.ndarray)
        else "; store .item() of it"
        if isinstance(value, np.generic)
        else ""
    )
    raise TypeError(
        f"{path} is a {type(value).__module__}.{type(value).__name__}; a checkpoint holds tensors, "
        f"dicts, lists, tuples, text, bytes, numbers, bools and None{hint}"
    )
