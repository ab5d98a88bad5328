"""Peaks and flatness: that the measurement sees memory which is there."""

from __future__ import annotations

import json
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory
from benchmarks.material import TINY_UNET, make_material
from benchmarks.settings import SETTINGS, Size
from benchmarks.steps import PUBLISHED
from repfusion_env.config_loading import to_dict

TINY = Size(4, 1, 1, "small_cnn", smoke=True)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_material(tmp_path_factory.mktemp("material"), TINY_UNET, images=32)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux alone tells")
def test_memory_that_is_written_is_seen_and_its_peak_remembered() -> None:
    before = memory.host_bytes()
    block = mmap.mmap(-1, 64 * memory.MIB)
    block.write(b"x" * len(block))
    held = memory.host_bytes()
    assert held - before > 50 * memory.MIB
    block.close()
    assert memory.host_bytes(peak=True) >= held


def test_growth_is_seen_and_a_high_beginning_is_not() -> None:
    flat = [900.0, *[500.0] * 9]
    assert memory.growth(flat) == 0
    leak = [500.0 + 10 * sample for sample in range(10)]
    # The largest of the second fifth is its last, 530; of the last fifth 590.
    assert memory.growth(leak) == pytest.approx(60 / 530)
    assert memory.growth([0.0] * 10) == 0
    assert memory.growth([1.0]) == 0


def test_a_step_that_keeps_what_it_made_is_found(
    material: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repfusion_env.sb3 import RepFusionVecEnv

    # Pages of their own: what the process has given back before could serve other memory.
    kept: list[mmap.mmap] = []
    step_wait = RepFusionVecEnv.step_wait

    def leaking(self: RepFusionVecEnv) -> Any:
        kept.append(mmap.mmap(-1, 4 * memory.MIB))
        kept[-1].write(b"x" * len(kept[-1]))
        return step_wait(self)

    experiment = to_dict(memory.small_experiment("on line", material, "cpu"))
    flat = memory.flatness_of(experiment, steps=40, samples=10)
    monkeypatch.setattr(RepFusionVecEnv, "step_wait", leaking)
    grown = memory.flatness_of(experiment, steps=40, samples=10)
    assert flat["at"] == list(range(4, 41, 4)) and len(flat["host_mib"]) == 10
    assert grown["host_mib"][-1] - grown["host_mib"][0] > 120
    assert grown["growth"] > flat["growth"] + 0.02


def test_modes_are_what_their_names_say(material: Any) -> None:
    found = {mode: memory.small_experiment(mode, material, "cpu") for mode in memory.FLAT}
    assert found["on line"].cache.store == "off"
    assert found["cache in memory"].cache.store == "memory"
    assert found["cache on disk"].cache.store == "disk"
    assert found["on line, fast, compiled"].speed.compile == "on"
    assert found["on line, fast, compiled"].teacher.precision == "bf16"
    assert found["streamed images"].data.storage == "stream"
    assert set(memory.PEAKS) <= {*PUBLISHED, *(setting.name for setting in SETTINGS)}


def test_command_measures_both_and_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Here(ThreadPoolExecutor):
        """In this process: a fresh one would take seconds to import everything."""

        def __init__(self, workers: int, context: Any, max_tasks_per_child: int) -> None:
            assert (context.get_start_method(), max_tasks_per_child) == ("spawn", 1)
            super().__init__(1)

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(memory, "PEAKS", ("published step", "published work, fp32"))
    monkeypatch.setattr(memory, "FLAT", ("streamed images",))
    out = tmp_path / "memory.json"
    assert memory.main(["--smoke", "--device", "cpu", "--json", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["peaks"]) == {"published step", "published work, fp32"}
    for found in result["peaks"].values():
        assert 0 < found["base_gib"] <= found["host_gib"] and found["device_gib"] == 0
    assert result["flat"]["streamed images"]["steps"] == 20
    printed = capsys.readouterr().out
    assert "| published step | " in printed and "| streamed images | 20 | " in printed


def test_missing_folder_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        memory.main(["--json", str(tmp_path / "nowhere" / "out.json")])
    assert "--json: there is no folder" in capsys.readouterr().err
