from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data

SIZE = (64, 48)
CATEGORIES = {3: "car", 1: "person", 90: "toothbrush"}


def content(prefix: str, count: int) -> dict[str, Any]:
    """Images with one box more each, from none on; the last box of an image is around a crowd."""
    images, annotations = [], []
    for index in range(count):
        key = 100 + index
        name = f"{prefix}_{index}.png"
        images.append({"id": key, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        for box in range(index):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": key,
                    "category_id": list(CATEGORIES)[box % 3],
                    "bbox": [4.0 * box, 2.5 * box, 8.25 + box, 6.0],
                    "iscrowd": int(box == index - 1 and index > 1),
                    "area": 1.0,
                }
            )
    listed = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": listed}


def save(path: Path, folder: Path, given: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(given))
    for index, image in enumerate(given["images"]):
        Image.new("RGB", SIZE, (20 * index, 9, 9)).save(folder / image["file_name"])


@pytest.fixture
def coco(tmp_path) -> Path:
    for part, count in (("train", 5), ("val", 3)):
        path = tmp_path / "annotations" / f"instances_{part}2017.json"
        save(path, tmp_path / f"{part}2017", content(part, count))
    return tmp_path


def config(root: Path, **options: object) -> DataConfig:
    return DataConfig(name="coco", path=str(root), **{"image_size": 64, **options})  # type: ignore[arg-type]


def change(root: Path, part: str = "train", **changes: Any) -> None:
    path = root / "annotations" / f"instances_{part}2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_boxes_agree_with_the_library_that_reads_the_same_file(coco, capsys):
    banks = load_data(config(coco))
    assert [len(bank) for bank in banks] == [5, 3]
    for bank, part in zip(banks, ("train", "val"), strict=True):
        api = COCO(str(coco / "annotations" / f"instances_{part}2017.json"))
        names = [api.cats[key]["name"] for key in sorted(api.cats)]
        boxes = bank.annotations["boxes"]
        assert boxes.classes == tuple(names) == ("person", "car", "toothbrush")
        for image, places, labels in zip(bank.images, boxes.boxes, boxes.labels, strict=True):
            key = 100 + int(image[0, 32, 32]) // 20  # red says which image it is
            wanted = set()
            for annotation in api.loadAnns(api.getAnnIds(imgIds=key, iscrowd=False)):
                x, y, width, height = annotation["bbox"]
                name = api.cats[annotation["category_id"]]["name"]
                # The image is 64x48: 8 rows of grey above.
                wanted.add((name, x, y + 8, x + width, y + height + 8))
            kept = labels >= 0
            assert wanted == {
                (names[label], *box.tolist())
                for label, box in zip(labels[kept].tolist(), places[kept], strict=True)
            }
    said = capsys.readouterr().err
    assert "objects left out: 4 around crowds" in said
    assert "images without an object: 2 of 8 (train_0.png, val_0.png)" in said


def test_a_smaller_side_scales_the_boxes_and_leaves_out_what_vanishes(coco):
    large = load_data(config(coco))[0].annotations["boxes"]
    small = load_data(config(coco, image_size=16))[0].annotations["boxes"]
    assert torch.equal(small.boxes, large.boxes / 4)
    # All are 6 pixels high: less than one at an eighth, unless one is made higher.
    with pytest.raises(ValueError, match=r"holds an object of a pixel or more at data\.image_size"):
        load_data(config(coco, image_size=8))
    for part, count in (("train", 5), ("val", 3)):
        given = content(part, count)
        given["annotations"][0]["bbox"][3] = 8.0
        change(coco, part, **given)
    tiny = load_data(config(coco, image_size=8))[0].annotations["boxes"]
    assert (large.labels >= 0).sum() == 7 and (tiny.labels >= 0).sum() == 1


def test_exported_and_single_file_layouts_are_read(tmp_path):
    for folder, count in (("train", 5), ("valid", 3)):
        root = tmp_path / "exported" / folder
        save(root / "_annotations.coco.json", root, content(folder, count))
    train, heldout = load_data(config(tmp_path / "exported"))
    assert (len(train), len(heldout)) == (5, 3)
    single = tmp_path / "single"
    save(single / "labels.json", single / "images", content("a", 10))
    train, heldout = load_data(config(single))
    assert (len(train), len(heldout)) == (8, 2)
    reds = torch.cat([bank.images[:, 0, 32, 32] for bank in (train, heldout)])
    assert sorted(reds.tolist()) == [20 * index for index in range(10)]


def test_grey_and_limits(coco):
    train, heldout = load_data(config(coco, channels=1, train_limit=4, heldout_limit=2))
    assert (len(train), len(heldout), train.shape) == (4, 2, (1, 64, 64))
    assert torch.equal(train.images[:, 0, 0, 0], torch.full((4,), 128, dtype=torch.uint8))


