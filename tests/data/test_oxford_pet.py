from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data

# Breeds are numbered from 1, over cats and dogs; cats' names begin with a capital letter.
BREEDS = {"Abyssinian": 1, "american_bulldog": 2, "great_pyrenees": 3}
PARTS = {"trainval": (1, 2, 3), "test": (11, 12)}
SIZE = (24, 18)


def trimap(breed: str, number: int) -> np.ndarray:
    return np.random.default_rng(number * len(breed)).integers(1, 4, (SIZE[1], SIZE[0]), np.uint8)


@pytest.fixture
def pets(tmp_path) -> Path:
    root = tmp_path / "oxford-iiit-pet"
    (root / "images").mkdir(parents=True)
    (root / "annotations" / "trimaps").mkdir(parents=True)
    for part, numbers in PARTS.items():
        lines = []
        for breed, label in BREEDS.items():
            for number in numbers:
                name = f"{breed}_{number}"
                picture = Image.new("RGB", SIZE, (label * 60, number * 10, 30))
                picture.save(root / "images" / f"{name}.jpg", quality=95)
                path = root / "annotations" / "trimaps" / f"{name}.png"
                Image.fromarray(trimap(breed, number)).save(path)
                lines.append(f"{name} {label} 1 1")
        (root / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def config(path: Path, **options: object) -> DataConfig:
    return DataConfig(name="oxford_pet", path=str(path), **options)  # type: ignore[arg-type]


def test_breeds_and_masks_are_those_that_torchvision_reads(pets):
    for bank, part in zip(load_data(config(pets)), ("trainval", "test"), strict=True):
        theirs = datasets.OxfordIIITPet(str(pets), part, ["category", "segmentation"])
        found = {}
        for image, (breed, drawn) in theirs:
            given = np.array(drawn)
            # 1 is the pet, 2 the background, and 3 the border, which does not count.
            found[np.array(image).tobytes()] = (breed, np.choose(given - 1, [1, 0, 255]).tolist())
        assert len(bank) == len(found)
        pixels = bank.images.permute(0, 2, 3, 1).contiguous().numpy()
        for row in range(len(bank)):
            breed, wanted = found[pixels[row].tobytes()]
            assert int(bank.labels[row]) == breed
            assert bank.annotations["masks"].values[row].tolist() == wanted
        assert bank.classes == tuple(name.title() for name in theirs.classes)
        assert bank.annotations["masks"].classes == ("background", "pet")


def test_the_folder_itself_is_understood(pets):
    wanted = load_data(config(pets))[0].fingerprint
    assert load_data(config(pets / "oxford-iiit-pet"))[0].fingerprint == wanted


def test_an_id_outside_the_trimaps_three_is_named_with_its_file(pets):
    path = pets / "oxford-iiit-pet" / "annotations" / "trimaps" / "Abyssinian_2.png"
    wrong = trimap("Abyssinian", 2)
    wrong[0, :4] = 0
    Image.fromarray(wrong).save(path)
    with pytest.raises(ValueError, match=r"Abyssinian_2\.png' holds the id 0 in 4 pixels; allowed"):
        load_data(config(pets))


def test_a_broken_list_and_missing_folders_are_named(pets):
    path = pets / "oxford-iiit-pet" / "annotations" / "test.txt"
    path.write_text("# a remark\n" + path.read_text().replace(" 2 1 1", " two 1 1", 1))
    with pytest.raises(ValueError, match=r"line 4 of '.*test\.txt' is 'american_bulldog_11 two 1"):
        load_data(config(pets))
    path.unlink()
    with pytest.raises(ValueError, match=r"there is no file '.*test\.txt'"):
        load_data(config(pets))
    (pets / "oxford-iiit-pet" / "images").rename(pets / "elsewhere")
    with pytest.raises(ValueError, match=r"does not hold Oxford-IIIT Pet; expected is '.*images'"):
        load_data(config(pets))


def test_a_download_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(datasets, "OxfordIIITPet", refuse)
    with pytest.raises(ValueError, match=r"^data\.download: Oxford-IIIT Pet .*or corrupted\.\)$"):
        load_data(config(tmp_path / "new", download=True))
