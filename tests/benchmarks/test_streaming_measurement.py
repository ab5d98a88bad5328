from __future__ import annotations

import json
import tarfile

import pytest

from benchmarks import streaming
from benchmarks.scaling.measured import read
from repfusion_env.data import load_data


def test_the_smoke_form_measures_every_line_and_writes_what_it_says(tmp_path, capsys):
    file = tmp_path / "streaming.json"
    assert streaming.main(["--smoke", "--device", "cpu", "--json", str(file)]) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    assert list(found["lines"]) == ["resident", "folder", "shards"]
    for name, line in found["lines"].items():
        assert len(line["seconds_per_step"]) == 2
        speeds = sorted(found["lanes"] / seconds for seconds in line["seconds_per_step"])
        assert line["decisions_per_second"]["min"] == pytest.approx(speeds[0])
        if name != "resident":
            assert 0.0 <= line["waiting"] < 1.0
            both = zip(
                found["lines"]["resident"]["seconds_per_step"],
                line["seconds_per_step"],
                strict=True,
            )
            assert line["ratio"]["max"] == pytest.approx(max(a / b for a, b in both))
        assert f"{line['decisions_per_second']['median']:.1f}" in printed
    assert found["decoding"].keys() == {"64", "224"} and found["decoding"]["64"]["1"]
    # The cost model reads what stands there, but not of a smoke run.
    with pytest.raises(ValueError, match="smoke run"):
        read([file])
    file.write_text(json.dumps({"parts": {"streaming": found}}))
    core_seconds = found["decoding"]["224"]["1"]["core_seconds"]
    assert read([file]).decoded == pytest.approx(1 / core_seconds)
    assert "streamed, shards" in printed and "waiting for images" in printed


def test_photographs_are_the_same_in_folder_and_shards_and_as_large_as_they_should_be(tmp_path):
    images = streaming.photographs(tmp_path, 12)
    with tarfile.open(images.shards / "train-0000.tar") as archive:
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}
    for path in (images.folder / "train").rglob("*.jpg"):
        assert files[path.name] == path.read_bytes()
        assert files[f"{path.stem}.cls"].decode() == path.parent.name.removeprefix("class")
    bank, _ = load_data(images.config("folder"))
    assert bank.shape == (3, streaming.HEIGHT, streaming.WIDTH)


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--json", "nowhere/at/all.json"]])
def test_a_wrong_option_is_one_sentence(capsys, wrong):
    with pytest.raises(SystemExit):
        streaming.main(wrong)
    assert wrong[0] in capsys.readouterr().err
