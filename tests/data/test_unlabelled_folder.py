from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data
from repfusion_env.data.pseudo_labels import require_labels


def write_image(path: Path, value: int, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 7, 9)).save(path)


def config(path: Path, **options: int) -> DataConfig:
    return DataConfig(name="folder", path=str(path), **options)  # type: ignore[arg-type]


def reds(*banks) -> list[int]:
    return [red for bank in banks for red in bank.images[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize(
    "names",
    [
        [f"{index}.png" for index in range(10)],
        [f"2024/{index % 2}/{index}.png" for index in range(10)],
        [f"{index}.png" if index else "more/0.png" for index in range(10)],
        [f"photos/{index}.png" for index in range(10)],
    ],
    ids=["flat", "nested", "both", "one folder"],
)
def test_images_without_class_folders_are_unlabelled(tmp_path, names):
    for index, name in enumerate(names):
        write_image(tmp_path / name, index)
    (tmp_path / "notes.txt").write_text("no image")
    train, heldout = load_data(config(tmp_path))
    assert sorted(reds(train, heldout)) == list(range(10))
    assert (len(train), len(heldout)) == (8, 2)
    assert train.classes == ("unlabelled",) and not train.labelled
    assert set(train.labels.tolist()) == {0}


def test_a_split_on_disk_is_kept_without_classes(tmp_path):
    for index in range(6):
        write_image(tmp_path / ("train" if index < 4 else "val") / f"{index}.png", index)
    train, heldout = load_data(config(tmp_path))
    assert sorted(reds(train)) == [0, 1, 2, 3] and sorted(reds(heldout)) == [4, 5]
    assert not train.labelled


def test_classes_on_one_side_of_the_split_only_are_refused(tmp_path):
    write_image(tmp_path / "train" / "cat" / "0.png", 1)
    write_image(tmp_path / "train" / "dog" / "0.png", 1)
    write_image(tmp_path / "val" / "0.png", 1)
    with pytest.raises(ValueError, match=r"val' has no class folders, but '.*train' has"):
        load_data(config(tmp_path))


def test_the_sentence_for_whoever_needs_labels_names_the_way_without(tmp_path):
    for index in range(2):
        write_image(tmp_path / f"{index}.png", index)
    train, _ = load_data(config(tmp_path))
    with pytest.raises(ValueError, match=r"the control needs them; .*data\.labels clusters"):
        require_labels(train, "the control")


def test_wrong_names_are_answered_with_the_closest(tmp_path):
    write_image(tmp_path / "holiday" / "0.png", 1)
    with pytest.raises(ValueError, match=r"no folder '.*holidays'. Did you mean 'holiday'\?"):
        load_data(config(tmp_path / "holidays"))
    for part, name in (("train", "zebra"), ("val", "zebar")):
        write_image(tmp_path / "set" / part / name / "0.png", 1)
        write_image(tmp_path / "set" / part / "ant" / "0.png", 1)
    with pytest.raises(ValueError, match=r"has zebar, zebra\. Did you mean 'zebra'\?"):
        load_data(config(tmp_path / "set"))


def test_resizing_is_antialiased_and_cuts_the_middle(tmp_path):
    # Columns of 0 and 255 in turn, between margins that the middle square does not reach.
    stripes = torch.zeros(64, 128, dtype=torch.uint8)
    stripes[:, 32:96:2] = 255
    for index in range(2):
        Image.fromarray(stripes.numpy()).save(tmp_path / f"{index}.png")
    train, _ = load_data(config(tmp_path, image_size=8))
    assert train.shape == (1, 8, 8)
    assert (train.images[..., 1:-1].float() - 127.5).abs().max() < 1  # nearest would be 0 or 255
    assert train.images.min() > 100  # uncut, the margins would be 0


@pytest.mark.parametrize("side", [None, 8])
def test_channels_are_those_asked_for_and_sizes_those_on_disk(tmp_path, side):
    for index in range(4):
        write_image(tmp_path / f"{index}.png", 30 * index)
    train, _ = load_data(DataConfig("folder", str(tmp_path), image_size=side, channels=1))
    assert train.shape == (1, side or 4, side or 6)
    # ITU-R BT.601 luma of (30 i, 7, 9)
    lumas = {round(0.299 * 30 * index + 0.587 * 7 + 0.114 * 9) for index in range(4)}
    assert set(train.images[:, 0, 0, 0].tolist()) <= lumas


def test_images_beyond_the_memory_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    for index in range(10):
        write_image(tmp_path / f"{index}.png", index)
    monkeypatch.setattr("repfusion_env.data.memory.machine_memory", lambda: 10 * 3 * 8 * 8 - 1)
    monkeypatch.setattr("repfusion_env.data.decode.decoded", None)
    with pytest.raises(ValueError, match=r"8 training and 2 held-out images of 3x8x8 need .*GiB"):
        load_data(config(tmp_path, image_size=8))


def test_many_files_come_back_in_their_order(tmp_path):
    for index in range(200):
        write_image(tmp_path / "train" / f"{index:03}.png", index, size=(2, 2))
    write_image(tmp_path / "val" / "0.png", 250, size=(2, 2))
    from repfusion_env.data.splits import permutation

    train, heldout = load_data(config(tmp_path))
    assert reds(train) == permutation(200).tolist()
    assert reds(heldout) == [250]
