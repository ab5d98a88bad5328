"""The measurement of two ranks against one process: that it measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rank_processes import together
from torch import Tensor

from benchmarks.material import TINY_UNET, make_material
from benchmarks.rank_learning import compared
from benchmarks.rank_learning import table as learning_table
from benchmarks.rank_worker import Worker
from benchmarks.ranks import main, measure, table
from benchmarks.scaling.measured import read
from benchmarks.settings import Size
from repfusion_env.ranks import ALONE, Ranks

SIZE = Size(4, 1, 1, "small_cnn", smoke=True)
LINE = "default reward, fast"


def test_two_ranks_have_the_gradients_of_the_full_batch(tmp_path: Path) -> None:
    material = make_material(tmp_path, TINY_UNET, images=SIZE.images)

    def gradient(ranks: Ranks) -> Tensor:
        return Worker(ranks, material, SIZE).gradient(double=True, channels_last=False)

    one = gradient(ALONE)
    assert one.norm() > 0
    for two in together(gradient, 2):
        assert float((two - one).norm() / one.norm()) < 1e-5


def test_steps_are_timed_under_the_setting_asked_for(tmp_path: Path) -> None:
    worker = Worker(ALONE, make_material(tmp_path, TINY_UNET, images=SIZE.images), SIZE)
    assert worker.seconds(LINE, 1) > 0
    with pytest.raises(StopIteration):
        worker.seconds("no such setting", 1)


def test_the_table_names_the_line_and_both_sides() -> None:
    def spread(value: float) -> dict[str, float]:
        return {"median": value, "min": value - 0.1, "max": value + 0.1}

    line = {"one": spread(10.0), "two": spread(19.0), "speedup": spread(1.9)}
    result = {
        "lanes": 64,
        "lines": {LINE: line},
        "gradient_error": 1.23e-7,
        "gradient_error_fp32": 2e-6,
        "layout_error_fp32": 5e-6,
    }
    shown = table(result).splitlines()
    assert shown[2] == f"| {LINE} | 10.0 [9.9, 10.1] | 19.0 [18.9, 19.1] | 1.90 [1.80, 2.00] |"
    assert "1.2e-07 with the student in float64" in shown[-1]
    assert table({"cores": [0], "skipped": "two cores are needed"}).endswith("cores are needed.")


def test_no_lanes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--lanes", "0"])
    assert ended.value.code == 2
    assert "--lanes: 0 given; it must be 1 or more" in capsys.readouterr().err


def test_one_core_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert measure(SIZE)["skipped"] == "two cores are needed"


def test_curves_are_compared_seed_by_seed() -> None:
    found = compared([1.0, 2.0, 3.0], [1.1, 2.1, 3.4])
    assert found["difference"] == pytest.approx(0.2)
    # 4.303 times the deviation of (0.1, 0.1, 0.4) over the root of 3
    assert found["half_width"] == pytest.approx(4.303 * 0.03**0.5 / 3**0.5, rel=1e-3)
    assert "+0.2000 [-0.2303, +0.6303]" in learning_table({"held-out reward": found}, 3)


@pytest.mark.slow
@pytest.mark.long
def test_both_sides_are_measured_in_turns(tmp_path: Path) -> None:
    result = measure(SIZE, lines=(LINE,))
    if "skipped" in result:
        pytest.skip(result["skipped"])
    line = result["lines"][LINE]
    assert result["lanes"] == 2 * SIZE.lanes
    assert line["speedup"]["median"] == pytest.approx(
        line["seconds_one"][0] / line["seconds_two"][0]
    )
    assert result["gradient_error"] < 1e-5
    assert result["cores"][0] != result["cores"][1]
    # The cost model reads what stands there.
    exchanges = [
        {"by": way, "ranks": 2, "bytes": size, "seconds": {"median": size / 1e9}}
        for way in ("gloo", "ranks")
        for size in (4096, 1 << 26)
    ]
    files = [tmp_path / "whole.json", tmp_path / "collectives.json"]
    files[0].write_text(json.dumps({"parts": {"ranks": result}}), encoding="utf-8")
    files[1].write_text(json.dumps({"collectives": exchanges}), encoding="utf-8")
    (check,) = read(files).ranks
    assert (check.name, check.alone) == (LINE, line["one"]["median"])
    assert check.measured == line["speedup"]["median"]