def annotated(**changes: Any) -> dict[str, Any]:
    """An annotation of the training image 104 in place of its last one."""
    given = content("train", 5)
    given["annotations"][-2] |= changes
    return given


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"annotation 8 has the bbox \[1, 2, 3\]; expected are x, y, width"),
        ({"bbox": [1, 2, "3", 4]}, "expected are x, y, width, height"),
        ({"bbox": [1, 2, float("nan"), 4]}, "expected are x, y, width, height"),
        ({"bbox": [1, 2, 10**400, 4]}, "expected are x, y, width, height"),
        ({"bbox": [9.98, 8.56, 5.54, 0.0]}, r"box 2 \('toothbrush'\) has no area"),
        ({"bbox": [9, 8, -5, 4]}, "has no area: left, top, right, bottom are 9, 8, 4, 12"),
        ({"bbox": [90, 8, 5, 4]}, "lies outside the image of 64x48"),
        ({"category_id": 7}, "annotation 8 is of the category 7; the file names 1 person, 3 car"),
        ({"category_id": [7]}, r"is of the category \[7\]"),
    ],
)
def test_a_wrong_annotation_is_refused_with_its_image_or_left_out(coco, changes, message):
    change(coco, **annotated(**changes))
    with pytest.raises(ValueError, match=message) as error:
        load_data(config(coco))
    assert "instances_train2017.json': image 'train_4.png'" in str(error.value)
    with pytest.warns(RuntimeWarning, match="1 of 8 images are left out"):
        train, heldout = load_data(config(coco, skip_unreadable=0.2))
    assert (len(train), len(heldout), len(train.skipped)) == (4, 3, 1)
    assert 80 not in train.images[:, 0, 32, 32].tolist()


def images(**changes: Any) -> dict[str, Any]:
    given = content("train", 5)
    given["images"][1] |= changes
    return given


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            images(file_name="lost.png"),
            r"train2017' lacks the image 'lost.png' that '.*json' lists",
        ),
        (images(file_name="../val2017/val_0.png"), r"names the image '\.\./val2017/val_0\.png'"),
        (images(file_name="/etc/a.png"), r"names the image '/etc/a\.png'; expected is a file in"),
        (images(file_name="a" * 5000), "lacks the image 'aaa"),
        (images(file_name="a\0.png"), "lacks the image 'a"),
        (images(file_name=None), "image 101 has no file_name"),
        (images(width=48, height=64), "was made for an image of 48x64, but .* has 64x48"),
        (images(id=None), "image 1 of its list has no id"),
        (images(id=100), "lists the image 100 twice"),
        ({"images": []}, "lists no images"),
        ({"images": "all"}, "lacks the lists images; COCO's format has images, annotations, cat"),
        (
            {"annotations": [{"image_id": 5}]},
            "annotation 0 of its list belongs to the image 5, whi",
        ),
        ({"annotations": [3]}, "annotation 0 of its list belongs to the image None"),
        ({"annotations": [{"image_id": [1]}]}, r"belongs to the image \[1\]"),
        ({"categories": [{"id": "a", "name": "b"}]}, "category 0 of its list needs a whole number"),
        ({"categories": []}, "names none"),
        ({"categories": [{"id": 1, "name": "b"}, {"id": 2, "name": "b"}]}, "category 'b' twice"),
        ({"categories": [{"id": 1, "name": "b"}, {"id": 1, "name": "c"}]}, "gives one id to sever"),
        (
            {"categories": [{"id": 1, "name": "persons"}]},
            r"lacks the categories persons .* Did you",
        ),
    ],
)
def test_a_broken_file_is_refused_by_name(coco, changes, message):
    change(coco, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_data(config(coco))
    assert str(coco) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "[" * 100_000, "\0\1", "nothing"])
def test_what_is_no_json_is_refused(coco, text):
    (coco / "annotations" / "instances_val2017.json").write_text(text)
    with pytest.raises(ValueError, match=r"instances_val2017\.json' is no JSON, or truncated"):
        load_data(config(coco))


def test_damaged_images_are_named(coco):
    path = coco / "val2017" / "val_1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"val_1\.png' is truncated or damaged"):
        load_data(config(coco))
    with pytest.warns(RuntimeWarning, match="1 of 8 images are left out"):
        train, heldout = load_data(config(coco, skip_unreadable=0.2))
    assert (len(train), len(heldout)) == (5, 2)


def test_other_layouts_are_refused_with_what_is_expected(coco):
    (coco / "train2017").rename(coco / "pictures")
    with pytest.raises(ValueError, match=r"needs a file instances_val2017\.json .* train2017 in"):
        load_data(config(coco))
    (coco / "annotations").rename(coco / "annotation")
    with pytest.raises(ValueError, match=r"none of COCO's layouts.* Did you mean 'annotation'\?"):
        load_data(config(coco))
    with pytest.raises(ValueError, match=r"data.image_size: data.name 'coco' needs a side"):
        load_data(config(coco, image_size=None))
