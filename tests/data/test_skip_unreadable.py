from __future__ import annotations

import io
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repfusion_env.config import DataConfig
from repfusion_env.data import decode, load_data
from repfusion_env.data.decode import closed_up, decode_each
from repfusion_env.data.unreadable import Unreadable


def png(red: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 6), (red, 7, 9)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """20 images of two classes; two are broken in ways that show at different times."""
    root = tmp_path / "pets"
    for index in range(20):
        path = root / ("cat" if index < 10 else "dog") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(index))
    (root / "cat" / "03.png").write_bytes(b"hello")  # no header: noticed before decoding
    whole = (root / "dog" / "14.png").read_bytes()
    (root / "dog" / "14.png").write_bytes(whole[: len(whole) - 30])  # noticed while decoding
    return root


def config(path: Path, part: float, **options: object) -> DataConfig:
    return DataConfig(name="folder", path=str(path), skip_unreadable=part, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [{}, {"image_size": 6, "channels": 3}])
def test_what_is_left_keeps_its_labels_and_the_rest_is_counted_and_listed(folder, sizes):
    with pytest.warns(RuntimeWarning, match=r"2 of 20 images are left out.*03\.png.*14\.png"):
        banks = load_data(config(folder, 0.1, **sizes))
    reds = [red for bank in banks for red in bank.images[:, 0, 0, 0].tolist()]
    assert sorted(reds) == [index for index in range(20) if index not in (3, 14)]
    for bank in banks:
        assert [red >= 10 for red in bank.images[:, 0, 0, 0].tolist()] == bank.labels.tolist()
    skipped = [line for bank in banks for line in bank.skipped]
    assert len(skipped) == 2
    assert any("03.png' is not an image" in line for line in skipped)
    assert any("14.png' is truncated or damaged" in line for line in skipped)


def test_none_is_left_out_by_default_and_no_more_than_allowed(folder):
    with pytest.raises(ValueError, match=r"03\.png' is not an image that Pillow can read$"):
        load_data(config(folder, 0.0))
    with pytest.raises(
        ValueError, match=r"number 2 of 20 images .* data\.skip_unreadable 0\.05 .* at most 1"
    ):
        load_data(config(folder, 0.05))


def test_readable_images_are_read_without_a_word(folder):
    (folder / "cat" / "03.png").unlink()
    (folder / "dog" / "14.png").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, heldout = load_data(config(folder, 0.5))
    assert (len(train), len(heldout), train.skipped, heldout.skipped) == (14, 4, (), ())


def test_a_part_of_which_nothing_is_left_is_refused(tmp_path):
    for part in ("train", "test"):
        for index in range(3):
            path = tmp_path / part / "a" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(index) if part == "train" else b"")
    with pytest.raises(ValueError, match=r"none of the 3 held-out images can be read: .*0\.png"):
        load_data(config(tmp_path, 0.9, image_size=4, channels=3))


def test_damaged_samples_of_shards_are_left_out_with_their_labels(tmp_path):
    pytest.importorskip("webdataset")
    for name, reds in (("train-0.tar", range(10)), ("val-0.tar", range(100, 105))):
        with tarfile.open(tmp_path / name, "w") as archive:
            for red in reds:
                content = png(red) if red not in (0, 4, 103) else png(red)[:40]
                for suffix, data in (("png", content), ("cls", str(red % 5).encode())):
                    member = tarfile.TarInfo(f"{red:04d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    given = DataConfig(name="webdataset", path=str(tmp_path), skip_unreadable=0.2)
    with pytest.warns(RuntimeWarning, match="3 of 15 images are left out"):
        train, heldout = load_data(given)
    assert train.images[:, 0, 0, 0].tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert train.labels.tolist() == [1, 2, 3, 0, 1, 2, 3, 4]
    assert heldout.images[:, 0, 0, 0].tolist() == [100, 101, 102, 104]
    assert heldout.labels.tolist() == [0, 1, 2, 4]
    assert (len(train.skipped), len(heldout.skipped)) == (2, 1)
    with pytest.raises(ValueError, match=r"sample '0000' of shard"):
        load_data(DataConfig(name="webdataset", path=str(tmp_path)))


@pytest.mark.parametrize("moved_at_once", [1, 3, 1000])
def test_closing_up_keeps_the_rows_in_order(monkeypatch, moved_at_once):
    monkeypatch.setattr(decode, "ROWS_MOVED", moved_at_once)
    rows = torch.arange(40).reshape(20, 2)
    kept = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(20) > 0.4))
    wanted = rows.clone()[kept]
    closed = closed_up(rows, kept)
    assert torch.equal(closed, wanted)
    assert closed.data_ptr() == rows.data_ptr()  # not a second bank in memory


def test_several_tensors_stay_together_where_jobs_fail():
    def read(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if number % 7 == 3:
            raise ValueError(f"job {number} is broken")
        return torch.full((2,), number), torch.tensor(float(number))

    unreadable = Unreadable(300, 0.2, "jobs")
    rows = [((2,), torch.int64), ((), torch.float32)]
    parts = decode_each("jobs", (range(200), range(200, 300)), read, rows, unreadable)
    for part, numbers in zip(parts, (range(200), range(200, 300)), strict=True):
        wanted = [number for number in numbers if number % 7 != 3]
        assert part.tensors[0].tolist() == [[number] * 2 for number in wanted]
        assert part.tensors[1].tolist() == wanted
        assert [numbers[row] for row in part.kept.tolist()] == wanted
    assert len(unreadable) == sum(number % 7 == 3 for number in range(300))
    assert unreadable.listed(1)[0] == "job 206 is broken"


def test_a_part_is_counted_as_people_count():
    # In binary 0.07 * 100 is a little more and 0.29 * 100 a little less than they seem.
    assert Unreadable(100, 0.07).allowed == 7
    assert Unreadable(100, 0.29).allowed == 29
    assert Unreadable(10, 0.19).allowed == 1


def test_threads_share_the_count():
    unreadable = Unreadable(1000, 0.5)

    def add(index: int) -> bool:
        try:
            unreadable.add(f"image {index}", index % 2)
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        accepted = sum(pool.map(add, range(600)))
    assert accepted == 500
    assert len(unreadable.listed()) == 600
    assert len(unreadable.listed(0)) == len(unreadable.listed(1)) == 300
