"""The cost model against processes of this machine: all-reduces, ranks, and the files of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling.checks import fit_ring, predicted_ratio
from benchmarks.scaling.collectives import measure
from benchmarks.scaling.hardware import ring
from benchmarks.scaling.measured import read
from benchmarks.scaling.networks import student
from benchmarks.scaling.tables import ring_table


def _collectives(bandwidth: float, hop: float) -> list[dict[str, Any]]:
    return [
        {"ranks": ranks, "bytes": size, "seconds": {"median": ring(size, ranks, bandwidth, hop)}}
        for ranks in (2, 4)
        for size in (4096, 1 << 20, 1 << 26)
    ]


def test_the_ring_fit_finds_bandwidth_and_hop() -> None:
    found = fit_ring(_collectives(2e9, 3e-4))
    assert found.bandwidth == pytest.approx(2e9)
    assert found.hop == pytest.approx(3e-4)
    assert found.error < 1e-6


@pytest.mark.slow
@pytest.mark.long
def test_all_reduces_of_real_processes_are_timed() -> None:
    sizes = (4096, 8192)
    found = measure(ranks=(2,), sizes=sizes, rounds=2)
    assert [(result["by"], result["ranks"], result["bytes"]) for result in found] == [
        (way, 2, size) for way in ("gloo", "ranks") for size in sizes
    ]
    assert all(0 < result["seconds"]["min"] <= result["seconds"]["max"] for result in found)


def test_two_processes_are_predicted_from_one() -> None:
    net = student("resnet18", 32)
    free = fit_ring(_collectives(1e15, 1e-12))
    assert predicted_ratio(10.0, 2, net, free, traffic=1e15) == pytest.approx(2.0, rel=1e-3)
    # The optimizer's part is done by both.
    traffic = 32 * net.parameters / 2.0
    assert predicted_ratio(10.0, 2, net, free, traffic) == pytest.approx(10 / 6, rel=1e-3)
    slow = fit_ring(_collectives(1e8, 1e-12))
    seconds = 4 * net.parameters / 1e8
    assert predicted_ratio(10.0, 2, net, slow, 1e15) == pytest.approx(10 / (5 + seconds), rel=0.01)


def test_files_that_hold_no_measurement_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for content, message in (
        ('{"parts": {}, "smoke": true}', "smoke run"),
        ('{"gradient_error": 1e-7, "smoke": true}', "smoke run"),
        ('{"other": 1}', "none of the files that are read"),
        ("[1]", "holds a list"),
        ("{", "is no JSON file"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read([path])
    with pytest.raises(ValueError, match="cannot be read"):
        read([tmp_path / "missing.json"])


def test_ranks_and_streaming_are_read_as_parts_and_by_themselves(tmp_path: Path) -> None:
    line = {"one": {"median": 6.4}, "seconds_one": [10.0, 10.0], "speedup": {"median": 1.9}}
    ranks = {"gradient_error": 1e-7, "lines": {"default": line}}
    streaming = {"decoding": {s: {"1": {"core_seconds": int(s) / 1e5}} for s in ("64", "200")}}
    whole = {"size": {"student": "resnet18"}, "parts": {"ranks": ranks, "streaming": streaming}}
    # Gloo's time is another; the ranks of one machine do not use it.
    free = {
        "collectives": [
            {"by": way} | one
            for way, bandwidth in (("gloo", 1e6), ("ranks", 1e15))
            for one in _collectives(bandwidth, 1e-12)
        ]
    }
    paths = []
    for number, content in enumerate((whole, ranks, streaming, free)):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(content), encoding="utf-8")
    together, alone, decoded, collectives = paths
    for files in ([together, collectives], [alone, decoded, collectives]):
        found = read(files)
        assert found.decoded == pytest.approx(500)
        (check,) = found.ranks
        assert (check.name, check.alone, check.ranks, check.measured) == ("default", 6.4, 2, 1.9)
        assert check.predicted == pytest.approx(2.0, rel=1e-3)
        assert found.ring is not None and found.shared is not None
        rows = ring_table(found.ring, found.shared).splitlines()
        assert rows[0].startswith("Fitted: gloo 0.00 GB/s one way")
        assert "| 2 | 4 KiB | 4.096 | 4.096 | 0.000 | 0.000 |" in rows
    assert read([alone, decoded]).ranks == ()
