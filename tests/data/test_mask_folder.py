from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data
from repfusion_env.data.mask_files import mirrored

# Each class is one colour, so that the image itself says what its mask must be.
COLOURS = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)


def scene(seed: int, size: tuple[int, int] = (40, 24)) -> np.ndarray:
    """Ids 0..3 in rectangles, (H, W), of an image of ``size`` (W, H)."""
    random = np.random.default_rng(seed)
    ids = np.zeros((size[1], size[0]), np.uint8)
    for label in (1, 2, 3):
        left, top = int(random.integers(size[0] - 12)), int(random.integers(size[1] - 12))
        ids[top : top + 12, left : left + 12] = label
    return ids


def write(images: Path, masks: Path, name: str, ids: np.ndarray) -> None:
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS[ids % 255 % 4]).save(images / f"{name}.png")
    Image.fromarray(ids).save(masks / f"{name}.png")


@pytest.fixture
def plain(tmp_path) -> Path:
    for index in range(10):
        write(tmp_path / "images", tmp_path / "masks", f"{index}", scene(index))
    (tmp_path / "classes.txt").write_text("background\nleft_eye\nright_eye\nhat\n")
    return tmp_path


def config(path: Path, **options: object) -> DataConfig:
    return DataConfig(name="mask_folder", path=str(path), **options)  # type: ignore[arg-type]


def by_colour(images: np.ndarray) -> np.ndarray:
    """The class whose colour is nearest, (M, H, W), of pixels (M, 3, H, W)."""
    differences = images[:, None].astype(float) - COLOURS[None, :, :, None, None]
    return np.square(differences).sum(2).argmin(1)


def test_masks_stay_with_their_images_and_a_fixed_fifth_is_held_out(plain):
    train, heldout = load_data(config(plain))
    assert (len(train), len(heldout), train.shape) == (8, 2, (3, 24, 40))
    for bank in (train, heldout):
        masks = bank.annotations["masks"]
        assert np.array_equal(by_colour(bank.images.numpy()), masks.values.numpy())
        assert masks.classes == ("background", "left_eye", "right_eye", "hat")
        assert masks.mirror == (0, 2, 1, 3)
    again = load_data(config(plain))
    assert [bank.fingerprint for bank in again] == [train.fingerprint, heldout.fingerprint]


@pytest.mark.parametrize("side", [12, 16, 24])
def test_resized_masks_lie_where_their_images_do(plain, side):
    train, _ = load_data(config(plain, image_size=side))
    masks = train.annotations["masks"].values.numpy()
    assert masks.shape == (8, side, side)
    assert set(np.unique(masks)) <= {0, 1, 2, 3}
    images = train.images.numpy()
    # Away from the edges between classes, where colours mix, both must say the same.
    pure = (np.abs(images[:, None].astype(int) - COLOURS[None, :, :, None, None]).max(2) < 20).any(
        1
    )
    assert pure.mean() > 0.5
    assert np.array_equal(by_colour(images)[pure], masks[pure])


@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}"])
@pytest.mark.parametrize("names", [("train", "val", "masks"), ("training", "validation", "labels")])
def test_a_split_on_disk_is_kept(tmp_path, layout, names):
    for split, count in zip(names[:2], (3, 2), strict=True):
        for index in range(count):
            folders = [
                tmp_path / layout.format(split=split, kind=kind) for kind in ("images", names[2])
            ]
            write(*folders, f"{split}_{index}", scene(index))
    train, heldout = load_data(config(tmp_path))
    assert (len(train), len(heldout)) == (3, 2)
    for bank in (train, heldout):
        values = bank.annotations["masks"].values.numpy()
        assert np.array_equal(by_colour(bank.images.numpy()), values)
    assert train.annotations["masks"].classes == ("0", "1", "2", "3")


def test_pixels_that_do_not_count_and_palettes_are_kept(tmp_path):
    for index in range(2):
        ids = scene(index)
        ids[:3] = 255
        write(tmp_path / "images", tmp_path / "masks", f"{index}", ids)
        indexed = Image.fromarray(ids)
        indexed.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        assert indexed.mode == "P"
        indexed.save(tmp_path / "masks" / f"{index}.png")
    train, heldout = load_data(config(tmp_path))
    found = [bank.annotations["masks"].values.numpy()[0] for bank in (train, heldout)]
    wanted = [scene(index) for index in range(2)]
    for ids in wanted:
        ids[:3] = 255
    assert any(np.array_equal(found[0], ids) for ids in wanted)
    assert any(np.array_equal(found[1], ids) for ids in wanted)
    assert train.annotations["masks"].classes == ("0", "1", "2", "3")


