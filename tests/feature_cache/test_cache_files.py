"""Records on disk: found again, checked, bounded, safe against kills, and never another cache's."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from repfusion_env.feature_cache import CacheWarning, Identity
from repfusion_env.feature_cache.files import GIB, DiskStore

IDENTITY = Identity(
    teacher="a" * 64,
    layers=("mid",),
    shapes=((3,),),
    num_timesteps=1000,
    input="noised",
    noise_seed=7,
    data="b" * 64,
    images=20,
    precision="fp32",
)
RECORD = 16 + 12


def _store(root: Path, identity: Identity = IDENTITY, *, room: int = 10_000, parts=2) -> DiskStore:
    """A store with room for so many bytes."""
    return DiskStore(root, identity, gib=room / GIB, parts=parts, names={})


def _keys(*rows: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, timesteps, mirrored = np.array(rows, dtype=np.int64).T
    return images, timesteps, mirrored


def _data(*firsts: float) -> np.ndarray:
    values = np.array([[first, first + 1, first + 2] for first in firsts], "<f4")
    return values.view(np.uint8)


def test_records_are_found_by_another_process_and_no_others_are(tmp_path):
    keys = _keys((3, 40, 0), (3, 40, 1), (19, 900, 0))
    _store(tmp_path).write(*keys, _data(1, 5, 9))
    again = _store(tmp_path)
    found, data = again.read(*_keys((19, 900, 0), (3, 900, 0), (3, 40, 1), (4, 40, 0), (3, 41, 0)))
    assert found.tolist() == [True, False, True, False, False]
    assert np.array_equal(data[[0, 2]], _data(9, 5)) and again.damaged == 0


def test_a_file_is_laid_out_as_documented(tmp_path):
    _store(tmp_path).write(*_keys((3, 40, 1)), _data(1))
    raw = (tmp_path / IDENTITY.name / "t0040m.bin").read_bytes()
    assert len(raw) == 20 * RECORD
    assert raw[: 3 * RECORD] == bytes(3 * RECORD) and raw[4 * RECORD :] == bytes(16 * RECORD)
    salt = zlib.crc32(f"{IDENTITY.digest}:40:1".encode())
    told = _data(1).tobytes()
    crc = zlib.crc32(struct.pack("<Q", 3) + told, salt)
    assert raw[3 * RECORD : 4 * RECORD] == struct.pack("<QII", 4, crc, 0) + told


@pytest.mark.parametrize("byte", [8, 16, RECORD - 1])
def test_a_damaged_record_is_a_miss_until_it_is_written_again(tmp_path, byte):
    key = _keys((3, 40, 0))
    _store(tmp_path).write(*key, _data(1))
    path = tmp_path / IDENTITY.name / "t0040.bin"
    raw = bytearray(path.read_bytes())
    raw[3 * RECORD + byte] ^= 1
    path.write_bytes(raw)
    store = _store(tmp_path)
    assert not store.read(*key)[0][0] and store.damaged == 1
    store.write(*key, _data(1))
    assert store.read(*key)[0][0] and store.damaged == 1


def test_a_record_that_belongs_elsewhere_is_no_record(tmp_path):
    key, other = _keys((3, 40, 0)), replace(IDENTITY, noise_seed=8)
    mine, theirs = _store(tmp_path), _store(tmp_path, other)
    for store in (mine, theirs):
        store.write(*key, _data(1))
    own = (mine.folder / "t0040.bin").read_bytes()
    (mine.folder / "t0041.bin").write_bytes(own)  # of another timestep
    (theirs.folder / "t0040.bin").write_bytes(own)  # of another cache
    for store, wanted in ((_store(tmp_path), _keys((3, 41, 0))), (_store(tmp_path, other), key)):
        assert not store.read(*wanted)[0][0] and store.damaged == 1
    # And of another image of the same file: slot 4 claims image 4, with image 3's record.
    moved = bytearray(own)
    moved[4 * RECORD : 5 * RECORD] = struct.pack("<Q", 5) + own[3 * RECORD + 8 : 4 * RECORD]
    (mine.folder / "t0040.bin").write_bytes(moved)
    assert not _store(tmp_path).read(*_keys((4, 40, 0)))[0][0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda told: told["identity"].update(noise_seed=8), "belongs to cache"),
        (lambda told: told.update(format=2), "format 2 given, this version reads format 1"),
        (lambda told: told.update(slots=0), "is damaged"),
        (lambda told: told["identity"].pop("teacher"), "is damaged"),
    ],
)
def test_a_manifest_that_does_not_fit_its_folder_is_refused(tmp_path, change, sentence):
    path = _store(tmp_path).folder / "manifest.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=sentence):
        _store(tmp_path)


def test_half_a_manifest_and_a_file_of_another_size_are_refused(tmp_path):
    store = _store(tmp_path)
    store.write(*_keys((3, 40, 0)), _data(1))
    path = store.folder / "t0040.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"it has {20 * RECORD - 1} bytes where {20 * RECORD} bel"):
        _store(tmp_path).read(*_keys((3, 40, 0)))
    manifest = store.folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        _store(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"cache\.folder: .* cannot be used"):
        _store(tmp_path / "cache")


def test_where_not_all_fit_the_newest_of_a_slot_stays_and_the_bound_holds(tmp_path):
    room = 2 * 5 * RECORD + 3  # five slots for each of two timesteps
    store = _store(tmp_path, room=room)
    assert store.slots == 5
    for image in range(20):
        for timestep in (40, 900):
            store.write(*_keys((image, timestep, 0)), _data(image))
    found, data = store.read(*_keys(*[(image, 40, 0) for image in range(20)]))
    assert np.flatnonzero(found).tolist() == list(range(15, 20))
    assert np.array_equal(data[15:], _data(*range(15, 20)))
    with pytest.warns(CacheWarning, match="is full: cache.disk_gib allows 2 files"):
        store.write(*_keys((0, 41, 0)), _data(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        store.write(*_keys((0, 42, 0)), _data(0))
    assert sum(path.stat().st_size for path in store.folder.glob("*.bin")) <= room


def test_no_room_for_one_record_of_each_timestep_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cache\.disk_gib: .* takes 28 bytes and there are 2"):
        _store(tmp_path, room=2 * RECORD - 1)


def test_a_full_disk_is_said_once_and_reading_goes_on(tmp_path, monkeypatch):
    store = _store(tmp_path)
    store.write(*_keys((3, 40, 0)), _data(1))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.warns(CacheWarning, match="No space left on device"):
        store.write(*_keys((4, 40, 0)), _data(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.write(*_keys((5, 40, 0)), _data(2))
    assert store.read(*_keys((3, 40, 0), (4, 40, 0)))[0].tolist() == [True, False]


def test_the_first_of_two_openers_decides_the_slots(tmp_path):
    assert _store(tmp_path, room=2 * 5 * RECORD).slots == 5
    assert _store(tmp_path, room=10_000).slots == 5
    assert not list(tmp_path.rglob(".*"))  # no drafts are left


def test_a_writer_killed_at_any_time_leaves_only_whole_records_to_be_found(tmp_path):
    identity = replace(IDENTITY, shapes=((30_000,),), images=8)
    values = np.random.default_rng(0).normal(size=(8, 30_000)).astype("<f4").view(np.uint8)
    keys = _keys(*[(image, 40, 0) for image in range(8)])
    for pause in (0.01, 0.03, 0.05):
        child = os.fork()
        if child == 0:
            while True:  # two contents in turn, so that a torn record is a mixture
                for turned in (values, values[::-1]):
                    _store(tmp_path, identity, room=GIB).write(*keys, turned)
        try:
            deadline = time.monotonic() + 20
            while not _store(tmp_path, identity, room=GIB).read(*keys)[0].any():
                assert time.monotonic() < deadline
            time.sleep(pause)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        store = _store(tmp_path, identity, room=GIB)
        found, data = store.read(*keys)
        assert found.sum() >= 7 and found.sum() + store.damaged == 8
        for image in np.flatnonzero(found):
            assert any(np.array_equal(data[image], rows[image]) for rows in (values, values[::-1]))
