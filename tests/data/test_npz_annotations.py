from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data

HEIGHT, WIDTH = 6, 8
COUNTS = {"train_": 5, "test_": 3}


def arrays(**changes: Any) -> dict[str, Any]:
    """Masks, keypoints and boxes of both parts; the boxes are not sorted by their images."""
    random = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for prefix, count in COUNTS.items():
        made[f"{prefix}images"] = random.integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)
        made[f"{prefix}masks"] = random.integers(0, 3, (count, HEIGHT, WIDTH), np.uint8)
        made[f"{prefix}keypoints"] = random.uniform(0, 5, (count, 4, 2)).astype(np.float32)
        made[f"{prefix}boxes"] = np.array(
            [[0.25, 0.5, 0.5, 1.0], [0, 0, 1, 1], [0.5, 0, 0.75, 0.5], [0, 0, 0.5, 0.5]], "f4"
        )
        made[f"{prefix}box_labels"] = np.array([1, 0, 1, 0], np.uint8)
        made[f"{prefix}box_image"] = np.array([2, 0, 2, 1], np.int32)
    made["mask_classes"] = np.array(["sky", "l_eye", "r_eye"])
    made["box_classes"] = np.array(["cat", "dog"])
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


def only(kind: str, **changes: Any) -> dict[str, Any]:
    """The images with one kind of annotation, and ``classes`` instead of names of its own."""
    keys = {"masks": ("masks",), "keypoints": ("keypoints",), "boxes": ("boxes", "box_")}[kind]
    kept = {k: v for k, v in arrays().items() if "images" in k or any(f"_{x}" in k for x in keys)}
    return {k: v for k, v in (kept | changes).items() if v is not None}


def write(folder: Path, content: dict[str, Any]) -> DataConfig:
    np.savez(folder / "toy.npz", **content)
    return DataConfig(name="npz", path=str(folder / "toy.npz"))


def test_all_kinds_are_read_beside_each_other_without_labels(tmp_path):
    made = arrays()
    banks = load_data(write(tmp_path, made))
    for bank, prefix in zip(banks, COUNTS, strict=True):
        assert sorted(bank.annotations) == ["boxes", "keypoints", "masks"]
        assert not bank.labelled
        masks, points = bank.annotations["masks"], bank.annotations["keypoints"]
        assert np.array_equal(masks.values.numpy(), made[f"{prefix}masks"])
        assert (masks.classes, masks.mirror) == (("sky", "l_eye", "r_eye"), (0, 2, 1))
        assert np.array_equal(points.points.numpy(), made[f"{prefix}keypoints"])
        assert points.visible.all()
        assert (points.normalizer, points.mirror) == (None, None)
        assert bank.annotations["boxes"].classes == ("cat", "dog")


def test_boxes_become_pixels_of_their_own_images(tmp_path):
    train, _ = load_data(write(tmp_path, arrays()))
    boxes = train.annotations["boxes"]
    assert boxes.boxes.shape == (5, 2, 4)
    found = [
        {(int(label), *box) for box, label in zip(*row, strict=True) if label >= 0}
        for row in zip(boxes.boxes.tolist(), boxes.labels.tolist(), strict=True)
    ]
    assert found == [
        {(0, 0, 0, 8, 6)},
        {(0, 0, 0, 4, 3)},
        {(1, 2, 3, 4, 6), (1, 4, 0, 6, 3)},
        set(),  # an image without an object is one
        set(),
    ]


def test_missing_points_are_not_visible(tmp_path):
    made = arrays()
    made["train_keypoints"][1, 2] = np.nan
    made["train_visible"] = np.ones((5, 4), bool)
    made["train_visible"][3, 0] = False
    # Where a point is not visible its place means nothing, not even that it is inside.
    made["train_keypoints"][3, 0] = 1e6
    points = load_data(write(tmp_path, made))[0].annotations["keypoints"]
    wanted = np.ones((5, 4), bool)
    wanted[1, 2] = wanted[3, 0] = False
    assert np.array_equal(points.visible.numpy(), wanted)
    assert points.points.isfinite().all()


