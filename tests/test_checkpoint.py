"""Checkpoints under truncation, flipped bits, foreign files, full disks and kills."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from repfusion_env.checkpoint import (
    CheckpointError,
    CheckpointWarning,
    load_latest,
    save_checkpoint,
)


def state_of(step: int, values: int = 2000) -> dict[str, object]:
    return {"step": step, "weights": torch.full((values,), float(step))}


def assert_state_of(step: int, state: dict[str, object]) -> None:
    assert state["step"] == step
    weights = state["weights"]
    assert isinstance(weights, torch.Tensor)
    assert torch.equal(weights, torch.full_like(weights, float(step)))


def save(folder: Path, *steps: int, keep: int = 10, kind: str = "test") -> list[Path]:
    return [save_checkpoint(folder, step, state_of(step), kind=kind, keep=keep) for step in steps]


def test_every_kind_of_value_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "tensors": {
            "float": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
            "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
            "whole": torch.arange(5),
            "flag": torch.tensor([True, False]),
            "empty": torch.zeros(0, 7),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
        },
        "list": [1, -(2**127), 2**2038, 1e-300, float("inf"), True, None, "é\n", b"\x00\xff"],
        "tuple": ("a", (1, [2.5])),
        7: {"index": 0},
    }
    save_checkpoint(tmp_path, 3, state, kind="test", keep=1)
    step, loaded = load_latest(tmp_path, kind="test") or pytest.fail("nothing was loaded")
    assert step == 3
    for name, tensor in state["tensors"].items():  # type: ignore[union-attr]
        found = loaded["tensors"][name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found.nan_to_num(), tensor.nan_to_num()), name
    assert [loaded[key] for key in ("list", "tuple", 7)] == [
        state[key] for key in ("list", "tuple", 7)
    ]
    assert [type(item) for item in loaded["list"]] == [type(item) for item in state["list"]]
    assert type(loaded["tuple"]) is tuple


def test_training_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    def draws_and_weights(
        numpy_rng: np.random.Generator,
        torch_rng: torch.Generator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> tuple[list[float], list[torch.Tensor]]:
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=torch_rng)).square().mean().backward()
        optimizer.step()
        return list(numpy_rng.normal(size=3)), [p.detach().clone() for p in model.parameters()]

    torch_rng, numpy_rng = torch.Generator().manual_seed(1), np.random.default_rng(2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    draws_and_weights(numpy_rng, torch_rng, model, optimizer)
    state = {
        "numpy": numpy_rng.bit_generator.state,
        "torch": torch_rng.get_state(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    save_checkpoint(tmp_path, 1, state, kind="test", keep=1)
    expected = draws_and_weights(numpy_rng, torch_rng, model, optimizer)

    _, loaded = load_latest(tmp_path, kind="test") or pytest.fail("nothing was loaded")
    again = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    again.load_state_dict(loaded["model"])
    optimizer = torch.optim.AdamW(again.parameters())
    optimizer.load_state_dict(loaded["optimizer"])
    numpy_rng = np.random.default_rng(99)
    numpy_rng.bit_generator.state = loaded["numpy"]
    torch_rng.set_state(loaded["torch"])
    draws, weights = draws_and_weights(numpy_rng, torch_rng, again, optimizer)
    assert draws == expected[0]
    assert all(map(torch.equal, weights, expected[1]))


def test_a_view_is_stored_without_the_tensor_behind_it(tmp_path: Path) -> None:
    bank = torch.zeros(1000, 1000)
    path = save_checkpoint(tmp_path, 1, {"row": bank[3], "every": bank[::500]}, kind="t", keep=1)
    assert path.stat().st_size < 30_000
    _, loaded = load_latest(tmp_path, kind="t") or pytest.fail("nothing was loaded")
    assert loaded["every"].shape == (2, 1000)


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"a": {"b": np.zeros(3)}}, r"state\.a\.b is a numpy\.ndarray.*torch\.from_numpy"),
        ({"a": [0, (1, np.float64(2))]}, r"state\.a\[1\]\[1\] is a numpy\.float64.*\.item\(\)"),
        ({"a": {"b": object()}}, r"state\.a\.b is a builtins\.object"),
        ({"a": {(1, 2): 3}}, r"state\.a has the key \(1, 2\)"),
        ({"a": 2**5000}, r"state\.a is a whole number of 5001 bits"),
        ([1], r"the state must be a dict, not list"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, state: dict[str, object], path: str
) -> None:
    with pytest.raises(TypeError, match=path):
        save_checkpoint(tmp_path / "new", 1, state, kind="test", keep=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("step", "keep", "name"), [(-1, 1, "step -1"), (1, 0, "keep 0")])
def test_numbers_out_of_range_are_refused(tmp_path: Path, step: int, keep: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        save_checkpoint(tmp_path, step, {}, kind="test", keep=keep)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 1_000_000_000, 1_500_000_000, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-1000000000.ckpt", "step-1500000000.ckpt"]
    step, state = load_latest(tmp_path, kind="test") or pytest.fail("nothing was loaded")
    assert step == 1_500_000_000
    assert_state_of(step, state)


def test_a_checkpoint_just_written_outlives_unusable_later_ones(tmp_path: Path) -> None:
    *_, broken = save(tmp_path, 100, 300)
    broken.write_bytes(broken.read_bytes()[:-1])
    save(tmp_path, 200, keep=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step, _ = load_latest(tmp_path, kind="test") or pytest.fail("nothing was loaded")
    assert step == 200
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000200.ckpt"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert load_latest(tmp_path, kind="test") is None
    assert load_latest(tmp_path / "missing", kind="test") is None


def test_a_truncated_file_gives_way_to_the_one_before(tmp_path: Path) -> None:
    _, newest = save(tmp_path, 1, 2)
    whole = newest.read_bytes()
    magic = whole.index(b"\n") + 1
    header = whole.index(b"\n", magic) + 1
    for length in (0, 1, magic - 1, magic, magic + 20, header - 1, header, header + 1, 5000):
        assert length < len(whole)
        assert_falls_back(newest, whole[:length])
    assert_falls_back(newest, whole[:-1])
    assert_falls_back(newest, whole + b"\0")
    assert_falls_back(newest, b"\0" * len(whole))


def assert_falls_back(newest: Path, content: bytes) -> None:
    newest.write_bytes(content)
    with pytest.warns(CheckpointWarning) as caught:
        step, state = load_latest(newest.parent, kind="test") or pytest.fail("nothing was loaded")
    assert step == 1
    assert_state_of(1, state)
    [warning] = caught
    message = str(warning.message)
    assert newest.name in message
    assert "using 'step-000000001.ckpt' (step 1) instead" in message
    assert "\n" not in message


def test_a_flipped_bit_anywhere_is_found_or_harmless(tmp_path: Path) -> None:
    _, newest = save(tmp_path, 1, 2)
    whole = newest.read_bytes()
    header_end = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    payload = [*np.linspace(header_end, len(whole) - 1, 25).astype(int)]
    for offset in payload:
        damaged = bytearray(whole)
        damaged[offset] ^= 0x10
        assert_falls_back(newest, bytes(damaged))
    fell_back = 0
    for offset in range(0, header_end, 3):
        damaged = bytearray(whole)
        damaged[offset] ^= 0x10
        newest.write_bytes(bytes(damaged))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step, state = load_latest(tmp_path, kind="test") or pytest.fail("nothing was loaded")
        assert_state_of(step, state)
        fell_back += step == 1
    # The name of the format, kind, step, size and checksum fill the first 150 bytes.
    assert fell_back > 45


def test_foreign_files_are_named_and_passed_over(tmp_path: Path) -> None:
    oldest, middle, newest = save(tmp_path, 1, 2, 3)
    torch.save(state_of(3), newest)
    middle.write_bytes(middle.read_bytes().replace(b"-checkpoint 2\n", b"-checkpoint 9\n", 1))
    with pytest.warns(CheckpointWarning) as caught:
        found = load_latest(tmp_path, kind="test")
    assert found is not None
    assert found[0] == 1
    message = str(caught[0].message)
    assert "step-000000003.ckpt' is no checkpoint of this package" in message
    assert "step-000000002.ckpt' has format version 9; this package reads version 2" in message
    oldest.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*000000003"):
        load_latest(tmp_path, kind="test")


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for path in save(tmp_path, 1, 2):
        path.write_bytes(path.read_bytes().replace(b"-checkpoint 2\n", b"-checkpoint 1\n", 1))
    with pytest.raises(CheckpointError, match=r"are of an earlier version .* start a new run$"):
        load_latest(tmp_path, kind="test")


def test_another_kind_and_a_renamed_file_are_refused(tmp_path: Path) -> None:
    [path] = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="is of kind 'test', not 'other'"):
        load_latest(tmp_path, kind="other")
    path.rename(tmp_path / "step-000000002.ckpt")
    with pytest.raises(CheckpointError, match="says that it is of step 1"):
        load_latest(tmp_path, kind="test")


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    import hashlib
    import io

    [path] = save(tmp_path / "run", 1)
    payload = io.BytesIO()
    torch.save({"weights": Bomb(tmp_path / "mark")}, payload)
    magic, header, _ = path.read_bytes().split(b"\n", 2)
    content = json.loads(header)
    content["sha256"] = hashlib.sha256(payload.getvalue()).hexdigest()
    content["bytes"] = len(payload.getvalue())
    line = json.dumps(content).encode().ljust(len(header))
    path.write_bytes(b"\n".join([magic, line, payload.getvalue()]))
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        load_latest(tmp_path / "run", kind="test")
    assert not (tmp_path / "mark").exists()
    # The bomb is live: what guards against it is the loader alone.
    torch.load(io.BytesIO(payload.getvalue()), weights_only=False)
    assert (tmp_path / "mark").exists()


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 500, 100_000, 300_000])
def test_a_write_that_fails_midway_loses_nothing(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1)
    with (
        files_no_larger_than(limit),
        pytest.raises(CheckpointError, match=r"step-000000002\.ckpt' cannot be written") as caught,
    ):
        save_checkpoint(tmp_path, 2, state_of(2, values=250_000), kind="test", keep=1)
    assert "MB free" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.ckpt"]
    step, state = load_latest(tmp_path, kind="test") or pytest.fail("nothing was loaded")
    assert_state_of(step, state)
    save(tmp_path, 2)
    assert (load_latest(tmp_path, kind="test") or (0, {}))[0] == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_and_loses_nothing(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    for step in (1, 2):
        save_checkpoint(folder, step, state_of(step, values=375_000), kind="test", keep=3)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(folder, 3, state_of(3, values=375_000), kind="test", keep=3)
    message = str(caught.value)
    assert "step-000000003.ckpt' cannot be written: the disk is full" in message
    # 375,000 floats of 4 bytes are 1.5 MB; 4.2 MB less two of them leave 1.2 MB.
    assert "(1.5 MB needed, 1.2 MB free); older checkpoints are untouched" in message
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000000001.ckpt",
        "step-000000002.ckpt",
    ]
    step, state = load_latest(folder, kind="test") or pytest.fail("nothing was loaded")
    assert step == 2
    assert_state_of(step, state)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot be written: (Not a directory|File exists)"):
        save_checkpoint(tmp_path / "file", 1, {}, kind="test", keep=1)


WRITER = """
import sys, torch
from repfusion_env.checkpoint import save_checkpoint
for step in range(1, 10_000):
    state = {"step": step, "weights": torch.full((8_000_000,), float(step))}
    save_checkpoint(sys.argv[1], step, state, kind="test", keep=2)
"""


def test_a_killed_writer_leaves_a_loadable_folder(tmp_path: Path) -> None:
    for _ in range(4):
        kill_while_writing(tmp_path)
        step, state = load_latest(tmp_path, kind="test") or pytest.fail("nothing was loaded")
        assert_state_of(step, state)
        if leftovers := list(tmp_path.glob(".*.tmp")):
            break
    assert leftovers, "no process was killed in mid-write"
    assert leftovers[0].stat().st_size > 0
    save(tmp_path, step + 1)
    assert not list(tmp_path.glob(".*.tmp"))


def kill_while_writing(folder: Path) -> None:
    """Kill a process that writes 32 MB checkpoints once one is there and another half written."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)])
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            half = [path for path in folder.glob(".*.tmp") if size_of(path) > 1_000_000]
            if half and list(folder.glob("step-*.ckpt")):
                return
            assert process.poll() is None, "the writer ended by itself"
            time.sleep(0.001)
        pytest.fail("the writer wrote nothing in a minute")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
