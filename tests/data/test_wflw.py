from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import grid_sample

from repfusion_env.config import DataConfig
from repfusion_env.config_loading import check
from repfusion_env.data import load_data
from repfusion_env.data.faces import LAYOUTS
from repfusion_env.data.squares import Square, around, cut

SIZE = (240, 180)  # width, height of the images
LISTS = "WFLW_annotations/list_98pt_rect_attr_train_test"
BOX = (60, 40, 140, 130)


def gradient(size: tuple[int, int] = SIZE) -> Image.Image:
    """Red is the column and green the row of each pixel: the image says where a place was."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 77)], 2).astype(np.uint8))


def source_places(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Which column and row of the gradient is seen at points (P, 2) of a bank's image."""
    side = image.shape[-1]
    grid = (points + 0.5) * 2 / side - 1
    seen = grid_sample(image[None].float(), grid[None, None], align_corners=False)
    return seen[0, :2, 0].T


def points(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.uniform((65, 45), (135, 125), (98, 2))


def line(
    name: str,
    places: np.ndarray,
    box: tuple[float, ...] = BOX,
    attributes: tuple[int, ...] = (0, 0, 0, 0, 0, 0),
) -> str:
    return " ".join(map(str, [*places.flatten(), *box, *attributes, name]))


@pytest.fixture
def wflw(tmp_path) -> Path:
    """Six training and four test faces in two event folders; the second half are large poses."""
    root = tmp_path / "WFLW"
    (root / LISTS).mkdir(parents=True)
    for part, count in (("train", 6), ("test", 4)):
        lines = []
        for index in range(count):
            name = f"{index % 2}--Event/{part}_{index}.png"
            path = root / "WFLW_images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            gradient().save(path)
            flags = (int(index >= count // 2), 0, 0, 0, 0, index % 2)
            lines.append(line(name, points(index), attributes=flags))
        (root / LISTS / f"list_98pt_rect_attr_{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def config(root: Path, **options: object) -> DataConfig:
    return DataConfig(name="wflw", path=str(root), **{"image_size": 64, **options})  # type: ignore[arg-type]


def rewrite(root: Path, number: int, text: str, part: str = "train") -> None:
    path = root / LISTS / f"list_98pt_rect_attr_{part}.txt"
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


def test_points_stay_on_what_they_mark_when_faces_are_cut_out(wflw):
    train, heldout = load_data(config(wflw))
    assert (len(train), len(heldout), train.shape) == (6, 4, (3, 64, 64))
    keypoints = train.annotations["keypoints"]
    assert keypoints.visible.all()
    written = [torch.from_numpy(points(index)).float() for index in range(6)]
    found = set()
    for image, places in zip(train.images, keypoints.points, strict=True):
        seen = source_places(image, places)
        errors = [float((seen - mine).abs().max()) for mine in written]
        found.add(int(np.argmin(errors)))
        assert min(errors) < 1.0  # of the gradient's whole numbers
    assert found == set(range(6))


def test_the_square_is_the_face_box_with_its_margin(wflw):
    plain = load_data(config(wflw, margin=0.0))[0]
    # The box is 80x90: a square of 90 around (100, 85), rows 40..129.
    corner = plain.images[0, :2, 0, 0].tolist()
    assert corner == pytest.approx([55, 40], abs=1)
    wide = load_data(config(wflw, margin=0.5))[0]
    assert wide.images[0, :2, 0, 0].tolist() == pytest.approx([100 - 67.5, 85 - 67.5], abs=2)
    # A point outside of the detector's box is not cut off.
    outer = points(0)
    outer[5] = (20.0, 85.0)
    rewrite(wflw, 1, line("0--Event/train_0.png", outer))
    places = load_data(config(wflw, margin=0.0))[0].annotations["keypoints"].points
    assert places.min() > -0.5 - 1e-3 and places.max() < 63.5 + 1e-3


def test_what_a_square_shows_beyond_the_image_is_grey(wflw):
    rewrite(wflw, 1, line("0--Event/train_0.png", points(0), box=(0, 40, 140, 130)))
    bank = load_data(config(wflw, margin=1.0, train_limit=None))[0]
    edges = bank.images[:, :, 32, 0]
    grey = (edges == 128).all(1)
    assert int(grey.sum()) == 1


def test_the_layouts_mirror_the_points_of_wflw_and_ibug():
    ends = {
        98: {
            **{0: 32, 15: 17, 33: 46, 37: 42, 38: 50, 41: 47, 55: 59, 56: 58, 60: 72, 64: 68},
            **{65: 75, 67: 73, 76: 82, 78: 80, 83: 87, 84: 86, 88: 92, 89: 91, 93: 95, 96: 97},
        },
        68: {
            **{0: 16, 7: 9, 17: 26, 21: 22, 31: 35, 32: 34, 36: 45, 39: 42, 40: 47, 41: 46},
            **{48: 54, 50: 52, 55: 59, 56: 58, 60: 64, 61: 63, 65: 67},
        },
    }
    middle = {
        98: {16, 51, 52, 53, 54, 57, 79, 85, 90, 94},
        68: {8, 27, 28, 29, 30, 33, 51, 57, 62, 66},
    }
    for count, pairs in ends.items():
        mirror = LAYOUTS[count].mirror(count)
        assert all(mirror[left] == right and mirror[right] == left for left, right in pairs.items())
        assert {point for point, other in enumerate(mirror) if point == other} == middle[count]
        assert all(mirror[mirror[point]] == point for point in range(count))


def test_normalizer_and_mirror_come_with_the_bank(wflw):
    keypoints = load_data(config(wflw))[1].annotations["keypoints"]
    assert keypoints.normalizer == (60, 72)
    assert keypoints.mirror == LAYOUTS[98].mirror(98)


def test_an_attribute_selects_held_out_faces_alone(wflw):
    train, pose = load_data(config(wflw, subset="pose"))
    assert (len(train), len(pose)) == (6, 2)
    everything = load_data(config(wflw))[1].annotations["keypoints"].points
    of_pose = pose.annotations["keypoints"].points
    assert all(any(torch.equal(one, other) for other in everything) for one in of_pose)
    with pytest.raises(ValueError, match=r"no attribute 'largepose'.* Did you mean 'pose'\?"):
        load_data(config(wflw, subset="largepose"))
    with pytest.raises(ValueError, match="no face with the attribute 'makeup'"):
        load_data(config(wflw, subset="makeup"))


def test_limits_take_the_first_of_a_fixed_random_order(wflw):
    few = load_data(config(wflw, train_limit=3))[0]
    all_six = load_data(config(wflw))[0]
    assert torch.equal(few.images, all_six.images[:3])
    places = few.annotations["keypoints"].points
    assert torch.equal(places, all_six.annotations["keypoints"].points[:3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3 a.png", r"line 2 of .*train.txt' has 4 entries; expected are 207"),
        (line("a.png", points(0)).replace(" 60 ", " sixty ", 1), "holds 'sixty' where a number"),
        (line("a.png", points(0), attributes=(0, 0, 2, 0, 0, 0)), "each must be 0 or 1"),
        (line("a.png", np.full((98, 2), np.nan)), "no finite number"),
        (line("../../a.png", points(0)), r"names the image '\.\./\.\./a\.png'; expected is a file"),
        (line("0--Event/lost.png", points(0)), r"there is no image '.*lost\.png'"),
        (
            line("0--Event/train_0.png", points(0), box=(60, 40, 60, 130)),
            "the face box 60, 40, 60, 130 without an area",
        ),
        (
            line("0--Event/train_0.png", points(0), box=(250, 40, 290, 130)),
            r"the face box 250, 40, 290, 130 outside the image .*train_0.png' of 240x180",
        ),
        (
            line("0--Event/train_0.png", points(0) + [[5000.0, 0.0]] * 98),
            r"line 2 of .* has point 0 at x .*, far outside the image .*train_0.png' of 240x180",
        ),
        (
            line("0--Event/train_0.png", np.full((98, 2), 50.0), box=(49.8, 49.8, 50.3, 50.3)),
            "all its points within one pixel",
        ),
    ],
)
def test_a_wrong_line_is_refused_with_its_number_or_left_out(wflw, text, message):
    rewrite(wflw, 2, text)
    with pytest.raises(ValueError, match=message):
        load_data(config(wflw))
    with pytest.warns(RuntimeWarning, match="1 of 10 images are left out"):
        train, heldout = load_data(config(wflw, skip_unreadable=0.1))
    assert (len(train), len(heldout), len(train.skipped), heldout.skipped) == (5, 4, 1, ())
    assert source_places(train.images[0], train.annotations["keypoints"].points[0]).min() > 40


def test_a_damaged_image_is_named(wflw):
    path = wflw / "WFLW_images" / "0--Event" / "train_2.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"train_2.png' is truncated or damaged"):
        load_data(config(wflw))


def test_what_is_missing_is_named(wflw):
    with pytest.raises(ValueError, match=r"data.image_size: data.name 'wflw' needs a side"):
        load_data(config(wflw, image_size=None))
    (wflw / LISTS / "list_98pt_rect_attr_test.txt").unlink()
    with pytest.raises(ValueError, match=r"there is no list_98pt_rect_attr_test\.txt"):
        load_data(config(wflw))
    (wflw / "WFLW_annotations").rename(wflw / "WFLW_annotation")
    with pytest.raises(ValueError, match=r"is not WFLW.* Did you mean 'WFLW_annotation'\?"):
        load_data(config(wflw))


def test_a_large_jpeg_is_cut_at_the_same_place_as_without_its_reduced_decoding(tmp_path):
    x, y = np.meshgrid(np.arange(1001), np.arange(777))
    smooth = np.stack([x / 4, y / 4, (x + y) / 8], 2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    square = Square(101.5, 33.25, 640.0)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.draft(None, (400, 300)) is not None  # or this test compares nothing
    with Image.open(tmp_path / "a.jpg") as image:
        reduced = cut(image, square, 32, 3)
    with Image.open(tmp_path / "a.jpg") as image:
        whole = cut(image.convert("RGB"), square, 32, 3)
    assert (reduced.int() - whole.int()).abs().max() <= 2
    at = torch.arange(32) * 20 + 10 + 101.5 - 0.5  # centres of the 32 columns, in the image
    assert (whole[0, 16].float() - at / 4).abs().max() < 1.5


def test_a_square_lies_around_the_middle_of_a_box():
    assert around((10, 20, 30, 60), 0.5) == Square(-10.0, 10.0, 60.0)
    corners = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert around((10, 20, 30, 60)).boxes(corners, 80).tolist() == [[20.0, 0.0, 60.0, 80.0]]


def test_sets_without_subsets_or_a_side_are_refused_before_anything_is_read():
    data = {"name": "coco", "path": "somewhere", "subset": "pose"}
    with pytest.raises(
        ValueError, match=r"data\.subset: 'pose' given, but .* pts and wflw have"
    ) as e:
        check({"data": data})
    assert "data.image_size: data.name 'coco' needs a side in pixels" in str(e.value)
    data = {"name": "wflw", "path": "somewhere", "subset": "pose", "image_size": 64}
    assert check({"data": data}).data.subset == "pose"
