"""Where streamed images come from: files in folders, or places in shards.

A source knows each image by its number and reads it on its own, so that any thread may decode any
image at any time.

Shape letters: M images, C channels, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np

from repfusion_env.data.decode import decoded_array, in_threads, sentences

# Files whose sizes one task asks for.
BLOCK = 1024


class Source(Protocol):
    """M images that are read one by one; called by several threads at once."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """One image, uint8 (C, H, W).

        Raises:
            ValueError: It cannot be read; one sentence with its name.
        """
        ...

    def named(self, index: int) -> str:
        """What messages call an image."""
        ...

    def take(self, rows: np.ndarray) -> Source:
        """The images ``rows`` (int64) alone."""
        ...

    def identity(self, note: Callable[[bytes], object]) -> None:
        """Tell ``note`` what the images are known by, without reading their pixels."""
        ...


@dataclass(frozen=True)
class FileSource:
    """An image in a file of its own.

    Args:
        paths: (M,) strings.
        side: Of the square that images are brought to; None: as they are.
        channels: 1 or 3.
        root: What their names start behind, so that a moved folder stays the same one.
    """

    paths: np.ndarray
    side: int | None
    channels: int
    root: Path

    @staticmethod
    def of(paths: Sequence[Path], side: int | None, channels: int) -> FileSource:
        """The files, whose common folder is their root."""
        names = [str(path) for path in paths]
        root = Path(os.path.commonpath([os.path.dirname(name) for name in names]))  # noqa: PTH120
        return FileSource(np.array(names, object), side, channels, root)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        """See :class:`Source`."""
        with sentences(self.named(index)):
            path = Path(self.paths[index])
            return decoded_array(path, side=self.side, channels=self.channels)

    def named(self, index: int) -> str:
        """See :class:`Source`."""
        return f"'{self.paths[index]}'"

    def take(self, rows: np.ndarray) -> FileSource:
        """See :class:`Source`."""
        return replace(self, paths=self.paths[rows])

    def identity(self, note: Callable[[bytes], object]) -> None:
        """Names under the root, sizes and times of change of all files."""

        def about(path: str) -> str:
            try:
                found = Path(path).stat()
            except OSError:
                return f"{os.path.relpath(path, self.root)} missing\n"
            return f"{os.path.relpath(path, self.root)} {found.st_size} {found.st_mtime_ns}\n"

        # In blocks: what a pool notes of a task takes more memory than the name of a file.
        blocks = [self.paths[start : start + BLOCK] for start in range(0, len(self), BLOCK)]
        for lines in in_threads(lambda block: "".join(map(about, block)), blocks):
            note(lines.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class ShardSource:
    """An image at a place in an uncompressed tar file.

    Args:
        shards: The tar files.
        shard: (M,) number of the tar file, int32.
        offset: (M,) first byte in it, int64.
        size: (M,) bytes, int64.
        names: (M,) what messages call the sample within its shard, strings.
        side: Of the square that images are brought to; None: as they are.
        channels: 1 or 3.
    """

    shards: tuple[Path, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    names: np.ndarray
    side: int | None
    channels: int

    def __len__(self) -> int:
        return len(self.shard)

    def read(self, index: int) -> np.ndarray:
        """See :class:`Source`."""
        path, size = self.shards[self.shard[index]], int(self.size[index])
        with sentences(self.named(index)):
            # Opened anew: a data set has more shards than a process may hold open.
            with path.open("rb") as file:
                file.seek(int(self.offset[index]))
                content = file.read(size)
            if len(content) != size:
                raise ValueError(f"{len(content)} of {size} bytes are left")
            return decoded_array(BytesIO(content), side=self.side, channels=self.channels)

    def named(self, index: int) -> str:
        """See :class:`Source`."""
        return f"sample '{self.names[index]}' of shard '{self.shards[self.shard[index]]}'"

    def take(self, rows: np.ndarray) -> ShardSource:
        """See :class:`Source`."""
        return replace(
            self,
            shard=self.shard[rows],
            offset=self.offset[rows],
            size=self.size[rows],
            names=self.names[rows],
        )

    def identity(self, note: Callable[[bytes], object]) -> None:
        """Names, sizes and times of change of the shards, and the images' places in them."""
        for path in self.shards:
            found = path.stat()
            note(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
        for values in (self.shard, self.offset, self.size):
            note(np.ascontiguousarray(values).tobytes())
