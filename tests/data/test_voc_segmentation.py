from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data

SIZE = (30, 20)
NAMES = {"train": [f"2007_{number:06d}" for number in range(6)], "val": ["2008_000001", "2008_2"]}


def ids(name: str) -> np.ndarray:
    random = np.random.default_rng(int(name.replace("_", "")))
    found = random.integers(0, 21, (SIZE[1], SIZE[0])).astype(np.uint8)
    found[random.random(found.shape) < 0.2] = 255
    return found


@pytest.fixture
def voc(tmp_path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for part, names in NAMES.items():
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            pixels = np.random.default_rng(len(name)).integers(0, 256, (SIZE[1], SIZE[0], 3), "u1")
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            indexed = Image.fromarray(ids(name))
            indexed.putpalette(np.arange(768, dtype=np.uint8).tobytes())
            indexed.save(root / "SegmentationClass" / f"{name}.png")
    return tmp_path


def config(path: Path, **options: object) -> DataConfig:
    return DataConfig(name="voc_segmentation", path=str(path), **options)  # type: ignore[arg-type]


def test_images_and_masks_are_those_that_torchvision_reads(voc):
    for bank, part in zip(load_data(config(voc)), ("train", "val"), strict=True):
        theirs = datasets.VOCSegmentation(str(voc), image_set=part)
        pairs = {(np.array(i).tobytes(), np.array(m).tobytes()) for i, m in theirs}
        values = bank.annotations["masks"].values.numpy()
        pixels = bank.images.permute(0, 2, 3, 1).contiguous().numpy()
        mine = {(i.tobytes(), m.tobytes()) for i, m in zip(pixels, values, strict=True)}
        assert mine == pairs
        assert len(bank) == len(NAMES[part])
    assert (values == 255).any()
    assert bank.annotations["masks"].classes[:2] == ("background", "aeroplane")
    assert len(bank.annotations["masks"].classes) == 21
    assert bank.annotations["masks"].mirror is None


def test_the_folder_of_a_year_and_the_one_above_are_understood(voc):
    wanted = load_data(config(voc))[0].fingerprint
    assert load_data(config(voc / "VOCdevkit"))[0].fingerprint == wanted
    assert load_data(config(voc / "VOCdevkit" / "VOC2012"))[0].fingerprint == wanted


def test_an_id_that_is_no_class_is_named_with_its_file(voc):
    wrong = ids("2007_000003")
    wrong[0, 0] = 21
    path = voc / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000003.png"
    Image.fromarray(wrong).save(path)
    with pytest.raises(ValueError, match=r"2007_000003\.png' holds the id 21 in 1 pixels; allowed"):
        load_data(config(voc))


def test_what_is_missing_is_named(voc):
    root = voc / "VOCdevkit" / "VOC2012"
    (root / "SegmentationClass" / "2008_2.png").unlink()
    with pytest.raises(ValueError, match=r"there is no mask '.*2008_2\.png'"):
        load_data(config(voc))
    lists = root / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text("")
    with pytest.raises(ValueError, match=r"val\.txt' is empty"):
        load_data(config(voc))
    (lists / "val.txt").unlink()
    with pytest.raises(ValueError, match=r"there is no file '.*val\.txt'"):
        load_data(config(voc))
    with pytest.raises(ValueError, match=r"does not hold Pascal VOC.* expected is '.*VOC2012'"):
        load_data(config(root / "JPEGImages"))


def test_a_download_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(datasets, "VOCSegmentation", refuse)
    with pytest.raises(ValueError, match=r"^data\.download: Pascal VOC 2012 .*no route to host\)$"):
        load_data(config(tmp_path / "new", download=True))


def test_what_is_there_is_not_fetched_again(voc, monkeypatch):
    monkeypatch.delattr(datasets, "VOCSegmentation")
    assert len(load_data(config(voc, download=True))[0]) == 6
