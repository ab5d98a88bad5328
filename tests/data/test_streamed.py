from __future__ import annotations

import io
import os
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repfusion_env import ConfigError
from repfusion_env.config import DataConfig
from repfusion_env.config_loading import load_config
from repfusion_env.data import load_data, streamed
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.decoding_ahead import StreamError
from repfusion_env.data.streaming_sources import FileSource
from repfusion_env.ranks import Ranks
from repfusion_env.stream import ImageStream, next_images

CPU = torch.device("cpu")


def png(red: int, size: tuple[int, int] = (6, 6)) -> bytes:
    stream = io.BytesIO()
    image = np.random.default_rng(red).integers(0, 256, (*size, 3), dtype=np.uint8)
    image[..., 0] = red  # tells which image it is
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def write_folder(root: Path, train: int = 24, heldout: int = 6) -> Path:
    """Three classes; image number i is all of red i, held-out ones from 100 on."""
    for part, numbers in (("train", range(train)), ("val", range(100, 100 + heldout))):
        for number in numbers:
            path = root / part / f"class{number % 3}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number))
    return root


def write_shard(path: Path, numbers: range, **labels: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            label = labels.get(f"of{number}", str(number % 3).encode())
            for suffix, content in (("png", png(number)), ("cls", label)):
                member = tarfile.TarInfo(f"{number:03}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "pets")


@pytest.fixture
def shards(tmp_path) -> Path:
    pytest.importorskip("webdataset", reason="the extra 'webdataset' is not installed")
    write_shard(tmp_path / "birds" / "train-0.tar", range(7))
    write_shard(tmp_path / "birds" / "train-1.tar", range(7, 12))
    write_shard(tmp_path / "birds" / "val-0.tar", range(100, 104))
    return tmp_path / "birds"


def config(path: Path, name: str = "folder", **options: object) -> DataConfig:
    options = {"storage": "stream", "decode_threads": 2, **options}
    return DataConfig(name=name, path=str(path), **options)  # type: ignore[arg-type]


def all_of(bank: ImageBank) -> torch.Tensor:
    return bank.pixels(torch.arange(len(bank)))


def reds(pixels: torch.Tensor) -> list[int]:
    return ((pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


SIZES = [{}, {"image_size": 4, "channels": 3}, {"image_size": 6, "channels": 1}]


@pytest.mark.parametrize("options", [*SIZES, {"train_limit": 10, "heldout_limit": 2}])
def test_a_streamed_folder_holds_what_the_resident_one_holds(folder, options):
    banks = load_data(config(folder, **options))
    for mine, resident in zip(
        banks, load_data(config(folder, storage="resident", **options)), strict=True
    ):
        assert mine.shape == resident.shape and mine.classes == resident.classes
        assert torch.equal(mine.labels, resident.labels)
        assert torch.equal(all_of(mine), all_of(resident))
    assert [bank.streamed for bank in banks] == [True, False]


@pytest.mark.parametrize("options", [*SIZES, {"train_limit": 8, "heldout_limit": 2}])
def test_streamed_shards_hold_what_resident_ones_hold(shards, options):
    for given in (shards, shards / "train-0.tar"):  # a split by names, and a random one
        banks = load_data(config(given, "webdataset", **options))
        resident = load_data(config(given, "webdataset", storage="resident", **options))
        for mine, other in zip(banks, resident, strict=True):
            assert mine.classes == other.classes and mine.name == other.name
            assert torch.equal(mine.labels, other.labels)
            assert torch.equal(all_of(mine), all_of(other))
        assert banks[0].streamed


def test_streamed_tiny_imagenet_is_read_by_its_own_layout(tmp_path):
    for wnid, first in (("n1", 0), ("n2", 5)):
        for number in range(first, first + 5):
            path = tmp_path / "train" / wnid / "images" / f"{wnid}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number))
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "val" / "images" / "a.JPEG").write_bytes(png(100))
    (tmp_path / "val" / "val_annotations.txt").write_text("a.JPEG\tn2\t0\t0\t9\t9\n")
    train, heldout = load_data(config(tmp_path, "tiny_imagenet"))
    assert train.streamed and [number >= 5 for number in reds(all_of(train))] == [
        bool(label) for label in train.labels
    ]
    assert reds(all_of(heldout)) == [100] and heldout.labels.tolist() == [1]


def test_rows_of_a_streamed_bank_keep_their_pixels_labels_and_given_labels(folder):
    train, _ = load_data(config(folder))
    rows = torch.tensor([7, 3, 11])
    some = train.take(rows)
    assert torch.equal(all_of(some), train.pixels(rows))
    assert torch.equal(some.labels, train.labels[rows])
    assert len(train.head(5)) == 5
    clusters = train.relabelled(torch.zeros(24, dtype=torch.int64), ("cluster 0",)).take(rows)
    assert torch.equal(clusters.judged.labels, train.labels[rows])
    assert torch.equal(all_of(clusters.judged), train.pixels(rows))


def test_announced_images_and_slices_of_them_come_without_reading_an_id(folder, no_waiting):
    train, _ = load_data(config(folder))
    resident, _ = load_data(config(folder, storage="resident"))
    stream = ImageStream(24, CPU, shuffle=True)
    for step in range(20):  # across the ends of epochs
        ids = next_images(stream, train, 10, 2)
        assert torch.equal(ids[::2], ids[1::2])
        parts = (ids, ids[::2], ids[3:7], ids[9:])
        with no_waiting():
            found = [train.pixels(part) for part in parts]
        for mine, part in zip(found, parts, strict=True):
            assert torch.equal(mine, resident.pixels(part)), step


def test_announcing_reads_no_id_on_the_device(folder):
    train, _ = load_data(config(folder))
    resident, _ = load_data(config(folder, storage="resident"))
    ids = torch.empty(4, dtype=torch.int64, device="meta")  # has no values
    train.stage(ids, np.array([5, 2]), [np.array([7, 1])])
    assert torch.equal(train.pixels(ids), resident.pixels(torch.tensor([5, 5, 2, 2])))


def test_ids_changed_in_place_after_the_announcement_are_looked_up_anew(folder):
    train, _ = load_data(config(folder))
    resident, _ = load_data(config(folder, storage="resident"))
    ids = next_images(ImageStream(24, CPU, shuffle=True), train, 6, 1)
    ids[2] = (ids[2] + 5) % 24
    assert torch.equal(train.pixels(ids), resident.pixels(ids))


def test_streamed_ids_are_those_of_a_resident_bank(folder):
    train, _ = load_data(config(folder))
    resident, _ = load_data(config(folder, storage="resident"))
    first, second = (ImageStream(24, CPU, shuffle=True) for _ in range(2))
    for _ in range(9):
        assert torch.equal(next_images(first, train, 8, 2), next_images(second, resident, 8, 2))


def test_each_rank_decodes_its_own_lanes_alone(folder, monkeypatch):
    resident, _ = load_data(config(folder, storage="resident"))
    whole, read = ImageStream(24, CPU, shuffle=True), FileSource.read
    met: list[set[int]] = [set(), set()]
    shares = []
    for index in range(2):
        rank = Ranks()
        rank.index, rank.count = index, 2
        bank, _ = load_data(config(folder, prefetch=1))
        shares.append((ImageStream(24, CPU, shuffle=True), bank, 8, 2, rank))
    owners = {id(bank.images._images.source): index for index, (_, bank, *_) in enumerate(shares)}

    def noted(self: FileSource, index: int) -> np.ndarray:
        met[owners[id(self)]].add(index)
        return read(self, index)

    monkeypatch.setattr(FileSource, "read", noted)
    for _ in range(5):
        ids = next_images(whole, resident, 8, 2)
        parts = [next_images(*share) for share in shares]
        assert torch.equal(torch.cat(parts), ids)
        for (_, bank, *_), part in zip(shares, parts, strict=True):
            assert torch.equal(bank.pixels(part), resident.pixels(part))
    for _, bank, *_ in shares:
        for coming in bank.images._coming.values():
            coming.batch.wait()
    # Six steps of four images make an epoch, one step being ahead; each rank has half of it.
    assert met[0] | met[1] == set(range(24)) and len(met[0]) == len(met[1]) == 12


def test_images_of_the_next_steps_are_decoded_before_they_are_asked_for(folder, monkeypatch):
    train, _ = load_data(config(folder, prefetch=3))
    stream, read = ImageStream(24, CPU, shuffle=True), threading.Event()
    wanted, met = set(stream.peek(4 * 5).tolist()), set()
    source = type(train.images._images.source)
    decode = source.read

    def noted(self, index):
        met.add(index)
        if met == wanted:
            read.set()
        return decode(self, index)

    monkeypatch.setattr(source, "read", noted)
    ids = next_images(stream, train, 5, 1)
    assert read.wait(20) and len(wanted) > len(ids)  # of four steps, though one was asked for
    assert met == wanted
    for _ in range(3):
        ids = next_images(stream, train, 5, 1)
        train.pixels(ids)
    assert len(train.images._coming) == 3  # no more than asked for


def test_a_jump_in_the_order_gives_the_right_images_and_keeps_no_endless_backlog(folder):
    train, _ = load_data(config(folder, prefetch=2))
    resident, _ = load_data(config(folder, storage="resident"))
    stream = ImageStream(24, CPU, shuffle=True)
    for seed in range(12):
        stream.reset(seed)
        for _ in range(2):
            ids = next_images(stream, train, 7, 1)
            assert torch.equal(train.pixels(ids), resident.pixels(ids))
    assert len(train.images._coming) <= 6


def test_a_closed_bank_decodes_no_more_ahead_and_can_be_used_all_the_same(folder, monkeypatch):
    train, _ = load_data(config(folder, decode_threads=1, prefetch=4))
    resident, _ = load_data(config(folder, storage="resident"))
    source, go_on = type(train.images._images.source), threading.Event()
    read, met = source.read, []

    def noted(self, index):
        met.append(index)
        if len(met) > 2:
            go_on.wait(20)
        return read(self, index)

    monkeypatch.setattr(source, "read", noted)
    stream = ImageStream(24, CPU, shuffle=True)
    next_images(stream, train, 2, 1)
    train.close()
    go_on.set()
    train.images._decoding.start(np.array([0])).wait()  # comes after all that is left to do
    # Of the eight that were announced one at most had been begun.
    assert len(met) <= 2 + 1 + 1
    ids = next_images(stream, train, 2, 1)
    assert torch.equal(train.pixels(ids), resident.pixels(ids))
    resident.close()


def test_images_that_are_asked_for_again_and_again_are_decoded_once(folder, monkeypatch):
    train, _ = load_data(config(folder))
    ids = torch.tensor([4, 9, 4, 20])
    first = train.pixels(ids)
    monkeypatch.setattr(type(train.images._images.source), "read", None)  # not called again
    assert torch.equal(train.pixels(ids.clone()), first)
    assert train.pixels(ids[:0]).shape == (0, 3, 6, 6)


def test_what_is_kept_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(streamed, "KEPT_BYTES", 5 * 6 * 6 * 3)
    train, _ = load_data(config(folder))
    all_of(train)
    assert len(train.images._kept) == 5


def test_pieces_of_a_pass_are_decoded_ahead_in_their_order(folder):
    train, _ = load_data(config(folder))
    resident, _ = load_data(config(folder, storage="resident"))
    pieces = torch.arange(24).split(7)
    seen = []
    for piece in train.announced(pieces):
        assert torch.equal(train.pixels(piece), resident.pixels(piece))
        seen.append(piece)
    assert torch.equal(torch.cat(seen), torch.arange(24))
    assert list(resident.announced(pieces)) == list(pieces)


@pytest.fixture
def damaged(folder) -> Path:
    """Two of 30 images, of one class, are cut short: noticed as late as they are decoded."""
    for number in (4, 10):
        path = folder / "train" / "class1" / f"{number:03}.png"
        path.write_bytes(path.read_bytes()[:-30])
    return folder


def test_the_next_image_of_the_class_stands_in_for_an_unreadable_one(damaged):
    train, heldout = load_data(config(damaged, skip_unreadable=0.07))
    with pytest.warns(RuntimeWarning) as warned:
        first = all_of(train)
    met = [str(warning.message) for warning in warned]
    assert len(met) == 2 and any("004.png' is truncated" in line for line in met)
    assert all("the next image of its class takes its place" in line for line in met)
    numbers = reds(first)
    assert set(numbers) == set(range(24)) - {4, 10}
    assert [number % 3 for number in numbers] == train.labels.tolist()
    resident, _ = load_data(config(write_folder(damaged.parent / "whole"), storage="resident"))
    whole = reds(all_of(resident))
    for place, (mine, was) in enumerate(zip(numbers, whole, strict=True)):
        if was in (4, 10):
            later = [n for n in (*whole[place:], *whole[:place]) if n % 3 == 1]
            assert mine == next(n for n in later if n not in (4, 10))
        else:
            assert mine == was
    assert len(train.unreadable) == 2 and heldout.unreadable == () and train.skipped == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        again, _ = load_data(config(damaged, skip_unreadable=0.07))[0], None
        warnings.simplefilter("ignore")
        assert torch.equal(all_of(again), first)  # whatever thread came first
        assert torch.equal(all_of(train), first)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (0.0, r"0(04|10)\.png' is truncated or damaged .*; data\.skip_unreadable allows for some$"),
        (0.04, r"it is number 2 of 30 images that cannot be read, and data\.skip_unreadable 0\.04"),
    ],
)
def test_one_unreadable_image_more_than_allowed_ends_it_and_stays_so(damaged, part, sentence):
    train, _ = load_data(config(damaged, skip_unreadable=part))
    for _ in range(2):
        with warnings.catch_warnings(), pytest.raises(StreamError, match=sentence):
            warnings.simplefilter("ignore", RuntimeWarning)
            all_of(train)


def test_a_class_without_a_readable_image_ends_it(folder):
    for path in (folder / "train" / "class1").iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    train, _ = load_data(config(folder, skip_unreadable=0.5))
    with (
        warnings.catch_warnings(),
        pytest.raises(StreamError, match=r"truncated.*nor can any other image of its class"),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)
        all_of(train)


def test_an_image_of_another_size_is_refused_when_it_is_met(shards):
    other = io.BytesIO()
    Image.new("RGB", (9, 6)).save(other, "PNG")
    with tarfile.open(shards / "train-1.tar", "a") as archive:
        for suffix, content in (("png", other.getvalue()), ("cls", b"0")):
            member = tarfile.TarInfo(f"odd.{suffix}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    train, _ = load_data(config(shards, "webdataset"))
    with pytest.raises(ValueError, match=r"mixed size: sample 'odd\.png' of shard .* is 9x6, the"):
        all_of(train)
    assert all_of(load_data(config(shards, "webdataset", image_size=6))[0]).shape == (13, 3, 6, 6)


def test_a_label_that_cannot_be_read_is_left_out_before_training(shards):
    write_shard(shards / "train-1.tar", range(7, 12), of9=b"\xff\xfe")
    with pytest.raises(ValueError, match=r"the \.cls of sample '009' of shard .* cannot be read"):
        load_data(config(shards, "webdataset"))
    with pytest.warns(RuntimeWarning, match="1 of 16 images are left out"):
        train, _ = load_data(config(shards, "webdataset", skip_unreadable=0.1))
    assert reds(all_of(train)) == [n for n in range(12) if n != 9]
    assert len(train.skipped) == 1


def test_compressed_shards_are_refused_with_the_reason(shards):
    with tarfile.open(shards / "train-2.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"a compressed one such as '.*train-2\.tar\.gz' does not"):
        load_data(config(shards, "webdataset"))


def test_a_shard_cut_short_after_its_indexing_is_a_damaged_image(shards):
    train, _ = load_data(config(shards, "webdataset"))
    path = shards / "train-1.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(StreamError, match=r"sample '0\d\d\.png' of shard .* is truncated"):
        all_of(train)


def test_only_data_sets_of_single_images_are_streamed():
    with pytest.raises(ConfigError, match=r"data\.storage: 'stream' reads single images of folder"):
        load_config("digits", {"data.storage": "stream"})


def test_the_fingerprint_tells_files_labels_and_sizes_apart_without_reading_pixels(folder, shards):
    def fingerprint(path: Path = folder, **options: object) -> str:
        name = "folder" if path == folder else "webdataset"
        return load_data(config(path, name, **options))[0].fingerprint

    first = fingerprint()
    assert fingerprint() == first
    others = {fingerprint(train_limit=20), fingerprint(image_size=4), fingerprint(shards)}
    resident, _ = load_data(config(folder, storage="resident"))
    others.add(resident.fingerprint)
    path = folder / "train" / "class0" / "003.png"
    was = path.stat()
    path.write_bytes(png(200)[: was.st_size].ljust(was.st_size, b"\0"))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    others.add(fingerprint())
    assert len(others | {first}) == 6
    moved = folder.rename(folder.parent / "elsewhere")
    assert load_data(config(moved))[0].fingerprint in others  # the name of a root is no matter


def test_time_spent_waiting_is_told_as_a_share_and_starts_anew(folder, monkeypatch):
    train, _ = load_data(config(folder))
    source = type(train.images._images.source)
    read = source.read

    def slowly(self, index):
        threading.Event().wait(0.02)
        return read(self, index)

    monkeypatch.setattr(source, "read", slowly)
    train.drain_metrics()
    all_of(train)
    assert 0.5 < train.drain_metrics()["charts/data_wait"] <= 1.0
    threading.Event().wait(0.01)
    assert train.drain_metrics() == {"charts/data_wait": 0.0}
    assert load_data(config(folder, storage="resident"))[0].drain_metrics() == {}


def test_threads_of_a_bank_that_is_gone_end(folder):
    before = set(threading.enumerate())  # of other banks
    train, _ = load_data(config(folder, decode_threads=3))
    all_of(train)
    threads = set(threading.enumerate()) - before
    assert threads and all(thread.name.startswith("decode") for thread in threads)
    del train
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
