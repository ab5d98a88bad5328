"""What a user can get wrong, met where it is met: at the training command.

Wrong actions, steps before a reset and after close are met in a script instead, and tested with
the environments; all refusals of a configuration, teacher, bank or checkpoint beside their loader.
"""

from __future__ import annotations

import pickle
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from agents.train_reinforce import main
from repfusion_env.config_loading import check, merge, read_config_file, to_yaml

Options = dict[str, Any]


@pytest.fixture
def command(tiny: dict[str, Any], tmp_path: Path) -> Callable[..., list[str]]:
    """The words of a small training command; its runs go to ``tmp_path / "runs"``."""

    def words(**options: Any) -> list[str]:
        file = tmp_path / "tiny.yaml"
        base = merge(
            merge(read_config_file("digits"), tiny), {"run.folder": str(tmp_path / "runs")}
        )
        file.write_text(to_yaml(check(base)), encoding="utf-8")
        return ["--config", str(file), *(f"--{key}={value}" for key, value in options.items())]

    return words


def bank(path: Path, **changes: Any) -> Options:
    """An ``.npz`` bank of 24 grey images in 4 classes, with ``changes``."""
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 256, (24, 16, 16, 1), dtype=np.uint8),
        "labels": np.arange(24) % 4,
        "classes": np.array(list("abcd")),
    }
    np.savez(path / "bank.npz", **(arrays | changes))
    return {"data.name": "npz", "data.path": path / "bank.npz"}


def folder(path: Path, *, sizes: tuple[int, ...] = (16,)) -> Options:
    """A folder with 12 grey images, a folder for each of two classes."""
    rng = np.random.default_rng(0)
    for index in range(12):
        size = sizes[index % len(sizes)]
        file = path / "images" / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(file)
    return {"data.name": "folder", "data.path": path / "images"}


def teacher(path: Path, original: str) -> Path:
    return Path(shutil.copytree(original, path / "teacher"))