def broken(plain: Path, name: str, ids: np.ndarray, mode: str | None = None) -> None:
    picture = Image.fromarray(ids)
    (picture.convert(mode) if mode else picture).save(plain / "masks" / name)


def test_an_id_outside_the_classes_is_named_with_its_file(plain):
    ids = scene(4)
    ids[0, :7] = 19
    broken(plain, "4.png", ids)
    with pytest.raises(
        ValueError, match=r"mask '.*4\.png' holds the id 19 in 7 pixels; allowed: 0\.\.3 \(4 cl"
    ):
        load_data(config(plain))


def test_a_mask_of_another_size_is_named_with_both_sizes(plain):
    broken(plain, "5.png", scene(5, (40, 20)))
    for options in ({}, {"image_size": 12}):
        with pytest.raises(
            ValueError, match=r"5\.png' is 40x24, but the mask '.*5\.png' is 40x20 .*one size"
        ):
            load_data(config(plain, **options))


def test_masks_of_colours_and_of_lossy_formats_are_refused(plain):
    broken(plain, "6.png", scene(6), "RGB")
    with pytest.raises(ValueError, match=r"6\.png' has pixels of mode 'RGB'.*indexed or grey PNG"):
        load_data(config(plain))
    broken(plain, "6.jpg", scene(6))
    (plain / "masks" / "6.png").unlink()
    with pytest.raises(ValueError, match=r"6\.jpg' is a JPEG, which blurs ids"):
        load_data(config(plain))


def test_an_image_without_a_mask_is_answered_with_the_closest(plain):
    (plain / "masks" / "7.png").rename(plain / "masks" / "face_7_mask.png")
    (plain / "images" / "7.png").rename(plain / "images" / "face_7.png")
    with pytest.raises(
        ValueError,
        match=r"face_7\.png' has no mask; expected is '.*face_7\.png'\. Did you mean 'fa",
    ):
        load_data(config(plain))


def test_two_masks_of_one_image_are_refused(plain):
    broken(plain, "8.bmp", scene(8))
    with pytest.raises(ValueError, match=r"8\.bmp' and '.*8\.png' are masks of one image"):
        load_data(config(plain))


def test_damaged_masks_are_left_out_as_far_as_it_is_allowed(plain):
    whole = (plain / "masks" / "2.png").read_bytes()
    (plain / "masks" / "2.png").write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"the mask '.*2\.png' is truncated or damaged"):
        load_data(config(plain))
    with pytest.warns(RuntimeWarning, match=r"1 of 10 images are left out.*2\.png"):
        banks = load_data(config(plain, skip_unreadable=0.1))
    assert sum(map(len, banks)) == 9
    assert sum(len(bank.skipped) for bank in banks) == 1
    for bank in banks:
        values = bank.annotations["masks"].values.numpy()
        assert np.array_equal(by_colour(bank.images.numpy()), values)


def test_missing_folders_and_wrong_class_lists_are_named(plain):
    (plain / "classes.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match=r"line 3 of '.*classes\.txt' repeats the class 'a'"):
        load_data(config(plain))
    (plain / "classes.txt").write_text("a\n\nb\n")
    with pytest.raises(ValueError, match=r"line 2 of '.*classes\.txt' is empty"):
        load_data(config(plain))
    (plain / "classes.txt").unlink()
    (plain / "masks").rename(plain / "mask")
    with pytest.raises(ValueError, match=r"has no folder 'masks'\. Did you mean 'mask'\?"):
        load_data(config(plain))
    with pytest.raises(ValueError, match=r"needs a folder that holds images/ and masks/"):
        load_data(DataConfig(name="mask_folder"))


def test_left_and_right_change_places_only_where_both_are_there():
    assert mirrored(("bg", "l_eye", "r_eye", "l_lip", "left arm", "right arm")) == (
        *(0, 2, 1, 3),
        *(5, 4),
    )
    assert mirrored(("bg", "cat", "l_lip")) is None
