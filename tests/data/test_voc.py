from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data
from repfusion_env.data.voc import CLASSES

SIZE = (100, 60)
COLOURS = {"cat": (250, 10, 10), "dog": (10, 250, 10), "person": (10, 10, 250)}
# As VOC counts: the first pixel is 1 and the last one belongs to the box.
Object = tuple[str, tuple[float, float, float, float], int]
OBJECTS: list[Object] = [("cat", (11, 21, 40, 50), 0), ("dog", (61, 1, 100, 30), 0)]


def xml(objects: list[Object], size: tuple[int, int] = SIZE) -> str:
    rows = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox><xmax>{box[2]}</xmax><xmin>{box[0]}</xmin>"
        f"<ymax>{box[3]}</ymax><ymin>{box[1]}</ymin></bndbox>"
        f"<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        for name, box, difficult in objects
    )
    return (
        f"<annotation><filename>old.jpg</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height><depth>3</depth></size>{rows}</annotation>"
    )


def write(year: Path, name: str, objects: list[Object], size: tuple[int, int] = SIZE) -> None:
    """An image with its objects drawn as filled boxes, and their annotation."""
    image = Image.new("RGB", size, (0, 0, 0))
    for kind, (left, top, right, bottom), _ in objects:
        # Pillow's last pixel belongs to the box too.
        ImageDraw.Draw(image).rectangle((left - 1, top - 1, right - 1, bottom - 1), COLOURS[kind])
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / folder).mkdir(parents=True, exist_ok=True)
    image.save(year / "JPEGImages" / f"{name}.png")
    (year / "Annotations" / f"{name}.xml").write_text(xml(objects, size))


def lists(year: Path, **parts: list[str]) -> None:
    for part, names in parts.items():
        (year / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names) + "\n")


@pytest.fixture
def voc(tmp_path) -> Path:
    year = tmp_path / "VOCdevkit" / "VOC2007"
    for index in range(6):
        write(year, f"{index:06}", OBJECTS[: 1 + index % 2])
    names = [f"{index:06}" for index in range(6)]
    lists(year, train=names[:3], val=names[3:4], trainval=names[:4], test=names[4:])
    return tmp_path


def config(root: Path, **options: object) -> DataConfig:
    return DataConfig(name="voc", path=str(root), **{"image_size": 50, **options})  # type: ignore[arg-type]


def test_boxes_fit_what_is_drawn_and_the_whole_image_is_kept(voc):
    train, heldout = load_data(config(voc))
    assert (len(train), len(heldout), train.shape) == (4, 2, (3, 50, 50))
    found = 0
    for bank in (train, heldout):
        boxes = bank.annotations["boxes"]
        for image, places, labels in zip(bank.images, boxes.boxes, boxes.labels, strict=True):
            # 100x60 becomes 50x30, between two bars of grey of 10 rows each (and a soft edge).
            assert (image[:, [*range(9), *range(41, 50)]] == 128).all()
            assert not (image[:, [10, 39]] == 128).any()
            for box, label in zip(places, labels.tolist(), strict=True):
                if label < 0:
                    continue
                channel = list(COLOURS).index(CLASSES[label])
                others = [c for c in range(3) if c != channel]
                drawn = (image[channel] > 128) & (image[others] < 100).all(0)
                rows, columns = drawn.any(1).nonzero()[:, 0], drawn.any(0).nonzero()[:, 0]
                around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert box.tolist() == pytest.approx([int(edge) for edge in around], abs=0.51)
                found += 1
    assert found == 9


def test_boxes_are_those_of_the_file_without_its_counting_from_one(voc):
    boxes = load_data(config(voc, image_size=100))[1].annotations["boxes"]
    row = int((boxes.labels >= 0).sum(1).argmax())
    places = dict(zip(boxes.labels[row].tolist(), boxes.boxes[row].tolist(), strict=True))
    # 20 rows of grey above.
    assert places[CLASSES.index("cat")] == [10.0, 40.0, 40.0, 70.0]
    assert places[CLASSES.index("dog")] == [60.0, 20.0, 100.0, 50.0]


