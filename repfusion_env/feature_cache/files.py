"""A cache on disk: a folder with a manifest and one file of records per timestep.

Processes share it without locks. Records are written in place and found by their checksum, so that
a process may be killed, and two may write the same record, at any time.

Shape letters: n records, R slots of a file, B bytes of one record's features.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from repfusion_env.feature_cache.identity import Identity, Manifest, agreed_manifest
from repfusion_env.feature_cache.records import Scanned, Shard, make_file, record_type

GIB = 1 << 30
# Each mapped file holds a descriptor, of which a process has 1,024 by default.
OPEN_FILES = 256
FILE_NAME = re.compile(r"t(\d+)(m?)\.bin")


class CacheWarning(UserWarning):
    """A cache can not keep what it is given; the run goes on without."""


def file_name(timestep: int, mirrored: bool) -> str:
    """Of the records of one timestep."""
    return f"t{timestep:04d}{'m' if mirrored else ''}.bin"


class DiskStore:
    """The records of one cache under ``root``.

    Args:
        root: ``cache.folder``.
        identity: Of the cache; its name is the folder's.
        gib: Most that its files may hold together, in GiB.
        parts: How many files are expected: timesteps, twice where mirrored images count too. A new
            cache gives each an equal share of ``gib``.
        names: For people, in the manifest.

    Attributes:
        slots: R.
        most_files: Timesteps that ``gib`` has room for.
        damaged: Records met that were not whole.
        stopped: Why nothing is written any more; empty while it is.

    Raises:
        ValueError: The folder cannot be used, is damaged or another cache's, or ``gib`` is too
            little for a single record of each file.
    """

    def __init__(
        self, root: Path, identity: Identity, *, gib: float, parts: int, names: Mapping[str, str]
    ) -> None:
        self.folder, self.identity = root / identity.name, identity
        record = record_type(identity.feature_bytes).itemsize
        budget = int(gib * GIB)
        if budget < parts * record:
            raise ValueError(
                f"cache.disk_gib: {gib:g} GiB given, but one feature takes {record:,} bytes and "
                f"there are {parts} timesteps; give {parts * record / GIB:.2g} or more"
            )
        slots = min(identity.images, budget // (parts * record))
        manifest = agreed_manifest(self.folder, Manifest(identity, slots, names))
        self.slots = manifest.slots
        self.most_files = budget // (self.slots * record)
        self.damaged = 0
        self._size = self.slots * record
        self._shards: OrderedDict[tuple[int, bool], Shard] = OrderedDict()
        self.stopped = ""

    def files(self) -> list[tuple[int, bool]]:
        """(timestep, mirrored) of the files that there are, in order."""
        return files_of(self.folder)

    def read(
        self, images: np.ndarray, timesteps: np.ndarray, mirrored: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Look n records up.

        Returns:
            (n,) bool, which were found; (n, B) uint8, anything where not found.
        """
        found = np.zeros(len(images), bool)
        data = np.empty((len(images), self.identity.feature_bytes), np.uint8)
        for part, rows in _by_file(timesteps, mirrored):
            shard = self._shard(part)
            if shard is not None:
                found[rows], data[rows], damaged = shard.read(images[rows])
                self.damaged += damaged
        return found, data

    def write(
        self, images: np.ndarray, timesteps: np.ndarray, mirrored: np.ndarray, data: np.ndarray
    ) -> None:
        """Keep n records (n, B) uint8; where the disk does not take them, one warning says so."""
        if self.stopped:
            return
        try:
            for part, rows in _by_file(timesteps, mirrored):
                shard = self._shard(part) or self._new_shard(part)
                if shard is not None:
                    shard.write(images[rows], data[rows])
        except OSError as error:
            self._stop(
                f"feature cache '{self.folder}' cannot be written ({error.strerror or error}); the "
                "run goes on, with what is in it and without adding to it"
            )

    def scan(self, timestep: int, mirrored: bool) -> Iterator[Scanned]:
        """All records of one file, checked; nothing where there is no such file."""
        shard = self._shard((timestep, mirrored))
        if shard is not None:
            yield from shard.scan()

    def clear(self, timestep: int, mirrored: bool, slots: np.ndarray) -> None:
        """Make slots of one file empty.

        Raises:
            OSError: The file cannot be written.
        """
        shard = self._shard((timestep, mirrored))
        if shard is not None:
            shard.clear(slots)

    def _shard(self, part: tuple[int, bool]) -> Shard | None:
        """The file of ``part``, mapped; None where there is none."""
        if part in self._shards:
            self._shards.move_to_end(part)
            return self._shards[part]
        path = self.folder / file_name(*part)
        if not path.exists():
            return None
        identity = self.identity
        salt = f"{identity.digest}:{part[0]}:{int(part[1])}"
        shard = Shard(path, salt, self.slots, identity.feature_bytes, identity.images)
        self._shards[part] = shard
        if len(self._shards) > OPEN_FILES:
            self._shards.popitem(last=False)
        return shard

    def _new_shard(self, part: tuple[int, bool]) -> Shard | None:
        if len(self.files()) >= self.most_files:
            self._stop(
                f"feature cache '{self.folder}' is full: cache.disk_gib allows "
                f"{self.most_files} files of {self._size / GIB:.2g} GiB, one for each timestep; "
                "the run goes on without adding to it; give more, or delete the folder"
            )
            return None
        make_file(self.folder / file_name(*part), self._size)
        return self._shard(part)

    def _stop(self, sentence: str) -> None:
        if not self.stopped:
            warnings.warn(sentence, CacheWarning, stacklevel=2)
        self.stopped = sentence


def files_of(folder: Path) -> list[tuple[int, bool]]:
    """(timestep, mirrored) of the files in a cache's folder, in order."""
    names = (FILE_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted((int(name[1]), bool(name[2])) for name in names if name)


def _by_file(
    timesteps: np.ndarray, mirrored: np.ndarray
) -> Iterator[tuple[tuple[int, bool], np.ndarray]]:
    """(timestep, mirrored) and the rows that belong to it, for each that occurs."""
    codes = 2 * timesteps + mirrored
    for code in np.unique(codes).tolist():
        yield (code // 2, bool(code % 2)), np.flatnonzero(codes == code)
