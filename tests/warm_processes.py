"""Commands in processes of their own that find everything imported already.

A process that can be killed is needed again and again, but importing takes a fresh interpreter
several seconds. These are forked from one that has imported and has done nothing else.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "diffusers.models.unets.unet_2d",
        "diffusers.schedulers.scheduling_ddpm",
        "stable_baselines3",
        "sklearn.linear_model",
        "sklearn.pipeline",
        "sklearn.preprocessing",
        "agents.session",
        "agents.sb3_callback",
        "repfusion_env.events",
        "repfusion_env.data.digits",
        "repfusion_env.teachers.unet2d",
        "repfusion_env.teachers.train",
    ]
)


def _run(module: str, words: list[str], said: str) -> None:
    import torch

    torch.set_num_threads(1)
    # What libraries write to the descriptors is said too.
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(importlib.import_module(module).main(words))


class WarmProcess:
    """A command's ``main`` under a process id of its own.

    Args:
        module: Whose ``main`` it is, e.g. "agents.train_reinforce".
        words: Its arguments.
        said: File that takes what it prints and complains of.
    """

    def __init__(self, module: str, words: list[str], said: Path) -> None:
        self._said = said
        self._process = CONTEXT.Process(target=_run, args=(module, words, str(said)))
        self._process.start()

    def said(self) -> str:
        """All that it has said until now."""
        return self._said.read_text(encoding="utf-8") if self._said.exists() else ""

    def wait_until(self, reached: Callable[[], bool], seconds: float = 100) -> None:
        """Return as soon as ``reached``; fails where the process ends before."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert self._process.is_alive(), f"it ended too early: {self.said()}"
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.001)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def code(self, seconds: float = 100) -> int:
        """Its exit code, negative after a signal, once it has ended."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"it does not end: {self.said()}"
        return self._process.exitcode

    def end(self) -> None:
        """Kill it if it still runs."""
        self._process.kill()
        self._process.join()
