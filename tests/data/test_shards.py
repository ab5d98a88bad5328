from __future__ import annotations

import builtins
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data

pytest.importorskip("webdataset", reason="the extra 'webdataset' is not installed")

Sample = dict[str, bytes]


def image(red: int, size: tuple[int, int] = (6, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (red, 7, 9)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, samples: list[Sample], first: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for index, sample in enumerate(samples, first):
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"{index:05}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def labelled(*reds: int) -> list[Sample]:
    return [{"png": image(red), "cls": str(red % 3).encode()} for red in reds]


def config(path: Path | str, **options: int) -> DataConfig:
    return DataConfig(name="webdataset", path=str(path), **options)  # type: ignore[arg-type]


def reds(bank) -> list[int]:
    return bank.images[:, 0, 0, 0].tolist()


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "birds"
    write(folder / "train-000.tar", labelled(0, 1, 2, 3))
    write(folder / "train-001.tar", labelled(4, 5, 6))
    write(folder / "val-000.tar", labelled(100, 101))
    return folder


def test_a_split_on_disk_is_read_in_the_order_of_the_shards(shards):
    train, heldout = load_data(config(shards))
    assert reds(train) == list(range(7)) and reds(heldout) == [100, 101]
    assert train.labels.tolist() == [red % 3 for red in range(7)]
    assert heldout.labels.tolist() == [1, 2]
    assert train.classes == ("0", "1", "2") and train.name == "birds"
    assert train.shape == (3, 4, 6)


def test_a_pattern_names_the_shards(shards):
    train, heldout = load_data(config(shards / "{train-{000..001},val-000}.tar"))
    assert reds(train) == list(range(7)) and reds(heldout) == [100, 101]
    one, held = load_data(config(shards / "train-000.tar"))
    assert sorted([*reds(one), *reds(held)]) == [0, 1, 2, 3] and len(held) == 1
    with pytest.raises(ValueError, match=r"train-002.tar' \(1 of 3 are missing\)\. Did you mean"):
        load_data(config(shards / "train-{000..002}.tar"))


def test_without_a_split_a_fixed_fifth_is_held_out(tmp_path):
    write(tmp_path / "a.tar", labelled(*range(6)))
    write(tmp_path / "b.tar", labelled(*range(6, 10)))
    train, heldout = load_data(config(tmp_path))
    assert sorted([*reds(train), *reds(heldout)]) == list(range(10)) and len(heldout) == 2
    assert train.labels.tolist() == [red % 3 for red in reds(train)]


def test_limits_leave_later_shards_unread(shards):
    (shards / "train-001.tar").write_bytes((shards / "train-000.tar").read_bytes()[:-9000])
    write(shards / "train-001.tar", [{"png": b"broken", "cls": b"0"}])
    train, _ = load_data(config(shards, train_limit=3))
    assert reds(train) == [0, 1, 2]


def test_labels_in_json_are_numbers_or_names_and_a_file_names_numbers(tmp_path):
    names = ["wren", "crow", "wren", "owl"]
    for part, count in (("train", 4), ("val", 2)):
        samples = [
            {"png": image(red), "json": json.dumps({"label": names[red]}).encode()}
            for red in range(count)
        ]
        write(tmp_path / f"{part}-0.tar", samples)
    train, _ = load_data(config(tmp_path))
    assert train.classes == ("crow", "owl", "wren")
    assert [train.classes[label] for label in train.labels] == names


def test_a_file_names_the_numbers(shards):
    (shards / "classes.txt").write_text("wren\ncrow\nowl\n")
    assert load_data(config(shards))[0].classes == ("wren", "crow", "owl")
    (shards / "classes.txt").write_text("wren\ncrow\n")
    with pytest.raises(ValueError, match=r"reach from 0 to 2, but they must be in 0\.\.1"):
        load_data(config(shards))


def test_samples_without_any_label_are_unlabelled_and_with_some_refused(tmp_path):
    bare = [{"png": image(red)} for red in range(5)]
    write(tmp_path / "train-0.tar", bare)
    assert load_data(config(tmp_path))[0].classes == ("unlabelled",)
    write(tmp_path / "train-1.tar", labelled(7), first=5)
    with pytest.raises(ValueError, match=r"5 of 6 samples .* have no label"):
        load_data(config(tmp_path))


def test_a_sample_without_an_image_is_named(tmp_path):
    write(tmp_path / "train-0.tar", [*labelled(1), {"txt": b"words", "cls": b"1"}])
    with pytest.raises(ValueError, match=r"sample '00001' of shard '.*train-0.tar' has no image"):
        load_data(config(tmp_path))


def test_broken_shards_images_and_labels_are_named(shards):
    whole = (shards / "train-000.tar").read_bytes()
    (shards / "train-000.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"train-000.tar' is truncated or damaged"):
        load_data(config(shards))
    (shards / "train-000.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(ValueError, match=r"train-000.tar' is truncated or damaged"):
        load_data(config(shards))
    write(shards / "train-000.tar", [{"png": image(1)[:40], "cls": b"1"}, *labelled(1)])
    with pytest.raises(ValueError, match=r"'00000' of shard .*\(\.png\) is"):
        load_data(config(shards, image_size=4))
    write(shards / "train-000.tar", [{"png": image(1), "json": b"{"}])
    with pytest.raises(ValueError, match=r"the \.json of sample '00000' .* cannot be read"):
        load_data(config(shards))


def test_mixed_sizes_are_refused_unless_they_are_resized(shards):
    write(shards / "train-001.tar", [{"png": image(9, (8, 8)), "cls": b"0"}], first=4)
    with pytest.raises(ValueError, match=r"mixed size: sample '00004' .* is 8x8, the first 6x4"):
        load_data(config(shards))
    assert load_data(config(shards, image_size=4))[0].shape == (3, 4, 4)


def test_without_the_library_the_extra_is_named(shards, monkeypatch):
    original = builtins.__import__

    def without(name: str, *arguments, **keywords):
        if name == "webdataset":
            raise ModuleNotFoundError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs the library webdataset; pip install"):
        load_data(config(shards))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there are no shards"):
        load_data(config(tmp_path))
