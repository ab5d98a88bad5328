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
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.material import CLASSES, DDPM_CIFAR10_UNET, LAYER, TINY_UNET, make_material
from benchmarks.published_step import AVERAGE_WEIGHT, PublishedStep
from benchmarks.settings import SETTINGS, Setting, Size, experiment, flops_per_decision
from benchmarks.steps import PUBLISHED, SMOKE, Way, best_batch, build
from benchmarks.steps import ratios as step_ratios
from benchmarks.throughput import main, measure
from benchmarks.timing import Bystanders, Line, Timing, interleave, ratios, shown, spread
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


def named(name: str) -> Setting:
    return next(setting for setting in SETTINGS if setting.name == name)


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
    assert shown(spread(ratios(fast, slow)), ".1f") == "3.0 [3.0, 4.0]"


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
    config = experiment(named("published work, fp32"), material, size, "cpu")
    assert (config.reward.kind, config.teacher.input) == ("teacher_probe", "clean")
    assert config.timesteps.grid() == tuple(range(1000))
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("sgd", 0.1)
    assert config.student.ema == 1 - AVERAGE_WEIGHT
    default = experiment(named("default reward, fp32"), material, size, "cpu")
    shipped = to_dict(load_config("digits"))
    assert default.reward.kind == shipped["reward"]["kind"]
    assert default.teacher.input == shipped["teacher"]["input"]


def test_settings_say_in_their_names_what_they_are(tmp_path: Path) -> None:
    material = make_material(tmp_path, TINY_UNET, images=16)
    size = Size(4, 1, 1, "small_cnn")
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)
    for setting in SETTINGS:
        config, name = experiment(setting, material, size, "cpu"), setting.name
        fast = "fp32" if "fp32" in name else "bf16"
        assert config.teacher.precision == config.student.precision == fast
        assert config.teacher.channels_last == config.student.channels_last == (fast == "bf16")
        assert (config.speed.compile == "on") == ("compiled" in name)
        stores = {"cache in memory": "memory", "cache on disk": "disk"}
        store = next((store for text, store in stores.items() if text in name), "off")
        assert config.cache.store == store
        assert (config.env.group_size == 4) == ("groups of 4" in name)
        assert (config.reward.student == "training") == ("training forward" in name)


def test_smoke_run_prints_tables_and_writes_its_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "throughput.json"
    arguments = [
        "--smoke",
        "--device",
        "cpu",
        "--only",
        "steps,device,fidelity",
        "--json",
        str(out),
    ]
    assert main(arguments) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    steps, printed = result["parts"]["steps"], capsys.readouterr().out
    assert set(steps["lines"]) == {*PUBLISHED, *(setting.name for setting in SMOKE)}
    for name, record in steps["lines"].items():
        samples, lanes = record["seconds_per_step"], record["lanes"]
        assert len(samples) == steps["size"]["rounds"] == 2
        speed = record["decisions_per_second"]
        assert speed["min"] == pytest.approx(lanes / max(samples))
        assert f"| {name} | {speed['median']:.1f} [" in printed
    published = steps["lines"]["published step"]["seconds_per_step"]
    ours = steps["lines"]["published work, fp32"]["seconds_per_step"]
    found = steps["ratios"]["published work, fp32"]["published step"]
    assert found["max"] == pytest.approx(max(b / a for a, b in zip(ours, published, strict=True)))
    (bar, warm, *_) = result["bars"]
    assert bar["value"] == found["median"] and bar["met"] == (found["median"] >= 6)
    assert "cache" in warm["from"]
    peak = result["parts"]["device"]["peak_flops_per_second"]["bf16"]["median"]
    line = steps["lines"]["published work, fp32"]
    share = line["flops_per_decision"] * line["decisions_per_second"]["median"] / peak
    utilisation = result["parts"]["device"]["utilisation"]
    assert utilisation["published work, fp32"] == pytest.approx(share)
    assert f"| published work, fp32 | {share:.1%} |" in printed
    assert "| both bf16, channels-last (fast) | " in printed
    assert "figures mean nothing" in printed


