"""TensorBoard events, written where they are logged.

``SummaryWriter`` hands events to a thread: a full disk shows up there as a traceback, and late.
Here a write that fails raises where it was asked for, and a kill loses at most the last row.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import summary

FILE_VERSION = "brain.Event:2"
HISTOGRAM_BINS = 64


class EventFile:
    """A new event file in ``folder``.

    Args:
        folder: The run's folder.
        purge_step: Global step from which on TensorBoard drops what earlier files hold.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        # Readers go through the files by name, so one made in the same second must sort later.
        index = sum("tfevents" in path.name for path in folder.iterdir())
        name = f"{int(time.time()):010d}.{index:04d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / f"events.out.tfevents.{name}").open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version=FILE_VERSION, step=purge_step or 0))
        if purge_step is not None:
            self._write(Event(session_log=SessionLog(status=SessionLog.START), step=purge_step))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """One point of a curve at global step ``step``."""
        self._write(Event(summary=summary.scalar(tag, value), step=step))

    def add_histogram(self, tag: str, samples: np.ndarray | Tensor, step: int) -> None:
        """The distribution of one or more samples."""
        found: Summary = summary.histogram(tag, samples, HISTOGRAM_BINS)
        self._write(Event(summary=found, step=step))

    def add_image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """An image, uint8 (H, W, 3)."""
        self._write(Event(summary=summary.image(tag, pixels, dataformats="HWC"), step=step))

    def flush(self) -> None:
        """Hand everything to the system, so that a running TensorBoard sees it."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
