from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import grid_sample

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data
from repfusion_env.data.faces import LAYOUTS

SIZE = (200, 160)


def pts(places: np.ndarray) -> str:
    rows = "\n".join(f"{x:.3f} {y:.3f}" for x, y in places)
    return f"version: 1\nn_points:  {len(places)}\n{{\n{rows}\n}}\n"


def face(seed: int, count: int = 68) -> np.ndarray:
    """Points as Matlab counts: the first pixel is (1, 1)."""
    return np.random.default_rng(seed).uniform((60, 50), (140, 130), (count, 2))


def write(root: Path, name: str, places: np.ndarray) -> None:
    """An image that says by its red and green where each pixel was, and its points."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8)).save(path)
    path.with_suffix(".pts").write_text(pts(places))


@pytest.fixture
def w300(tmp_path) -> Path:
    """300W's folders, two faces in each."""
    root = tmp_path / "300W"
    folders = ("afw", "helen/trainset", "lfpw/trainset", "helen/testset", "lfpw/testset", "ibug")
    for number, folder in enumerate(folders):
        for index in range(2):
            write(root, f"{folder}/image_{index}.png", face(10 * number + index))
    return root


def config(root: Path, **options: object) -> DataConfig:
    return DataConfig(name="pts", path=str(root), **{"image_size": 64, **options})  # type: ignore[arg-type]


def test_the_folders_of_300w_say_what_is_held_out(w300):
    train, heldout = load_data(config(w300))
    assert (len(train), len(heldout)) == (6, 6)
    assert len(load_data(config(w300, subset="common"))[1]) == 4
    train_too, challenging = load_data(config(w300, subset="challenging"))
    assert len(challenging) == 2 and train_too.fingerprint == train.fingerprint
    assert challenging.fingerprint == load_data(config(w300, subset="ibug"))[1].fingerprint
    with pytest.raises(ValueError, match=r"folder 'ibugs'\. Did you mean 'ibug'\? There are helen"):
        load_data(config(w300, subset="ibugs"))


def test_points_count_from_one_and_stay_on_what_they_mark(w300):
    bank = load_data(config(w300))[1]
    keypoints = bank.annotations["keypoints"]
    assert keypoints.visible.all() and keypoints.normalizer == (36, 45)
    written = [torch.from_numpy(face(10 * n + i)).float() - 1 for n in (3, 4, 5) for i in (0, 1)]
    matched = set()
    for image, places in zip(bank.images, keypoints.points, strict=True):
        grid = (places + 0.5) * 2 / 64 - 1
        seen = grid_sample(image[None].float(), grid[None, None], align_corners=False)[0, :2, 0].T
        # Rounding of the colours goes either way: one pixel of offset shows in the mean.
        errors = [float((seen - mine).mean(0).abs().max()) for mine in written]
        matched.add(int(np.argmin(errors)))
        assert min(errors) < 0.3
    assert len(matched) == 6


def test_missing_points_are_not_visible(w300):
    places = face(0)
    places[7] = np.nan
    write(w300, "afw/image_0.png", places)
    keypoints = load_data(config(w300))[0].annotations["keypoints"]
    assert keypoints.visible.logical_not().sum() == 1
    assert not keypoints.visible[:, 7].all() and keypoints.points.isfinite().all()


def test_other_numbers_of_points_are_read_and_know_no_mirror(tmp_path):
    for index in range(5):
        write(tmp_path, f"{index}.png", face(index, 29))
    train, heldout = load_data(config(tmp_path))
    assert (len(train), len(heldout)) == (4, 1)
    keypoints = train.annotations["keypoints"]
    assert keypoints.points.shape == (4, 29, 2)
    assert keypoints.mirror is None and keypoints.normalizer is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (pts(face(1)).replace("{", "("), "holds no points between braces; expected are 'n_points"),
        (pts(face(1))[:300], "holds no points between braces"),
        (pts(face(1)).replace("68", "70"), "holds 68 points but says n_points: 70"),
        (pts(face(1)).replace("{\n", "{\nleft eye\n").replace("68", "69"), "'left eye' as point 0"),
        (pts(face(1)).replace("{\n", "{\n1 2 3\n").replace("68", "69"), "'1 2 3' as point 0"),
        (pts(face(1)).replace("{\n", "{\n1 inf\n").replace("68", "69"), "'1 inf' as point 0"),
        (pts(face(1, 29)), "has 29 points, but most of the files have 68"),
        (pts(face(1) * np.nan), "has no point with a known place"),
        (pts(face(1) + 900.0), r"has point 0 at x .* far outside the image .* of 200x160 pixels"),
        ("\0\xff" * 9, "between braces"),
    ],
)
def test_wrong_points_are_refused_with_their_file_or_left_out(w300, text, message):
    (w300 / "helen" / "trainset" / "image_1.pts").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_data(config(w300))
    assert "trainset/image_1.pts" in str(error.value)
    with pytest.warns(RuntimeWarning, match="1 of 12 images are left out"):
        train, heldout = load_data(config(w300, skip_unreadable=0.1))
    assert (len(train), len(heldout)) == (5, 6)


def test_points_and_images_without_each_other_are_named(w300):
    (w300 / "afw" / "image_0.pts").unlink()
    with pytest.raises(ValueError, match=r"afw/image_0.png' has no points; expected is 'image_0.p"):
        load_data(config(w300))
    (w300 / "afw" / "image_0.png").rename(w300 / "afw" / "image_1.jpg")
    with pytest.raises(ValueError, match=r"afw/image_1.pts' needs one image .* but there are 2"):
        load_data(config(w300))
    for path in w300.rglob("*.pts"):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no \.pts files"):
        load_data(config(w300))


def test_images_in_no_folder_of_a_split_are_named(w300):
    write(w300, "extra/image_9.png", face(9))
    with pytest.raises(ValueError, match=r"extra/image_9' lies in no folder that says whether"):
        load_data(config(w300))


def test_one_sided_splits_are_refused(tmp_path):
    write(tmp_path, "train/a.png", face(0))
    with pytest.raises(ValueError, match=r"none of the images in .* is held out"):
        load_data(config(tmp_path))


@pytest.mark.skipif("REPFUSION_DATA" not in os.environ, reason="no image banks (REPFUSION_DATA)")
def test_the_mirror_of_68_points_fits_real_faces(tmp_path):
    bank = np.load(Path(os.environ["REPFUSION_DATA"]) / "ytfaces68_64.npz")
    places = bank["train_keypoints"]
    mean = np.nanmean(places, 0)
    mirrored = mean[list(LAYOUTS[68].mirror(68))] * (-1, 1)
    mirrored += (mean - mirrored).mean(0)
    unit = np.linalg.norm(mean[36] - mean[45])
    # A single pair left out would be off by more than a tenth: faces are wide.
    assert np.linalg.norm(mirrored - mean, axis=1).max() < 0.08 * unit
