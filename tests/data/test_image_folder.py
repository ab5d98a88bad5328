from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data


def write_image(path: Path, value: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    color = (value, 7, 9) if mode == "RGB" else value
    Image.new(mode, size, color).save(path)


def config(path: Path, **options: int) -> DataConfig:
    return DataConfig(name="folder", path=str(path), **options)  # type: ignore[arg-type]


@pytest.fixture
def plain(tmp_path) -> Path:
    """10 images in two classes without a split; the red value tells them apart."""
    for index in range(10):
        write_image(tmp_path / "pets" / ("cat" if index < 5 else "dog") / f"{index}.png", index)
    return tmp_path / "pets"


def reds(bank) -> list[int]:
    return bank.images[:, 0, 0, 0].tolist()


def test_a_split_on_disk_is_kept(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for index in range(count):
            for label, name in enumerate(("cat", "dog")):
                write_image(tmp_path / split / name / f"{index}.png", 100 * label + index)
    train, heldout = load_data(config(tmp_path))
    assert (len(train), len(heldout), train.shape) == (6, 4, (3, 4, 6))
    assert train.classes == ("cat", "dog")
    assert [red >= 100 for red in reds(train)] == train.labels.bool().tolist()
    assert sorted(reds(heldout)) == [0, 1, 100, 101]


def test_without_a_split_a_fixed_fifth_is_held_out(plain):
    train, heldout = load_data(config(plain))
    assert (len(train), len(heldout)) == (8, 2)
    assert sorted([*reds(train), *reds(heldout)]) == list(range(10))
    assert train.labels.tolist() == [int(red >= 5) for red in reds(train)]
    assert reds(load_data(config(plain))[1]) == reds(heldout)
    assert train.name == "pets"


def test_the_first_images_are_of_all_classes(tmp_path):
    for split in ("train", "val"):
        for index in range(20):
            for name in ("a", "b", "c"):
                write_image(tmp_path / split / name / f"{index}.png", index)
    train, _ = load_data(config(tmp_path, train_limit=12))
    assert set(train.labels.tolist()) == {0, 1, 2}


def test_images_stay_grey_only_where_all_are(tmp_path):
    write_image(tmp_path / "a" / "0.png", 10, mode="L")
    write_image(tmp_path / "b" / "1.png", 20, mode="L")
    assert load_data(config(tmp_path))[0].shape == (1, 4, 6)
    write_image(tmp_path / "b" / "2.png", 30)
    train, heldout = load_data(config(tmp_path))
    assert train.shape == (3, 4, 6)
    images = np.concatenate([train.images.numpy(), heldout.images.numpy()])
    assert sorted(images[:, :, 0, 0].tolist()) == [[10, 10, 10], [20, 20, 20], [30, 7, 9]]


def test_mixed_sizes_are_refused_unless_they_are_resized(plain):
    write_image(plain / "dog" / "large.png", 50, size=(12, 12))
    with pytest.raises(
        ValueError, match=r"mixed size: '.*' is .* and '.*' is .*data\.image_size"
    ) as e:
        load_data(config(plain))
    assert "large.png" in str(e.value)
    assert "12x12" in str(e.value) and "6x4" in str(e.value)
    train, heldout = load_data(config(plain, image_size=4))
    assert train.shape == heldout.shape == (3, 4, 4)


def test_a_file_that_is_no_image_is_named(plain):
    (plain / "cat" / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes.txt' is not an image"):
        load_data(config(plain))


def test_a_truncated_image_is_named(plain):
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).save(plain / "cat" / "broken.png")
    content = (plain / "cat" / "broken.png").read_bytes()
    (plain / "cat" / "broken.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"broken.png' is truncated or damaged"):
        load_data(config(plain))


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder '.*nowhere'"):
        load_data(config(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"is empty or holds no folders"):
        load_data(config(tmp_path))
    write_image(tmp_path / "a" / "0.png", 1)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"class folder '.*b' is empty"):
        load_data(config(tmp_path))


def test_splits_with_different_classes_are_refused(tmp_path):
    write_image(tmp_path / "train" / "cat" / "0.png", 1)
    write_image(tmp_path / "test" / "dog" / "0.png", 1)
    with pytest.raises(ValueError, match=r"only one of them has cat, dog"):
        load_data(config(tmp_path))


@pytest.mark.parametrize(("channels", "seen"), [(None, 1), (1, 1), (3, 3)])
def test_sixteen_bits_grey_keep_their_brightness(tmp_path, channels, seen):
    for index in range(4):
        pixels = np.full((4, 6), 12_000 * (index + 1), np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    banks = load_data(DataConfig("folder", str(tmp_path), channels=channels))
    assert banks[0].shape == (seen, 4, 6)
    assert sorted(reds(banks[0]) + reds(banks[1])) == [46, 93, 140, 187]  # 12,000 / 256 = 46.9


def test_pixels_without_a_known_range_are_refused(tmp_path):
    for index in range(2):
        Image.fromarray(np.full((4, 6), 0.5, np.float32)).save(tmp_path / f"{index}.tiff")
    with pytest.raises(ValueError, match=r"\.tiff' .*mode 'F' have no known range"):
        load_data(config(tmp_path))