def test_a_warm_cache_has_all_that_is_asked_for(tmp_path: Path) -> None:
    material = make_material(tmp_path, TINY_UNET, images=16)
    size = Size(4, 2, 1, "small_cnn", smoke=True)
    setting = named("published work, cache in memory, fast")
    way = build(setting, material, size, "cpu", tmp_path)
    for step in range(3):
        way.line.step(step)
    assert way.env is not None
    assert way.env.drain_metrics()["cache/hit_rate"] == 1.0


def test_batches_of_different_size_are_compared_by_their_decisions() -> None:
    def way(name: str, lanes: int) -> Way:
        return Way(Line(name, lambda step: None), lanes)

    timings = {"ours": Timing((2.0, 4.0)), "published": Timing((1.0, 1.0))}
    # 40 decisions in 2 s and in 4 s, against 10 in 1 s.
    assert step_ratios(way("ours", 40), way("published", 10), timings) == [2.0, 1.0]


def test_the_best_batch_is_the_fastest_that_fits(clock: list[float]) -> None:
    seconds = {1: 1.0, 2: 1.0, 4: 3.0}  # 1, 2 and 1.33 decisions/s
    tried = []

    def step_of(lanes: int) -> Any:
        tried.append(lanes)
        if lanes > 4:
            raise torch.cuda.OutOfMemoryError

        def step(_: int) -> None:
            clock[0] += seconds[lanes]

        return step

    assert best_batch(step_of, CPU, lambda text: None, sizes=(1, 2, 4, 8, 16)) == 2
    assert tried == [1, 2, 4, 8]
    with pytest.raises(ValueError, match="not even the batch 8 fits"):
        best_batch(step_of, CPU, lambda text: None, sizes=(8,))


def test_operations_are_counted_where_no_gradient_is_wanted_too(tmp_path: Path) -> None:
    # The trainer reads its teacher in inference mode, which the counter must see through.
    convolution = torch.nn.Conv2d(3, 8, kernel_size=3, padding=1)
    linear = torch.nn.Linear(8, 5)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        linear(convolution(torch.zeros(2, 3, 6, 6)).mean((2, 3)))
    assert counter.get_total_flops() == 2 * (2 * 6 * 6 * 8 * 3 * 9) + 2 * (2 * 8 * 5)


def test_more_teacher_is_more_operations(tmp_path: Path) -> None:
    counts = []
    for width in (8, 16):
        folder = tmp_path / str(width)
        folder.mkdir()
        unet = {**TINY_UNET, "block_out_channels": (width, 2 * width)}
        material = make_material(folder, unet, images=16)
        size = Size(4, 1, 1, "small_cnn", smoke=True)
        counts.append(flops_per_decision(named("published work, fp32"), material, size, "cpu"))
    with torch.device("meta"):
        convolution = torch.empty(16, 16, 3, 3)
    # At the very least one 3x3 convolution of the full image between the wider maps.
    assert counts[1] - counts[0] > 2 * 32 * 32 * convolution.numel() * 3 / 4


def test_measuring_leaves_the_callers_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    measure(Size(4, 1, 1, "small_cnn", smoke=True), "cpu", ["steps"])
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


def test_unknown_part_is_refused_with_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "steps,cost"])
    said = capsys.readouterr().err
    assert "'cost' given. Did you mean 'costs'? Allowed: steps, costs, device" in said


def test_parts_that_are_done_are_kept_when_a_later_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr("benchmarks.costs.measure", fail)
    kept: list[dict[str, Any]] = []
    size = Size(4, 1, 1, "small_cnn", smoke=True)
    with pytest.raises(RuntimeError, match="no memory left"):
        measure(size, "cpu", ["device", "costs"], keep=kept.append)
    assert [list(result["parts"]) for result in kept] == [["device"]]
