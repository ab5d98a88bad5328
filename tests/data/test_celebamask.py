from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data
from repfusion_env.data.celebamask import CLASSES, PARTS, merged

SIDE = 16
# Face's number and its number in CelebA: the last ones before a border of the split and the first
# behind it, and a face whose masks lie in the second folder.
FACES = {0: 5, 1: 162_770, 2: 162_771, 3: 182_637, 4: 182_638, 5: 202_598, 2001: 77, 2002: 200_000}
TRAIN, TEST = (0, 1, 2001), (4, 5, 2002)
# The order in which the published tools number the parts.
PUBLISHED = [
    *("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth"),
    *("u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
]


def shapes(number: int) -> dict[str, np.ndarray]:
    """White shapes of the parts that face ``number`` has; many overlap."""
    random = np.random.default_rng(number)
    found = {}
    for part in random.permutation(PUBLISHED)[:12]:
        drawn = np.zeros((SIDE, SIDE), np.uint8)
        left, top = random.integers(0, SIDE - 6, 2)
        drawn[top : top + 6, left : left + 6] = 255
        found[str(part)] = drawn
    return found


def expected(number: int) -> np.ndarray:
    """Each pixel is of the last part that covers it."""
    ids = np.zeros((SIDE, SIDE), np.uint8)
    covering = shapes(number)
    for y in range(SIDE):
        for x in range(SIDE):
            over = [i for i, part in enumerate(PUBLISHED, 1) if covering.get(part, ids)[y, x]]
            ids[y, x] = max(over, default=0)
    return ids


@pytest.fixture
def faces(tmp_path) -> Path:
    root = tmp_path / "CelebAMask-HQ"
    (root / "CelebA-HQ-img").mkdir(parents=True)
    lines = ["idx        orig_idx        orig_file"]
    for number, original in FACES.items():
        picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), (number % 2000 * 20, 50, 60))
        picture.save(root / "CelebA-HQ-img" / f"{number}.jpg", quality=95)
        folder = root / "CelebAMask-HQ-mask-anno" / str(number // 2000)
        folder.mkdir(parents=True, exist_ok=True)
        for part, drawn in shapes(number).items():
            # As in the original, RGB with three equal channels.
            Image.fromarray(drawn).convert("RGB").save(folder / f"{number:05d}_{part}.png")
        lines.append(f"{number}\t{original}\t{original + 1:06d}.jpg")
    (root / "CelebAMask-HQ-mask-anno" / "Thumbs.db").write_bytes(b"?")
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n")
    return root


def config(path: Path, **options: object) -> DataConfig:
    options = {"image_size": SIDE} | options
    return DataConfig(name="celebamask", path=str(path), **options)  # type: ignore[arg-type]


def test_parts_are_merged_in_the_published_order_and_split_as_published(faces):
    banks = load_data(config(faces))
    for bank, numbers in zip(banks, (TRAIN, TEST), strict=True):
        assert bank.shape == (3, SIDE, SIDE)
        masks = bank.annotations["masks"]
        for row, number in enumerate(numbers):
            assert np.array_equal(masks.values[row].numpy(), expected(number)), number
        reds = bank.images[:, 0, 8, 8].int().tolist()
        assert reds == pytest.approx([number % 2000 * 20 for number in numbers], abs=4)
        assert not bank.labelled
    assert banks[0].annotations["masks"].classes == ("background", *PUBLISHED)


def test_left_and_right_change_places_in_a_mirrored_face(faces):
    mirror = load_data(config(faces))[0].annotations["masks"].mirror
    named = {CLASSES[label]: CLASSES[other] for label, other in enumerate(mirror)}
    assert {name: other for name, other in named.items() if name != other} == {
        **{"l_eye": "r_eye", "r_eye": "l_eye", "l_brow": "r_brow", "r_brow": "l_brow"},
        **{"l_ear": "r_ear", "r_ear": "l_ear"},
    }
    assert named["l_lip"] == "l_lip"  # the lower lip


def test_masks_are_brought_to_the_size_of_the_images(faces):
    train, _ = load_data(config(faces, image_size=8))
    values = train.annotations["masks"].values.numpy()
    for row, number in enumerate(TRAIN):
        # Each 2x2 block becomes one of its four pixels.
        blocks = expected(number).reshape(8, 2, 8, 2).transpose(0, 2, 1, 3).reshape(8, 8, 4)
        assert (blocks == values[row][..., None]).any(-1).all()


def test_without_a_size_images_have_that_of_the_masks(faces, monkeypatch):
    monkeypatch.setattr("repfusion_env.data.celebamask.MASK_SIDE", 16)
    assert load_data(config(faces, image_size=None))[0].shape == (3, 16, 16)


def test_limits_and_the_folder_above_are_understood(faces):
    train, heldout = load_data(config(faces.parent, train_limit=2, heldout_limit=1))
    assert (len(train), len(heldout)) == (2, 1)
    assert np.array_equal(heldout.annotations["masks"].values[0].numpy(), expected(4))


def test_a_face_without_masks_is_named_or_left_out(faces):
    for path in (faces / "CelebAMask-HQ-mask-anno" / "0").glob("00001_*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"there is no mask '.*00001_\*\.png'; expected is a file"):
        load_data(config(faces))
    with pytest.warns(RuntimeWarning, match="1 of 6 images are left out"):
        train, _ = load_data(config(faces, skip_unreadable=0.2))
    assert np.array_equal(train.annotations["masks"].values[1].numpy(), expected(2001))
    assert len(train.skipped) == 1


def test_parts_of_different_size_or_of_no_known_name_are_refused(faces):
    folder = faces / "CelebAMask-HQ-mask-anno" / "0"
    name = f"00000_{sorted(shapes(0))[0]}.png"
    Image.new("L", (8, 8)).save(folder / name)
    with pytest.raises(ValueError, match=r"the mask '.*' is (8x8|16x16), but '.*' is"):
        load_data(config(faces))
    (folder / name).rename(folder / "00000_eyebrow.png")
    with pytest.raises(ValueError, match=r"00000_eyebrow\.png' is a mask of no known part.*skin"):
        load_data(config(faces))


def test_a_mask_of_another_shape_than_its_image_is_refused(faces):
    Image.new("RGB", (40, 32)).save(faces / "CelebA-HQ-img" / "0.jpg")
    with pytest.raises(ValueError, match=r"0\.jpg' is 40x32, but .* is 16x16 .*one shape"):
        load_data(config(faces))


def test_a_missing_image_is_named(faces):
    (faces / "CelebA-HQ-img" / "4.jpg").unlink()
    with pytest.raises(ValueError, match=r"there is no file '.*CelebA-HQ-img.4\.jpg'"):
        load_data(config(faces))


def test_a_broken_layout_or_mapping_is_named(faces):
    mapping = faces / "CelebA-HQ-to-CelebA-mapping.txt"
    text = mapping.read_text()
    mapping.write_text(text.replace("\t162771\t", "\tabc\t"))
    with pytest.raises(ValueError, match=r"line 4 of '.*mapping\.txt' is '2\tabc\t"):
        load_data(config(faces))
    mapping.write_text("\n".join(text.splitlines()[:4]))
    with pytest.raises(ValueError, match=r"names no faces for testing"):
        load_data(config(faces))
    mapping.unlink()
    with pytest.raises(ValueError, match=r"there is no file '.*mapping\.txt', which says"):
        load_data(config(faces))
    (faces / "CelebA-HQ-img").rename(faces / "CelebA-HQ-imgs")
    with pytest.raises(ValueError, match=r"no folder 'CelebA-HQ-img'\. Did you mean 'CelebA-HQ-i"):
        load_data(config(faces))


def test_parts_are_named_as_the_published_tools_name_them():
    assert list(PARTS) == PUBLISHED
    with pytest.raises(ValueError, match="there is no mask of nobody"):
        merged((), "mask of nobody")
