"""Where the time of a step goes: a stopwatch that changes hands between parts of the program."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from repfusion_env.data.bank import ImageBank
from repfusion_env.features import TeacherFeatures
from repfusion_env.observations import Observer
from repfusion_env.sb3 import RepFusionVecEnv
from repfusion_env.stream import ImageStream
from repfusion_env.student import Student
from repfusion_env.teachers.reading.network import NetworkTeacher
from repfusion_env.trainer import DistillationTrainer
from repfusion_env.updates import Updates
from repfusion_env.vector_env import RepFusionVectorEnv


@dataclass(frozen=True)
class Part:
    """A method whose time is told apart.

    Attributes:
        name: In the table; a function of the object where it depends on its state.
        owner: The class.
        method: Its name there.
    """

    name: str | Callable[[Any], str]
    owner: type
    method: str


def _student_forward(student: Student) -> str:
    return "student forward" if student.training else "student forward for the reward"


PARTS: tuple[Part, ...] = (
    Part("SB3 adapter", RepFusionVecEnv, "step_wait"),
    Part("environment layer", RepFusionVectorEnv, "step"),
    Part("observation", Observer, "__call__"),
    Part("order of images", ImageStream, "take"),
    Part("pixels", ImageBank, "pixels"),
    Part("noise, pooling, standardisation", TeacherFeatures, "__call__"),
    Part("noise, pooling, standardisation", TeacherFeatures, "at"),
    Part("teacher forward", NetworkTeacher, "features"),
    Part(_student_forward, Student, "features"),
    Part("backward", torch.Tensor, "backward"),
    Part("clipping and averages", Updates, "apply"),
    Part("optimizer", torch.optim.SGD, "step"),
    Part("optimizer", torch.optim.AdamW, "step"),
    Part("losses, reward, metrics", DistillationTrainer, "step"),
)


class Stopwatch:
    """Seconds by part; a part that calls another hands the time over until that returns.

    Args:
        device: On CUDA every change of hands waits for it, so that its work counts where it was
            asked for; parts that would overlap then add up.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._running: list[str] = []
        self._since = 0.0

    def wrap(self, part: Part) -> Callable[..., Any]:
        """The part's method with the stopwatch around it."""
        method = getattr(part.owner, part.method)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._start(part.name if isinstance(part.name, str) else part.name(args[0]))
            try:
                return method(*args, **kwargs)
            finally:
                self._stop()

        return timed

    def _start(self, name: str) -> None:
        self._account()
        self._running.append(name)

    def _stop(self) -> None:
        self._account()
        self._running.pop()

    def _account(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


@contextmanager
def watching(device: torch.device, parts: Sequence[Part] = PARTS) -> Iterator[Stopwatch]:
    """Put the stopwatch around ``parts``; everything is as before afterwards."""
    watch = Stopwatch(device)
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(patch.object(part.owner, part.method, watch.wrap(part)))
        yield watch
