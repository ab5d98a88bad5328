"""The speed measurement: that it measures what it says. No figure of speed is asserted."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.material import CLASSES, DDPM_CIFAR10_UNET, LAYER, TINY_UNET, make_material
from benchmarks.published_step import AVERAGE_WEIGHT, PublishedStep
from benchmarks.throughput import DIGITS, SETTINGS, Size, experiment, main, measure
from benchmarks.timing import Bystanders, Line, Timing, interleave, ratios, spread
from repfusion_env.config_loading import load_config, to_dict

CPU = torch.device("cpu")


def published(folder: Path, **changes: Any) -> PublishedStep:
    material = make_material(folder, TINY_UNET, images=16)
    torch.manual_seed(0)
    return PublishedStep(
        material.teacher,
        LAYER,
        student="small_cnn",
        shape=(3, 32, 32),
        classes=CLASSES,
        device=CPU,
        **changes,
    )


@pytest.fixture(autouse=True)
def _leave_global_random_state() -> Any:
    with torch.random.fork_rng(devices=[]):
        yield


def test_architecture_has_the_published_number_of_parameters() -> None:
    from diffusers import UNet2DModel

    with torch.device("meta"):
        network = UNet2DModel(**DDPM_CIFAR10_UNET)
    # As the model's own weight file holds them.
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307


def test_every_line_takes_its_turn_in_changing_order() -> None:
    seen: list[str] = []

    def line(name: str) -> Line:
        return Line(name, lambda step: seen.append(f"{name}{step}"))

    lines = [line(name) for name in "abc"]
    timings = interleave(lines, rounds=4, steps=2, device=CPU)
    assert {name: len(timing.seconds) for name, timing in timings.items()} == dict.fromkeys(
        "abc", 4
    )
    turns = [part[0] for part in seen[::2]]
    orders = {"".join(turns[at : at + 3]) for at in range(0, len(turns), 3)}
    assert all(sorted(order) == list("abc") for order in orders)
    assert len(orders) > 2
    # Steps are numbered per line, the warm-up's two included.
    assert [part for part in seen if part[0] == "b"] == [f"b{step}" for step in range(10)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The benchmark's clock, to be turned by hand, so that a loaded machine cannot matter."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_short_steps_are_repeated_and_timed_by_the_step(clock: list[float]) -> None:
    seen: list[int] = []

    def step(number: int) -> None:
        seen.append(number)
        clock[0] += 0.25

    timing = interleave([Line("a", step, repeat=5)], rounds=2, steps=2, device=CPU)["a"]
    assert seen == list(range(30))
    assert timing.seconds == (0.25, 0.25)


def test_time_around_the_watched_part_is_told_apart(clock: list[float]) -> None:
    watched = 0.0

    def step(_: int) -> None:
        nonlocal watched
        watched += 4.0
        clock[0] += 5.0

    line = Line("a", step, lambda: watched)
    timing = interleave([line], rounds=3, steps=2, device=CPU)["a"]
    assert timing.seconds == (5.0, 5.0, 5.0)
    assert timing.outside == (0.25, 0.25, 0.25)


def test_own_work_does_not_count_as_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    # In 10 s the processors were busy for 24 s, of which 4 s were ours, on 4 cores.
    seen = iter([(0.0, 100.0, 10.0), (10.0, 124.0, 14.0)])
    monkeypatch.setattr(Bystanders, "_now", staticmethod(lambda: next(seen)))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert Bystanders().share() == 0.5


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="Linux alone tells")
def test_share_of_other_processes_is_a_share() -> None:
    bystanders = Bystanders()
    time.sleep(0.2)
    share = bystanders.share()
    assert share is not None and 0 <= share < 1.2  # the system counts in hundredths of a second


def test_ratios_are_taken_round_by_round() -> None:
    # The machine is twice as slow in the second round; the ratio does not see it.
    fast, slow = Timing((1.0, 2.0, 1.0)), Timing((3.0, 6.0, 4.0))
    assert ratios(fast, slow) == [3.0, 3.0, 4.0]
    assert spread(ratios(fast, slow)) == {"median": 3.0, "min": 3.0, "max": 4.0}


def test_published_step_reads_the_whole_networks_feature(tmp_path: Path) -> None:
    step = published(tmp_path, timesteps=1)
    images, labels = torch.rand(4, 3, 32, 32) * 2 - 1, torch.arange(4)
    with torch.no_grad():
        before = step.network.student_map(images).mean((2, 3)).double()
    read = step.step(images, labels)
    assert step.feature is not None
    reached: list[str] = []
    step.unet.conv_out.register_forward_hook(lambda *_: reached.append("conv_out"))
    step.step(images, labels)
    assert reached == ["conv_out"]
    with torch.no_grad():
        step.unet(images, torch.zeros(4, dtype=torch.int64))
    expected = (before - step.feature.double().mean((2, 3))).square().mean()
    assert read["distillation"] == pytest.approx(float(expected), rel=1e-4)
    assert read["reward"] == pytest.approx(-read["cross_entropy"])
    assert read["entropy"] == pytest.approx(math.log(1), abs=1e-6)


def test_published_step_learns_and_averages(tmp_path: Path) -> None:
    step = published(tmp_path)
    images, labels = torch.rand(8, 3, 32, 32) * 2 - 1, torch.arange(8) % CLASSES
    weight, average = (
        network.get_parameter("projection.weight") for network in (step.network, step.average)
    )
    before = weight.detach().clone()
    first = step.step(images, labels)
    expected = AVERAGE_WEIGHT * (weight.detach() - before)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(average - before, expected, atol=1e-7, rtol=0)
    last = [step.step(images, labels) for _ in range(20)][-1]
    assert first["entropy"] == pytest.approx(math.log(1000), rel=0.1)
    assert last["distillation"] < first["distillation"]


def test_step_without_policy_trains_no_policy(tmp_path: Path) -> None:
    step = published(tmp_path, policy=False)
    read = step.step(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
    assert set(read) == {"distillation", "cross_entropy", "reward", "accuracy"}
    assert step.network.policy is None


def test_our_side_does_the_published_work(tmp_path: Path) -> None:
    material = make_material(tmp_path, TINY_UNET, images=16)
    size = Size(4, 1, 1, "small_cnn", smoke=True)
    config = experiment(SETTINGS[0], material, size, "cpu")
    assert (config.reward.kind, config.teacher.input) == ("teacher_probe", "clean")
    assert config.timesteps.grid() == tuple(range(1000))
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("sgd", 0.1)
    assert config.student.ema == 1 - AVERAGE_WEIGHT
    default = experiment(SETTINGS[2], material, size, "cpu")
    shipped = to_dict(load_config("digits"))
    assert default.reward.kind == shipped["reward"]["kind"]
    assert default.teacher.input == shipped["teacher"]["input"]


def test_smoke_run_prints_a_table_and_writes_its_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "throughput.json"
    assert main(["--smoke", "--device", "cpu", "--json", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["lines"]) == 2 + 3 * (len(SETTINGS) + 1)
    lanes, rounds = result["size"]["lanes"], result["size"]["rounds"]
    printed = capsys.readouterr().out
    for name, record in result["lines"].items():
        assert len(record["seconds_per_step"]) == rounds
        speed = record["decisions_per_second"]
        assert speed["min"] == pytest.approx(lanes / max(record["seconds_per_step"]))
        assert f"| {name} | {speed['median']:.1f} [" in printed
    for setting in (*(setting.name for setting in SETTINGS), DIGITS):
        env, bare = (
            result["lines"][f"{kind}, {setting}"]["seconds_per_step"]
            for kind in ("environment", "trainer")
        )
        found = result["ratios"][setting]["environment / trainer"]
        assert found["max"] == pytest.approx(max(b / e for e, b in zip(env, bare, strict=True)))
    assert "figures mean nothing" in printed


def test_measuring_leaves_the_callers_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    measure(Size(2, 1, 1, "small_cnn", smoke=True), "cpu", quiet=True)
    assert torch.equal(torch.rand(3), expected)


def test_missing_folder_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--json", str(tmp_path / "nowhere" / "out.json")])
    assert "--json: there is no folder" in capsys.readouterr().err


def test_impossible_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--rounds", "0"])
    assert "--rounds: 0 given; it must be 1 or more" in capsys.readouterr().err
