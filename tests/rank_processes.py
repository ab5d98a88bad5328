"""Ranks for tests: forked processes that meet as those of a launcher do."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PATIENCE_SECONDS = 90.0


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(index: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells rank ``index`` of ``count``."""
    return {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def together(work: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """What ``work(ranks, *arguments)`` gives on each of ``count`` ranks.

    Args:
        work: Returns tensors, numbers, text, None, or dicts and lists of them.
        count: Ranks.
        arguments: Passed on.

    Raises:
        AssertionError: A rank failed, with its traceback, or the ranks waited for each other.
    """
    forks = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            forks.Process(target=_one, args=(work, index, count, port, folder, arguments))
            for index in range(count)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [index for index, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        said = "".join(path.read_text() for path in sorted(Path(folder).glob("*.txt")))
        assert not said, said
        assert not stuck, f"ranks {stuck} are still waiting"
        return [
            torch.load(Path(folder) / f"{index}.pt", weights_only=True) for index in range(count)
        ]


def _one(
    work: Callable[..., Any],
    index: int,
    count: int,
    port: int,
    folder: str,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment(index, count, port))
    try:
        from repfusion_env.ranks import connect

        torch.save(work(connect(), *arguments), Path(folder) / f"{index}.pt")
        sys.stdout.flush()
    except BaseException:
        (Path(folder) / f"{index}.txt").write_text(f"rank {index}:\n{traceback.format_exc()}\n")
    finally:
        # No clean-up of what the parent has open.
        os._exit(0)
