"""What environment layer and adapter cost, and where a step's time goes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks import costs
from benchmarks.settings import DIGITS, Size
from benchmarks.stopwatch import PARTS, Part, watching
from repfusion_env.sb3 import make_sb3_vec_env

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The stopwatch's clock, to be turned by hand."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_time_belongs_to_the_innermost_part(clock: list[float]) -> None:
    class Program:
        def outer(self) -> None:
            clock[0] += 1
            self.inner()
            clock[0] += 2
            self.inner()

        def inner(self) -> None:
            clock[0] += 10

    parts = [Part("outer", Program, "outer"), Part(lambda program: "inner", Program, "inner")]
    with watching(CPU, parts) as watch:
        clock[0] += 100  # in no part
        Program().outer()
    assert watch.seconds == {"outer": 3.0, "inner": 20.0}
    Program().outer()
    assert watch.seconds == {"outer": 3.0, "inner": 20.0}


def test_a_part_that_fails_gives_the_time_back(clock: list[float]) -> None:
    class Program:
        def outer(self) -> None:
            with pytest.raises(KeyError):
                self.inner()
            clock[0] += 5

        def inner(self) -> None:
            clock[0] += 1
            raise KeyError

    parts = [Part("outer", Program, "outer"), Part("inner", Program, "inner")]
    with watching(CPU, parts) as watch:
        Program().outer()
    assert watch.seconds == {"outer": 5.0, "inner": 1.0}


def test_every_part_of_a_step_is_met_and_changes_nothing(tiny: dict[str, Any]) -> None:
    def rewards(watched: bool) -> list[float]:
        env = make_sb3_vec_env(config=tiny, optimizer={"name": "adamw"})
        env.seed(0)
        env.reset()
        if not watched:
            return list(env.step([1] * env.num_envs)[1])
        with watching(env.env.device) as watch:
            found = list(env.step([1] * env.num_envs)[1])
        expected = {part.name for part in PARTS if isinstance(part.name, str)}
        assert set(watch.seconds) == {
            *expected,
            "student forward",
            "student forward for the reward",
        }
        assert min(watch.seconds.values()) > 0
        return found

    assert rewards(watched=True) == rewards(watched=False)


def test_shares_and_profile_stand_in_the_tables() -> None:
    size = Size(4, 2, 1, "small_cnn", smoke=True)
    result = costs.measure(size, "cpu")
    assert set(result["settings"]) == {"published work, fp32", DIGITS}
    table = costs.table(result)
    for found in result["settings"].values():
        for line in ("environment", "adapter"):
            assert 0 < found[line]["min"] <= found[line]["median"] <= found[line]["max"]
        profile = found["profile"]
        share = profile["teacher forward"] / sum(profile.values())
        assert f"{share:.1%}" in table
    assert table.startswith("| 4 lanes | trainer's step, s |")