class Bomb:
    """Unpickling it makes a file, which shows that code has run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def no_image(path: Path, original: str) -> Options:
    options = folder(path)
    (path / "images" / "a" / "0.png").write_text("this is text")
    return options


def truncated_image(path: Path, original: str) -> Options:
    options = folder(path)
    file = path / "images" / "b" / "1.png"
    file.write_bytes(file.read_bytes()[:80])
    return options


def truncated_bank(path: Path, original: str) -> Options:
    options = bank(path)
    file = path / "bank.npz"
    file.write_bytes(file.read_bytes()[:2000])
    return options


def no_weights(path: Path, original: str) -> Options:
    copied = teacher(path, original)
    (copied / "diffusion_pytorch_model.safetensors").unlink()
    return {"teacher.model": copied}


def pickled_weights(path: Path, original: str) -> Options:
    copied = teacher(path, original)
    file = copied / "diffusion_pytorch_model.safetensors"
    file.write_bytes(pickle.dumps(Bomb(path / "exploded")))
    return {"teacher.model": copied}


def empty_folder(path: Path, original: str) -> Options:
    (path / "images").mkdir()
    return {"data.name": "folder", "data.path": path / "images"}


CASES: dict[str, tuple[Callable[[Path, str], Options], str]] = {
    "unknown key": (
        lambda path, original: {"env.num_env": 3},
        r"--env.num_env: there is no such option. Did you mean 'env.num_envs'\?",
    ),
    "wrong type": (
        lambda path, original: {"env.num_envs": "many"},
        r"env.num_envs: 'many' given; it must be a whole number",
    ),
    "misspelt layer": (
        lambda path, original: {"teacher.layers": "mid_block.resnets.1.conf2"},
        r"teacher.layers: .*'mid_block.resnets.1.conf2'.* did you mean 'mid_block.resnets.1.conv2'",
    ),
    "timestep outside": (
        lambda path, original: {"timesteps.values": "[0, 1000]"},
        r"timesteps.values: the grid holds 1000, but the teacher's scheduler has the .* 0\.\.999",
    ),
    "duplicates in the grid": (
        lambda path, original: {"timesteps.values": "[5, 7, 5]"},
        r"timesteps.values: \[5\] stand more than once in the grid",
    ),
    "no image": (no_image, r"a/0\.png'? .*image"),
    "truncated image": (truncated_image, r"b/1\.png'? .*(truncated|damaged|incomplete)"),
    "truncated bank": (truncated_bank, r"bank\.npz'? .*"),
    "labels out of range": (
        lambda path, original: bank(path, labels=np.arange(24) % 5),
        r"bank\.npz'?.*labels must be in 0\.\.3 \(4 classes\)",
    ),
    "mixed sizes": (
        lambda path, original: folder(path, sizes=(16, 20)),
        r"images.*(16x16.*20x20|20x20.*16x16).*data\.image_size",
    ),
    "channels": (
        lambda path, original: bank(path, images=np.zeros((24, 16, 16, 3), np.uint8)),
        r"teacher\.model: the images have 3 channels, the teacher takes 1",
    ),
    "empty bank": (
        lambda path, original: bank(
            path, images=np.zeros((0, 16, 16, 1), np.uint8), labels=np.zeros(0, int)
        ),
        r"bank\.npz'?.*empty",
    ),
    "empty folder": (empty_folder, r"images'?.*(no|empty)"),
    "no weights": (
        no_weights,
        r"teacher' has no weights: there is neither diffusion_pytorch_model",
    ),
    "pickle": (
        pickled_weights,
        r"diffusion_pytorch_model\.safetensors is damaged or not what its name says",
    ),
    "absent device": (
        lambda path, original: {"device": "cuda:9"},
        r"device: 'cuda:9' given, but this machine has \d+ usable CUDA devices; allowed here: auto",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_is_refused_in_one_sentence_and_leaves_nothing(
    case: str,
    command: Callable[..., list[str]],
    tiny_teacher: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    prepare, sentence = CASES[case]
    assert main(command(**prepare(tmp_path, tiny_teacher))) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("train_reinforce: error: ")
    assert re.search(sentence, line), line
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "exploded").exists()


def test_a_foreign_checkpoint_is_passed_over(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = command(**{"run.name": "run", "run.decisions": 40, "run.checkpoint_every": 5})
    assert main(words) == 0
    run = tmp_path / "runs" / "run"
    expected = load_file(run / "student.safetensors")
    (run / "summary.json").unlink()
    foreign = run / "checkpoints" / "step-000000099.ckpt"
    torch.save({"step": 99, "bomb": Bomb(tmp_path / "exploded")}, foreign)
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 0
    assert capsys.readouterr().err.splitlines()[0] == (
        f"warning: checkpoint '{foreign}' is no checkpoint of this package; "
        "using 'step-000000010.ckpt' (step 10) instead"
    )
    assert not (tmp_path / "exploded").exists()
    for name, value in load_file(run / "student.safetensors").items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own; called with another size in bytes, it grows to that."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(size: int) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={size}"
        words = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a file system can be mounted by root only")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_run_in_one_sentence_and_it_goes_on_with_space(
    command: Callable[..., list[str]],
    disk: Callable[[int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    options = {
        "run.decisions": 80,
        "run.checkpoint_every": 4,
        "run.log_every": 2,
        "run.keep_checkpoints": 2,
    }
    assert main(command(**options, **{"run.name": "whole"})) == 0
    whole = tmp_path / "runs" / "whole"
    size = (whole / "checkpoints" / "step-000000020.ckpt").stat().st_size
    # Two checkpoints are kept while a third is written; there is room for two and a half.
    place = disk(int(2.5 * size))
    capsys.readouterr()
    assert main(command(**options, **{"run.folder": place, "run.name": "run"})) == 1
    run = place / "run"
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if not line.startswith("reinforce: ")]
    assert errors[0].startswith(
        f"error: checkpoint '{run / 'checkpoints' / 'step-000000012.ckpt'}'"
    )
    assert "the disk is full" in errors[0] and "older checkpoints are untouched" in errors[0]
    assert errors[1:] == [f"go on with: python -m agents.train_reinforce --resume {run}"]
    assert said.out == "" and "Traceback" not in said.err
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-000000004.ckpt", "step-000000008.ckpt"]

    # Without a byte left nothing can go on, and nothing is lost by trying.
    with (
        pytest.raises(OSError, match="No space"),
        (place / "filler").open("wb", buffering=0) as filler,
    ):
        while True:
            filler.write(bytes(4096))
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["--resume", str(run)]) in (1, 2)
    said = capsys.readouterr()
    assert f"error: run '{run}' cannot be written: No space left on device" in said.err
    assert "Traceback" not in said.err
    assert (run / "metrics.jsonl").read_bytes() == before

    (place / "filler").unlink()
    disk(20 * size)
    assert main(["--resume", str(run)]) == 0
    for weights in ("student", "policy"):
        expected = load_file(whole / f"{weights}.safetensors")
        for name, value in load_file(run / f"{weights}.safetensors").items():
            np.testing.assert_array_equal(value, expected[name], err_msg=f"{weights}: {name}")


@pytest.mark.parametrize("what", ["weights", "figure"])
def test_what_cannot_be_written_at_the_very_end_is_one_sentence_too(
    what: str,
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert main(command(**{"run.decisions": 40, "run.name": "run"})) == 0
    run = tmp_path / "runs" / "run"
    for name in ("summary.json", "summary.png"):
        (run / name).unlink()
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if what == "weights":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    else:
        (run / "summary.png").mkdir()
    try:
        assert main(["--resume", str(run)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr()
    reason = {"weights": "File too large", "figure": "Is a directory"}[what]
    assert f"error: run '{run}' cannot be written: {reason}\n" in said.err
    assert "Traceback" not in said.err
    assert not (run / "summary.json").exists()
    if what == "figure":
        (run / "summary.png").rmdir()
    assert main(["--resume", str(run)]) == 0
    assert (run / "summary.json").exists() and (run / "summary.png").is_file()
