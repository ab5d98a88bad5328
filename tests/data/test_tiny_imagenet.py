from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data

WNIDS = ("n01", "n02", "n03")


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Three classes of four training and two validation images; the red value is unique."""
    root = tmp_path / "tiny-imagenet-200"
    lines = []
    for label, wnid in enumerate(WNIDS):
        for index in range(4):
            _write(root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", 60 * label + index)
    for index in range(6):
        _write(root / "val" / "images" / f"val_{index}.JPEG", 60 * (index % 3) + 30)
        lines.append(f"val_{index}.JPEG\t{WNIDS[index % 3]}\t0\t0\t9\t9")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tcrane\nn03\tcrane, tower\n")
    return root


def _write(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (red, 20, 20)).save(path, "JPEG", quality=95)


def config(path: Path, **options: int) -> DataConfig:
    return DataConfig(name="tiny_imagenet", path=str(path), **options)  # type: ignore[arg-type]


def test_both_splits_are_read_with_their_labels_from_the_folder_or_the_one_above(tiny):
    train, heldout = load_data(config(tiny))
    assert (len(train), len(heldout), train.shape) == (12, 6, (3, 64, 64))
    for bank in (train, heldout):
        reds = bank.images[:, 0, 32, 32].int()
        assert (reds // 60).tolist() == bank.labels.tolist()
    above, _ = load_data(config(tiny.parent))
    assert above.fingerprint == train.fingerprint


def test_classes_are_named_by_words_that_tell_them_apart(tiny):
    assert load_data(config(tiny))[0].classes == ("goldfish", "crane (n02)", "crane (n03)")
    (tiny / "words.txt").unlink()
    assert load_data(config(tiny))[0].classes == WNIDS


def test_the_first_images_are_of_several_classes(tiny):
    assert len(set(load_data(config(tiny, train_limit=6))[0].labels.tolist())) > 1


def test_an_annotation_of_no_class_is_answered_with_the_closest(tiny):
    path = tiny / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n03", "n030", 1))
    with pytest.raises(ValueError, match=r"line 3 of .* 'n030'.* Did you mean 'n03'\?"):
        load_data(config(tiny))


def test_what_is_missing_is_named(tiny):
    (tiny / "val" / "images" / "val_4.JPEG").unlink()
    with pytest.raises(ValueError, match=r"images' lacks val_4.JPEG"):
        load_data(config(tiny))
    (tiny / "val" / "val_annotations.txt").unlink()
    with pytest.raises(ValueError, match=r"there is no file '.*val_annotations.txt'"):
        load_data(config(tiny))
    (tiny / "val").rename(tiny / "vall")
    with pytest.raises(ValueError, match=r"there is no folder 'val'\. Did you mean 'vall'\?"):
        load_data(config(tiny))
