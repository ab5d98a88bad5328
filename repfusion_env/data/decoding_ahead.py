"""Threads that decode images of a streamed bank, batch by batch and ahead of their use.

Shape letters: M images, n of one batch, C channels, H height, W width.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from repfusion_env.data.decode import MOST_THREADS
from repfusion_env.data.streaming_sources import Source
from repfusion_env.data.unreadable import MOST_NAMED, Unreadable

# Images of one task at most: enough that handing it to a thread costs nothing beside them.
MOST_TOGETHER = 16


class StreamError(ValueError):
    """An image that training needs cannot be read, nor be replaced by another one."""


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(eq=False)
class Batch:
    """Images that are being decoded.

    Args:
        ids: (n,) int64 on the host.
        images: uint8 (n, C, H, W) on the host, pinned where a GPU will read them; whole once
            :meth:`wait` has returned.
    """

    ids: np.ndarray
    images: Tensor
    work: list[Future[None]] = field(default_factory=list)

    def ready(self) -> bool:
        """Whether nothing has to be waited for."""
        return all(part.done() for part in self.work)

    def wait(self) -> None:
        """Return when all are decoded.

        Raises:
            StreamError: One of them cannot be read.
        """
        for part in self.work:
            part.result()
        self.work.clear()

    def cancel(self) -> None:
        """What has not been begun is left undone."""
        for part in self.work:
            part.cancel()


class Readable:
    """A source whose unreadable images are replaced by the next readable one of their class.

    Which one that is depends on nothing but the files, so that a resumed run sees the same.

    Args:
        source: M images.
        shape: (C, H, W) that all must have.
        labels: (M,) classes that the images came with, int64.
        unreadable: Who counts, and refuses what is too much.
    """

    def __init__(
        self,
        source: Source,
        shape: tuple[int, int, int],
        labels: np.ndarray,
        unreadable: Unreadable,
    ) -> None:
        self.source, self.shape, self.labels = source, shape, labels
        self.unreadable = unreadable
        self._bad: dict[int, str] = {}
        self._end: str | None = None  # what was one too many
        self._lock = threading.Lock()
        self._said = 0

    def take(self, rows: np.ndarray) -> Readable:
        """The images ``rows`` alone; unreadable ones are counted together with those of all."""
        return Readable(self.source.take(rows), self.shape, self.labels[rows], self.unreadable)

    @property
    def skipped(self) -> tuple[str, ...]:
        """A sentence for each image that could not be read so far."""
        with self._lock:
            return tuple(sorted(self._bad.values()))

    def read(self, index: int) -> np.ndarray:
        """The image, or the one that stands in for it, uint8 (C, H, W).

        Raises:
            StreamError: More images cannot be read than ``data.skip_unreadable`` allows, no other
                one of the class can, or the image has another size than the first.
        """
        first = index
        while True:
            if index not in self._bad:
                try:
                    pixels = self.source.read(index)
                except ValueError as error:
                    self._note(index, str(error))
                else:
                    return self._checked(index, pixels)
            index = self._next(index)
            if index == first:
                raise StreamError(f"{self._bad[first]}; nor can any other image of its class")

    def warn(self) -> None:
        """Say which images could not be read since the last call; only the first few one by one."""
        with self._lock:
            found = list(self._bad.values())
        for line in found[self._said : MOST_NAMED]:
            warnings.warn(
                f"data set '{self.unreadable.name}': {line.removeprefix('data.path: ')}; the next "
                "image of its class takes its place (data.skip_unreadable "
                f"{self.unreadable.limit:g}; all such are listed in summary.json)",
                RuntimeWarning,
                stacklevel=2,
            )
        self._said = len(found)

    def _checked(self, index: int, pixels: np.ndarray) -> np.ndarray:
        if tuple(pixels.shape) != self.shape:
            have, want = (f"{shape[2]}x{shape[1]}" for shape in (pixels.shape, self.shape))
            raise StreamError(
                f"data.path: images of mixed size: {self.source.named(index)} is {have}, the first "
                f"{want} (width x height); data.image_size resizes them"
            )
        return pixels

    def _note(self, index: int, sentence: str) -> None:
        with self._lock:
            if index in self._bad:
                return
            if self._end is None:
                try:
                    self.unreadable.add(sentence, 0)
                except ValueError as error:
                    more = "" if self.unreadable.limit else "; data.skip_unreadable allows for some"
                    self._end = f"{error}{more}"
            if self._end is not None:
                raise StreamError(self._end)
            self._bad[index] = sentence

    def _next(self, index: int) -> int:
        alike = np.flatnonzero(self.labels == self.labels[index])
        place = int(np.searchsorted(alike, index)) + 1
        return int(alike[place % len(alike)])


class Decoder:
    """A pool of threads that decode batches.

    Args:
        images: Where from.
        threads: How many; None: as many as there are cores, at most 16.
        pinned: Whether batches are for a GPU.
    """

    def __init__(self, images: Readable, threads: int | None, *, pinned: bool) -> None:
        self.images = images
        self.threads = threads or min(MOST_THREADS, usable_cores())
        self.pinned = pinned
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        # Threads of a bank that nobody has any more would wait for work until the process ends.
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def start(self, ids: np.ndarray) -> Batch:
        """Begin to decode the images ``ids`` (n,)."""
        shape, source = (len(ids), *self.images.shape), self.images
        # Decoding threads write by numpy: torch would let each of them start threads of its own.
        if self.pinned:
            # Torch keeps pinned memory for the next batch, once a copy that reads it has ended.
            images = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            rows = images.numpy()
        else:
            rows = np.empty(shape, np.uint8)
            images = torch.from_numpy(rows)
        batch = Batch(ids, images)
        together = min(MOST_TOGETHER, -(-len(ids) // (2 * self.threads)))
        for start in range(0, len(ids), together):
            part = range(start, min(start + together, len(ids)))
            batch.work.append(self._pool.submit(_decode, source, ids, rows, part))
        return batch


def _decode(images: Readable, ids: np.ndarray, rows: np.ndarray, part: range) -> None:
    for row in part:
        rows[row] = images.read(int(ids[row]))