def test_normaliser_and_mirrors_are_those_of_the_file(tmp_path):
    made = arrays(normalizer=np.array([1, 3]), mirror=np.array([1, 0, 2, 3]))
    made["mask_mirror"] = np.array([0, 1, 2])
    train, heldout = load_data(write(tmp_path, made))
    for bank in (train, heldout):
        assert bank.annotations["keypoints"].normalizer == (1, 3)
        assert bank.annotations["keypoints"].mirror == (1, 0, 2, 3)
        assert bank.annotations["masks"].mirror == (0, 1, 2)


def test_labels_keep_the_names_and_masks_are_numbered(tmp_path):
    made = only("masks", classes=np.array(["cat", "dog"]))
    made |= {"train_labels": np.array([0, 1, 0, 1, 0]), "test_labels": np.array([1, 0, 1])}
    train, heldout = load_data(write(tmp_path, made))
    assert train.classes == heldout.classes == ("cat", "dog")
    assert train.annotations["masks"].classes == ("0", "1", "2")
    named = load_data(write(tmp_path, only("masks", classes=np.array(["a", "b", "c", "d"]))))
    assert named[0].annotations["masks"].classes == ("a", "b", "c", "d")


def test_a_bank_without_split_keeps_annotations_with_their_images(tmp_path):
    count = 10
    images = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1).repeat(4, 1).repeat(4, 2)
    content = {
        "images": images,
        "masks": images,
        "keypoints": np.tile(np.arange(count, dtype=float).reshape(-1, 1, 1) / 4, (1, 2, 2)),
        "boxes": np.stack([[0, 0, 1, (row + 1) / count] for row in range(count)][::-1]),
        "box_labels": np.arange(count)[::-1],
        "box_image": np.arange(count)[::-1],
    }
    train, heldout = load_data(write(tmp_path, content))
    assert (len(train), len(heldout)) == (8, 2)
    for bank in (train, heldout):
        rows = bank.images[:, 0, 0, 0]
        assert torch.equal(bank.annotations["masks"].values[:, 3, 3], rows)
        assert torch.equal(bank.annotations["keypoints"].points[:, 1, 0] * 4, rows.float())
        assert torch.equal(bank.annotations["boxes"].labels[:, 0], rows.long())
        heights = bank.annotations["boxes"].boxes[:, 0, 3]
        torch.testing.assert_close(heights, (rows + 1) * 4 / count)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"test_masks": None}, "and no test_masks"),
        ({"train_masks": np.zeros((5, 6, 7), "u1")}, "whole numbers of shape (5, 6, 8), (M, H, W)"),
        ({"train_masks": np.zeros((5, 6, 8))}, "not float64 (5, 6, 8)"),
        ({"test_masks": np.full((3, 6, 8), 3, "u1")}, "test_masks: the mask of image 0 holds the"),
        ({"test_masks": np.full((3, 6, 8), -1)}, "test_masks holds ids from -1 to -1"),
        ({"mask_classes": np.array([1, 2])}, "mask_classes must be a list of names"),
        ({"mask_mirror": np.array([1, 0])}, "mask_mirror must be 3 whole numbers"),
        ({"mask_mirror": np.array([1, 2, 0])}, "is no exchange of 3 classes in pairs"),
        ({"train_keypoints": np.zeros((5, 4, 3))}, "numbers of shape (M, P, 2), not float64"),
        ({"train_keypoints": np.zeros((4, 4, 2))}, "5 train_images but 4 train_keypoints"),
        ({"train_keypoints": np.zeros((5, 0, 2))}, "has no points, (5, 0, 2); at least one is"),
        ({"test_keypoints": np.full((3, 4, 2), np.inf)}, "point 0 of image 0 is at (inf, inf)"),
        ({"test_keypoints": np.zeros((3, 9, 2))}, "train_keypoints has 4 and test_keypoints has 9"),
        ({"normalizer": np.array([0, 4])}, "the normaliser (0, 4) names none of the 4 points"),
        ({"normalizer": np.array([0.5, 1])}, "normalizer must be 2 whole numbers"),
        ({"mirror": np.array([1, 0])}, "mirror must be 4 whole numbers"),
        ({"train_visible": np.ones((5, 3), bool)}, "train_visible must be true or false for each"),
        ({"train_boxes": np.zeros((4, 5))}, "numbers of shape (K, 4), not float64 (4, 5)"),
        ({"train_box_labels": None}, "has boxes, but no train_box_labels"),
        ({"train_box_labels": np.zeros(3, int)}, "there are 4 boxes but 3 train_box_labels"),
        ({"train_box_labels": np.array([0, 1, 2, 0])}, "of box 2 is 2; allowed: 0..1"),
        ({"train_box_image": np.array([0, 1, 2, 5])}, "train_box_image of box 3 is 5; allowed: 0"),
        ({"train_box_image": np.zeros(4)}, "train_box_image must be whole numbers of shape (K,)"),
    ],
)
def test_wrong_arrays_are_refused_in_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        load_data(write(tmp_path, arrays(**changes)))
    assert "toy.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_point_outside_its_image_is_named(tmp_path):
    made = arrays()
    made["test_keypoints"][2, 3] = (7.6, 1.0)
    with pytest.raises(
        ValueError, match=r"test_keypoints: point 3 of image 2 is at \(7\.6, 1\), outside of .* 8x6"
    ):
        load_data(write(tmp_path, made))
    made["test_keypoints"][2, 3] = (7.5, -0.5)  # the outer edge
    assert load_data(write(tmp_path, made))[1].annotations["keypoints"].visible.all()


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ((0.5, 0.5, 0.5, 1.0), r"box 2 \(.*: 0\.5, 0\.5, 0\.5, 1\) has no area"),
        ((0.5, 0.5, 0.7, 0.2), r"box 2 .* has no area"),
        ((10, 10, 20, 30), r"box 2 .*: 10, 10, 20, 30\) reaches outside .* or is in pixels"),
        ((0.5, -0.1, 0.7, 0.2), r"box 2 .* reaches outside of its image"),
        ((0.5, np.nan, 0.7, 0.2), r"box 2 .* reaches outside of its image"),
    ],
)
def test_a_box_without_an_area_or_outside_is_named(tmp_path, box, sentence):
    made = arrays()
    made["train_boxes"][2] = box
    with pytest.raises(ValueError, match=f"train_boxes: {sentence}"):
        load_data(write(tmp_path, made))


