from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data


def arrays(**changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    made = {
        "train_images": random.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "test_images": random.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8),
        "test_labels": np.array([0, 1, 2], np.uint8),
        "classes": np.array(["cat", "dog", "owl"]),
    }
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


def write(folder: Path, content: dict[str, Any]) -> DataConfig:
    np.savez(folder / "toy.npz", **content)
    return DataConfig(name="npz", path=str(folder / "toy.npz"))


def test_pixels_and_labels_come_back_channels_first(tmp_path):
    made = arrays()
    train, heldout = load_data(write(tmp_path, made))
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), made["train_images"])
    assert heldout.labels.tolist() == [0, 1, 2]
    assert train.classes == heldout.classes == ("cat", "dog", "owl")
    assert train.name == "toy"


def test_classes_are_numbered_where_they_have_no_names(tmp_path):
    train, heldout = load_data(write(tmp_path, arrays(classes=None, test_labels=[0, 1, 3])))
    assert train.classes == heldout.classes == ("0", "1", "2", "3")


def test_grey_images_without_a_channel_axis_get_one(tmp_path):
    made = arrays(train_images=np.ones((6, 4, 5), "u1"), test_images=np.ones((3, 4, 5), "u1"))
    assert load_data(write(tmp_path, made))[0].shape == (1, 4, 5)


def test_a_bank_without_split_holds_out_a_fixed_fifth(tmp_path):
    images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1).repeat(2, 1).repeat(2, 2)
    config = write(tmp_path, {"images": images, "labels": np.arange(20) % 4})
    train, heldout = load_data(config)
    assert (len(train), len(heldout)) == (16, 4)
    held = heldout.images[:, 0, 0, 0].tolist()
    assert sorted([*train.images[:, 0, 0, 0].tolist(), *held]) == list(range(20))
    assert heldout.labels.tolist() == [value % 4 for value in held]
    torch.manual_seed(99)
    assert load_data(config)[1].images[:, 0, 0, 0].tolist() == held


def test_the_real_cifar10_bank_is_read():
    folder = os.environ.get("REPFUSION_DATA")
    if not folder or not (Path(folder) / "cifar10.npz").is_file():
        pytest.skip("REPFUSION_DATA names no folder with cifar10.npz")
    path = str(Path(folder) / "cifar10.npz")
    train, heldout = load_data(DataConfig(name="cifar10", path=path))
    assert (len(train), len(heldout), train.shape) == (50_000, 10_000, (3, 32, 32))
    assert train.labels.bincount().tolist() == [5000] * 10
    assert train.name == "cifar10"
    # Published per-channel means of CIFAR-10's training images, in [0, 1].
    means = train.images[:5000].float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.491, 0.482, 0.447]), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_labels": None}, "lacks the arrays of an image bank: it needs train_images, "),
        ({"train_images": np.ones((6, 4, 5, 3))}, "train_images must be uint8 pixels (0..255)"),
        ({"train_images": np.ones((6, 4), "u1")}, "must have the shape (M, H, W, C) or (M, H, W)"),
        ({"train_images": np.ones((6, 3, 9, 8), "u1")}, "channels come last"),
        ({"train_labels": np.zeros(5, int)}, "has 6 images but 5 labels"),
        ({"train_labels": np.array([0, 1, 2, 3, 0, 0])}, "labels must be in 0..2 (3 classes)"),
        ({"test_labels": np.array([0, -1, 0])}, "from -1 to 0"),
        ({"train_labels": np.zeros(6)}, "train_labels must be whole numbers of shape (M,)"),
        ({"train_images": np.ones((0, 4, 5, 3), "u1"), "train_labels": []}, "whole numbers"),
        (
            {"test_images": np.ones((0, 4, 5, 3), "u1"), "test_labels": np.zeros(0, int)},
            "is empty: test_images has the shape (0, 4, 5, 3)",
        ),
        ({"classes": np.array([1, 2, 3])}, "classes must be a list of names"),
        ({"test_images": np.ones((3, 4, 6, 3), "u1")}, "data.image_size resizes both"),
    ],
)
def test_wrong_arrays_are_refused_in_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        load_data(write(tmp_path, arrays(**changes)))
    assert "toy" in str(caught.value)
    assert "\n" not in str(caught.value)


class Bomb:
    """Unpickling it makes a file, which shows that code has run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickled_objects_are_refused_and_never_run(tmp_path):
    bomb = np.array([Bomb(tmp_path / "ran")], dtype=object)
    with pytest.raises(
        ValueError, match=r"toy.npz' holds pickled Python objects in 'train_labels'"
    ):
        load_data(write(tmp_path, arrays(train_labels=bomb)))
    path = tmp_path / "plain.npz"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"plain.npz' is no .npz bank"):
        load_data(DataConfig(name="npz", path=str(path)))
    assert not (tmp_path / "ran").exists()


def test_a_truncated_or_damaged_file_is_named(tmp_path):
    config = write(
        tmp_path,
        arrays(train_images=np.ones((600, 4, 5, 3), "u1"), train_labels=np.zeros(600, int)),
    )
    path = tmp_path / "toy.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"toy.npz' is (truncated or damaged|no .npz bank)"):
        load_data(config)
    path.write_bytes(whole[:5000] + b"\0" * 64 + whole[5064:])
    with pytest.raises(ValueError, match=r"toy.npz' (is truncated or damaged|holds a damaged)"):
        load_data(config)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"toy.npz' is (truncated|no .npz)"):
        load_data(config)


def test_a_missing_file_and_a_single_array_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file '.*nothing.npz'"):
        load_data(DataConfig(name="npz", path=str(tmp_path / "nothing.npz")))
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"is a single array"):
        load_data(DataConfig(name="npz", path=str(tmp_path / "one.npy")))