def test_the_folder_the_year_and_the_one_above_are_the_same(voc):
    prints = {
        load_data(config(root))[0].fingerprint
        for root in (voc, voc / "VOCdevkit", voc / "VOCdevkit" / "VOC2007")
    }
    assert len(prints) == 1


def test_a_test_list_makes_trainval_of_every_year_the_training_images(voc):
    year = voc / "VOCdevkit" / "VOC2012"
    for index in range(3):
        write(year, f"2012_{index}", OBJECTS)
    lists(year, trainval=["2012_0", "2012_1"], train=["2012_0"], val=["2012_1"], test=["2012_9"])
    assert [len(bank) for bank in load_data(config(voc))] == [6, 2]
    # Without the test list of 2007, that of 2012 without annotations does not count.
    (voc / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "test.txt").unlink()
    assert [len(bank) for bank in load_data(config(voc))] == [4, 2]


def test_without_lists_a_fifth_is_held_out(tmp_path):
    for index in range(10):
        write(tmp_path, str(index), [("cat", (10 + index, 10, 40, 40), 0)])
    train, heldout = load_data(config(tmp_path, image_size=100))
    assert (len(train), len(heldout)) == (8, 2)
    lefts = [bank.annotations["boxes"].boxes[:, 0, 0].tolist() for bank in (train, heldout)]
    assert sorted(lefts[0] + lefts[1]) == list(range(9, 19))


def test_difficult_objects_are_left_out_and_empty_images_kept_both_said(voc, capsys):
    year = voc / "VOCdevkit" / "VOC2007"
    write(year, "000000", [("cat", (11, 21, 40, 50), 1)])
    write(year, "000001", [*OBJECTS, ("person", (1, 1, 9, 9), 1)])
    train, _ = load_data(config(voc))
    assert (train.annotations["boxes"].labels >= 0).sum(1).tolist().count(0) == 1
    assert len(train) == 4 and train.skipped == ()
    said = capsys.readouterr().err
    assert "objects left out: 2 marked as difficult" in said
    assert "images without an object: 1 of 6 (000000.png)" in said


def test_classes_that_are_not_pascals_are_sorted(tmp_path, monkeypatch):
    monkeypatch.setitem(COLOURS, "zebra", (1, 2, 3))
    for index in range(4):
        write(tmp_path, str(index), [("zebra", (1, 1, 9, 9), 0), ("cat", (20, 20, 40, 40), 0)])
    assert load_data(config(tmp_path))[1].annotations["boxes"].classes == ("cat", "zebra")


def test_boxes_are_cut_at_the_edges_and_left_out_where_they_shrink_to_nothing(voc, capsys):
    year = voc / "VOCdevkit" / "VOC2007"
    write(year, "000004", [("cat", (81, 31, 115, 60), 0), ("dog", (5, 5, 5, 5), 0)])
    boxes = load_data(config(voc))[1].annotations["boxes"]
    row = int(((boxes.boxes[:, 0] - torch.tensor([40.0, 25.0, 50.0, 40.0])).abs().amax(1)).argmin())
    assert boxes.boxes[row, 0].tolist() == [40.0, 25.0, 50.0, 40.0]
    assert (boxes.labels[row] >= 0).tolist() == [True, False]
    said = capsys.readouterr().err
    assert "objects left out: 1 smaller than a pixel at data.image_size 50" in said
    assert "objects cut at the edge of their image: 1" in said