def test_the_real_faces_come_with_masks_and_mirrored_classes(real_data):
    path = real_data / "celebamask1k_64.npz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the banks")
    train, heldout = load_data(DataConfig("npz", str(path)))
    masks = train.annotations["masks"]
    assert (len(train), len(heldout), len(masks.classes)) == (800, 200, 19)
    values = masks.values.numpy()
    # A person's left eye is on the right side of the picture, of a mirrored one on the left: their
    # names must change places. (One face in fifteen is annotated the other way round.)
    columns = np.arange(64)
    middles = {
        name: (values == label).any(1) @ columns / np.maximum((values == label).any(1).sum(1), 1)
        for label, name in enumerate(masks.classes)
        if name in ("l_eye", "r_eye")
    }
    both = (middles["l_eye"] > 0) & (middles["r_eye"] > 0)
    assert both.sum() > 700
    assert (middles["l_eye"] > middles["r_eye"])[both].mean() > 0.9
    named = dict(zip(masks.classes, masks.mirror, strict=True))
    assert masks.classes[named["l_eye"]] == "r_eye"


def test_the_real_keypoints_have_the_layout_of_sixty_eight(real_data):
    path = real_data / "ytfaces68_64.npz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the banks")
    train, _ = load_data(DataConfig("npz", str(path)))
    points = train.annotations["keypoints"]
    assert points.points.shape == (3363, 68, 2)
    assert points.normalizer == (36, 45)
    # An average face is nearly the same mirrored, with its points exchanged.
    mean = points.points.mean(0)
    mirrored = mean[list(points.mirror)] * torch.tensor([-1.0, 1.0])
    mirrored[:, 0] += 2 * mean[:, 0].mean()
    assert (mirrored - mean).norm(dim=1).max() < 2.0


def test_the_real_cells_have_boxes_within_their_images(real_data):
    path = real_data / "bccd_128.npz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the banks")
    train, heldout = load_data(DataConfig("npz", str(path)))
    counts = [int((bank.annotations["boxes"].labels >= 0).sum()) for bank in (train, heldout)]
    assert counts == [3941, 945]
    boxes = train.annotations["boxes"].boxes
    assert boxes.min() >= 0 and 100 < boxes.max() <= 128
    assert train.annotations["boxes"].classes == ("RBC", "WBC", "Platelets")
