"""One file of a cache: the features of one timestep, in slots of a fixed size.

A record is a head of 16 bytes (image id + 1, CRC-32, 4 bytes unused) and the features. Its checksum
covers the cache's identity, timestep, mirror, image and features, so that a record which was half
written, or belongs elsewhere, is no record. An empty slot is zeros; as the files are sparse, it
takes no room on disk.

Shape letters: n records, R slots of a file, B bytes of one record's features.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Image id + 1, CRC-32, unused.
HEAD = struct.Struct("<QII")
SCAN_BYTES = 64 << 20


def record_type(feature_bytes: int) -> np.dtype:
    """Of one record in a file."""
    fields = [("image", "<u8"), ("crc", "<u4"), ("unused", "<u4")]
    return np.dtype([*fields, ("data", "u1", (feature_bytes,))])


@dataclass(frozen=True)
class Scanned:
    """A stretch of slots that were looked at.

    Attributes:
        images: (n,) int64, of the records that are whole.
        data: (n, B) uint8, their features.
        damaged: (d,) int64, slots that hold something else.
    """

    images: np.ndarray
    data: np.ndarray
    damaged: np.ndarray


class Shard:
    """The file of one (timestep, mirrored or not).

    Image i is kept in slot ``i % R``; where R is below the number of images, the newest stays.

    Args:
        path: Of the file; it exists.
        salt: Text that no other file's records are checked with.
        slots: R.
        feature_bytes: B.
        images: Of the bank.

    Raises:
        ValueError: The file has another size.
    """

    def __init__(self, path: Path, salt: str, slots: int, feature_bytes: int, images: int) -> None:
        self.path, self.slots = path, slots
        self._salt, self._images = zlib.crc32(salt.encode()), images
        self._type = record_type(feature_bytes)
        wanted, size = slots * self._type.itemsize, path.stat().st_size
        if size != wanted:
            raise ValueError(
                f"feature cache file '{path}': it has {size} bytes where {wanted} belong; it was "
                "cut off or copied in part, so delete it"
            )
        self._records = np.memmap(path, dtype=self._type, mode="r", shape=(slots,))
        self._raw = self._records.view(np.uint8).reshape(slots, self._type.itemsize)

    def read(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Look images (n,) up.

        Returns:
            (n,) bool, which were found; (n, B) uint8, their features, anything where not found;
            how many records were damaged.
        """
        slots = images % self.slots
        found = self._records["image"][slots] == (images + 1).astype(np.uint64)
        rows = np.empty((len(images), self._type.itemsize), np.uint8)
        damaged = 0
        for place in np.flatnonzero(found).tolist():
            # A copy, so that what is checked is what is used while others write.
            rows[place] = self._raw[slots[place]]
            if not self._whole(rows[place], int(images[place])):
                found[place] = False
                damaged += 1
        return found, rows[:, HEAD.size :], damaged

    def write(self, images: np.ndarray, data: np.ndarray) -> None:
        """Keep the features (n, B) uint8 of images (n,).

        Raises:
            OSError: The disk is full and the like.
        """
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            for image, row in zip(images.tolist(), np.ascontiguousarray(data), strict=True):
                head = HEAD.pack(image + 1, self._checksum(image, row), 0)
                offset = (image % self.slots) * self._type.itemsize
                written = os.pwritev(descriptor, (head, row), offset)
                if written < self._type.itemsize:
                    rest = (head + row.tobytes())[written:]
                    _write_all(descriptor, rest, offset + written)
        finally:
            os.close(descriptor)

    def clear(self, slots: np.ndarray) -> None:
        """Make ``slots`` (n,) empty."""
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            for slot in slots.tolist():
                _write_all(descriptor, bytes(self._type.itemsize), slot * self._type.itemsize)
        finally:
            os.close(descriptor)

    def scan(self) -> Iterator[Scanned]:
        """All slots in turn, every checksum computed."""
        step = max(1, SCAN_BYTES // self._type.itemsize)
        for start in range(0, self.slots, step):
            part = self._records[start : start + step]
            used = start + np.flatnonzero((part["image"] != 0) | (part["crc"] != 0))
            rows = self._raw[used]
            images = rows[:, :8].copy().view("<u8")[:, 0].astype(np.int64) - 1
            home = (images >= 0) & (images < self._images) & (images % self.slots == used)
            for place in np.flatnonzero(home).tolist():
                home[place] = self._whole(rows[place], int(images[place]))
            yield Scanned(images[home], rows[home, HEAD.size :], used[~home])

    def _whole(self, row: np.ndarray, image: int) -> bool:
        """Whether a record (bytes,) is that of ``image``."""
        claimed, crc, _ = HEAD.unpack_from(row.data)
        return claimed == image + 1 and crc == self._checksum(image, row[HEAD.size :])

    def _checksum(self, image: int, data: np.ndarray) -> int:
        return zlib.crc32(data.data, zlib.crc32(struct.pack("<Q", image), self._salt))


def make_file(path: Path, size: int) -> None:
    """An empty file of ``size`` bytes under ``path``, unless there is one.

    Raises:
        OSError: The folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with draft.open("xb") as file:
            file.truncate(size)
        try:
            os.link(draft, path)  # never replaces what another process has made and filled
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
