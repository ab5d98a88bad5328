"""Pixels of a data set that does not fit: decoded ahead of their use, and gone after it.

:class:`StreamedImages` stands where an :class:`~repfusion_env.data.bank.ImageBank` keeps its tensor
of all pixels, so that whoever asks the bank for ``pixels(ids)`` need not know.

Shape letters: M images, N ids asked for, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repfusion_env.data.decoding_ahead import Batch, Decoder, Readable

# Host memory for images that nobody announced: the same ones are asked for at every timestep when
# feature statistics are measured. Batches that were announced are used once and not kept.
KEPT_BYTES = 512 * 2**20
# Announced batches that are on the device: this step's and the one before, which is drawn.
SHOWN = 2


@dataclass(eq=False)
class _Shown:
    """A batch whose images were announced, and the ids that will ask for them."""

    ids: Tensor
    version: int | None
    host: np.ndarray
    images: Tensor

    def rows(self, ids: Tensor) -> slice | None:
        """Which rows ``ids`` asks for, without reading a value; None where that cannot be told."""
        mine = self.ids
        if _version(mine) != self.version:
            return None
        if ids is mine:
            return slice(None)
        if ids.is_inference() != mine.is_inference() or not len(ids):
            return None
        if ids.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr():
            return None
        step = ids.stride(0) if len(ids) > 1 else 1
        first = ids.storage_offset() - mine.storage_offset()
        last = first + (len(ids) - 1) * step
        if step < 1 or first < 0 or last >= len(mine):
            return None
        return slice(first, last + 1, step)


class StreamedImages:
    """The pixels of a bank's images, uint8 (M, C, H, W), without holding them.

    What :meth:`stage` announced is decoded ahead by threads, written into pinned memory where the
    device is a GPU, and copied there beside the computation; asking for it by the very tensor of
    ids that was announced, or a slice of it, makes no host synchronisation. Anything else is
    decoded when it is asked for.

    Args:
        images: Where they are read from.
        ahead: Batches that are decoded ahead.
        threads: That decode; None: as many as cores, at most 16.
        device: Where they are wanted.
    """

    dtype = torch.uint8
    ndim = 4

    def __init__(
        self,
        images: Readable,
        *,
        ahead: int,
        threads: int | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._images, self.ahead, self._threads = images, ahead, threads
        self.device = torch.device(device)
        self._decoder: Decoder | None = None
        self._coming: OrderedDict[bytes, _Coming] = OrderedDict()
        self._shown: deque[_Shown] = deque(maxlen=SHOWN)
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._most_kept = max(1, KEPT_BYTES // int(np.prod(images.shape)))
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._waited, self._drained, self._since = 0.0, 0.0, time.monotonic()
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self._images.source)

    @property
    def shape(self) -> torch.Size:
        """(M, C, H, W)."""
        return torch.Size((len(self), *self._images.shape))

    @property
    def skipped(self) -> tuple[str, ...]:
        """A sentence for each image that could not be read since the bank was made."""
        return self._images.skipped

    @property
    def decode_threads(self) -> int:
        """Threads that decode."""
        return self._decoding.threads

    @property
    def waited(self) -> float:
        """Seconds that were spent waiting for images so far."""
        return self._waited

    def to(self, device: torch.device | str) -> StreamedImages:
        """The same images for another device."""
        return self if torch.device(device) == self.device else self._made(self._images, device)

    def __getitem__(self, rows: Tensor | slice) -> StreamedImages:
        """The images ``rows`` alone; none is decoded."""
        if isinstance(rows, Tensor):
            found = np.arange(len(self))[rows.cpu().numpy()]
        else:
            found = np.arange(len(self))[rows]
        return self._made(self._images.take(found), self.device)

    def identity(self) -> bytes:
        """A digest of what the images are known by: names, sizes, times of change; not pixels."""
        digest = hashlib.sha256()
        self._images.source.identity(digest.update)
        return digest.digest()

    def stage(self, ids: Tensor, host: np.ndarray, ahead: Sequence[np.ndarray] = ()) -> None:
        """Announce what will be asked for next, and begin to decode what comes after it.

        Args:
            ids: (N,) the tensor that will be asked with. Each of ``host`` stands in it as often as
                the others, as neighbours (lanes of a group).
            host: Its different ids on the host, int64, in the order of ``ids``.
            ahead: The same of the batches that follow.
        """
        batch = self._coming.pop(host.tobytes(), None) or _Coming(self._decoding.start(host))
        for later in ahead:
            key = later.tobytes()
            if key not in self._coming:
                self._coming[key] = _Coming(self._decoding.start(later))
        # Batches that nobody came for: a reset or a restored state has changed the order.
        while len(self._coming) > 2 * (max(self.ahead, len(ahead)) + 1):
            self._coming.popitem(last=False)[1].batch.cancel()
        images = self._fetched(batch)
        for coming in self._coming.values():
            if coming.images is None and self._copies is not None and coming.batch.ready():
                self._send(coming)
        repeats = len(ids) // len(host)
        if repeats > 1:
            images = images.repeat_interleave(repeats, 0)
        host = np.repeat(host, repeats)
        self._shown.append(_Shown(ids, _version(ids), host, images))

    def close(self) -> None:
        """Decode no more of what was announced; a process ends when its threads have no work."""
        while self._coming:
            self._coming.popitem()[1].batch.cancel()

    def index_select(self, dim: int, ids: Tensor) -> Tensor:
        """The images ``ids``, uint8 (N, C, H, W) on the device; not to be changed in place."""
        for shown in reversed(self._shown):
            rows = shown.rows(ids)
            if rows is not None:
                return shown.images[rows]
        return self._looked_up(ids)

    def drain_metrics(self) -> dict[str, float]:
        """``charts/data_wait``: the part of the time since the last call spent waiting for pixels.

        The host waits then; on a GPU work that was queued before may still go on meanwhile, so it
        is at most so idle.
        """
        now = time.monotonic()
        share = (self._waited - self._drained) / max(now - self._since, 1e-9)
        self._drained, self._since = self._waited, now
        return {"charts/data_wait": min(1.0, share)}

    def _made(self, images: Readable, device: torch.device | str) -> StreamedImages:
        return StreamedImages(images, ahead=self.ahead, threads=self._threads, device=device)

    @property
    def _decoding(self) -> Decoder:
        if self._decoder is None or self._pid != os.getpid():
            # Threads do not come along into a forked process.
            self._coming.clear()
            self._pid, pinned = os.getpid(), self.device.type == "cuda"
            self._decoder = Decoder(self._images, self._threads, pinned=pinned)
        return self._decoder

    def _wait(self, batch: Batch) -> None:
        started = time.monotonic()
        try:
            batch.wait()
        finally:
            self._waited += time.monotonic() - started
        self._images.warn()

    def _send(self, coming: _Coming) -> None:
        """Begin to copy to the GPU, beside what it computes."""
        assert self._copies is not None
        coming.batch.wait()  # whole already; raises what went wrong in a thread
        with torch.cuda.stream(self._copies):
            coming.images = coming.batch.images.to(self.device, non_blocking=True)
            coming.sent = self._copies.record_event()

    def _fetched(self, coming: _Coming) -> Tensor:
        if coming.images is not None and coming.sent is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(coming.sent)
            # Its memory belongs to the copying stream, which must not reuse it too early.
            coming.images.record_stream(stream)
            self._images.warn()
            return coming.images
        self._wait(coming.batch)
        return coming.batch.images.to(self.device, non_blocking=True)

    def _looked_up(self, ids: Tensor) -> Tensor:
        """Images that were not announced; on a GPU the host waits to read the ids."""
        wanted = ids.tolist()
        for shown in reversed(self._shown):
            places = {int(id_): row for row, id_ in enumerate(shown.host)}
            if all(id_ in places for id_ in wanted):
                rows = torch.tensor([places[id_] for id_ in wanted], dtype=torch.int64)
                return shown.images.index_select(0, rows.to(self.device))
        found = {id_: self._kept[id_] for id_ in wanted if id_ in self._kept}
        if self._copies is None:
            asked = set(wanted)
            for shown in self._shown:
                pairs = zip(shown.host.tolist(), shown.images.numpy(), strict=True)
                found.update((id_, pixels) for id_, pixels in pairs if id_ in asked)
        missing = [id_ for id_ in dict.fromkeys(wanted) if id_ not in found]
        if missing:
            batch = self._decoding.start(np.array(missing, np.int64))
            self._wait(batch)
            found.update(zip(missing, batch.images.numpy(), strict=True))
        self._keep(found)
        together = np.empty((len(wanted), *self._images.shape), np.uint8)
        for row, id_ in enumerate(wanted):
            together[row] = found[id_]
        return torch.from_numpy(together).to(self.device)

    def _keep(self, found: dict[int, np.ndarray]) -> None:
        for id_, pixels in found.items():
            if id_ not in self._kept:
                # A row of a batch would keep the whole batch.
                self._kept[id_] = pixels.copy()
            self._kept.move_to_end(id_)
        while len(self._kept) > self._most_kept:
            self._kept.popitem(last=False)


@dataclass(eq=False)
class _Coming:
    """A batch that is decoded ahead, and its copy on the device once that has begun."""

    batch: Batch
    images: Tensor | None = None
    sent: torch.cuda.Event | None = None


def _version(ids: Tensor) -> int | None:
    """Counts changes in place; tensors of inference mode do not."""
    return None if ids.is_inference() else ids._version
