from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data

NAMES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


@pytest.fixture
def batches(tmp_path, monkeypatch) -> Path:
    """Python batches of the real layout with 20 images each, and torchvision told their MD5."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    classes = [f"class {index}" for index in range(10)]
    contents = {
        name: {
            "data": random.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels": random.integers(0, 10, 20).tolist(),
        }
        for name in NAMES
    }
    contents["batches.meta"] = {"label_names": classes}  # type: ignore[dict-item]
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    digest = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, digest[name]] for name in NAMES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", digest["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": digest["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return folder


def config(path: Path) -> DataConfig:
    return DataConfig(name="cifar10", path=str(path))


def test_batches_are_read_from_the_folder_or_the_one_above(batches):
    train, heldout = load_data(config(batches))
    assert (len(train), len(heldout), train.shape) == (100, 20, (3, 32, 32))
    stored = pickle.loads((batches / "data_batch_2").read_bytes())
    assert train.images[20].flatten().tolist() == stored["data"][0].tolist()
    assert train.labels[20:40].tolist() == stored["labels"]
    assert train.classes[3] == "class 3"
    above, _ = load_data(config(batches.parent))
    assert torch.equal(above.images, train.images)


def test_a_missing_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"cifar-10-batches-py' with data_batch_1 .*data\.download"
    ):
        load_data(config(tmp_path))


def test_a_missing_batch_is_named(batches):
    (batches / "data_batch_4").unlink()
    with pytest.raises(ValueError, match=r"incomplete: there is no data_batch_4"):
        load_data(config(batches))


def test_a_truncated_batch_is_refused(batches):
    path = batches / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"truncated or damaged"):
        load_data(config(batches))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_foreign_pickle_is_never_run(batches, tmp_path):
    (batches / "data_batch_1").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"its MD5 is not that of CIFAR-10"):
        load_data(config(batches))
    assert not (tmp_path / "ran").exists()