BOMB = (
    '<!DOCTYPE b [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    + "]><annotation>&a9;</annotation>"
).replace("&a0;", "&a;")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (xml(OBJECTS)[:150], "is no XML or damaged"),
        (BOMB, "declares a document type"),
        (f'<?xml version="1.0" encoding="utf-16"?>{BOMB}', "declares a document type"),
        ("<html></html>", "holds <html>; expected is <annotation>"),
        (xml(OBJECTS).replace("<name>cat</name>", ""), "object 0 has no <name>"),
        (xml(OBJECTS[:1]).split("<bndbox>")[0] + "</object></annotation>", "no <bndbox>"),
        (xml(OBJECTS).replace("<xmin>11<", "<xmin>eleven<"), "<xmin> 'eleven'; expected is a num"),
        (xml(OBJECTS).replace("<xmin>11<", "<xmin>nan<"), "<xmin> 'nan'; expected is a number"),
        (
            xml([("cat", (40, 21, 11, 50), 0)]),
            r"box 0 \('cat'\) has no area: .* are 39, 20, 11, 50",
        ),
        (
            xml([("cat", (201, 21, 240, 50), 0)]),
            r"box 0 \('cat'\) lies outside the image of 100x60",
        ),
        (xml([("cat", (81, 21, 140, 50), 0)]), r"box 0 \('cat'\) lies outside the image of 100x60"),
        (xml(OBJECTS, (60, 100)), "was made for an image of 60x100, but .* has 100x60"),
    ],
)
def test_a_wrong_annotation_is_refused_with_its_file_or_left_out(voc, text, message):
    path = voc / "VOCdevkit" / "VOC2007" / "Annotations" / "000001.xml"
    path.write_text(text, encoding="utf-16" if "utf-16" in text else "utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_data(config(voc))
    assert "000001.xml" in str(error.value)
    with pytest.warns(RuntimeWarning, match="1 of 6 images are left out"):
        train, heldout = load_data(config(voc, skip_unreadable=0.2))
    assert (len(train), len(heldout)) == (3, 2)
    assert len(train.skipped) == 1 and "000001" in train.skipped[0]


def test_an_annotation_without_a_known_size_is_taken_as_it_is(voc):
    path = voc / "VOCdevkit" / "VOC2007" / "Annotations" / "000001.xml"
    path.write_text(xml(OBJECTS, (0, 0)))
    assert len(load_data(config(voc))[0]) == 4


def test_damaged_and_missing_images_are_named(voc):
    images = voc / "VOCdevkit" / "VOC2007" / "JPEGImages"
    whole = (images / "000002.png").read_bytes()
    (images / "000002.png").write_bytes(whole[:90])
    with pytest.raises(ValueError, match=r"000002.png' is truncated or damaged"):
        load_data(config(voc))
    (images / "000002.png").unlink()
    with pytest.raises(ValueError, match=r"JPEGImages' lacks the image '000002' of '.*000002.xml'"):
        load_data(config(voc))


def test_missing_parts_of_the_layout_are_named(voc):
    year = voc / "VOCdevkit" / "VOC2007"
    lists(year, test=["000001", "000004"])
    with pytest.raises(ValueError, match="1 images are listed both for training and as held out"):
        load_data(config(voc))
    lists(year, test=["../000004"])
    with pytest.raises(ValueError, match=r"lists '\.\./000004'; expected is a name without"):
        load_data(config(voc))
    lists(year, test=[])
    lists(year, val=[])
    with pytest.raises(ValueError, match=r"lists no images in val\.txt or test\.txt"):
        load_data(config(voc))
    (year / "JPEGImages").rename(year / "JPGImages")
    with pytest.raises(ValueError, match=r"no folder JPEGImages\. Did you mean 'JPGImages'\?"):
        load_data(config(voc))
    (year / "Annotations").rename(year / "Annotation")
    with pytest.raises(ValueError, match=r"there are no Annotations in .*Expected are"):
        load_data(config(voc))
    with pytest.raises(ValueError, match=r"there are no .* Did you mean 'Annotation'\?"):
        load_data(config(year))


def test_images_without_any_object_at_all_are_refused(tmp_path):
    for index in range(4):
        write(tmp_path, str(index), [])
    with pytest.raises(ValueError, match="none of the 3 training images holds an object"):
        load_data(config(tmp_path))
