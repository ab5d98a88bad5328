"""Features computed ahead of the runs that read them, through the command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from repfusion_env import cache
from repfusion_env.config_loading import load_config, merge
from repfusion_env.data.bank import ImageBank
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.feature_cache.filling import fill
from repfusion_env.features import TeacherFeatures
from repfusion_env.teachers.reading.network import NetworkTeacher

IMAGES, HELD_OUT, TIMES = 20, 8, (0, 200, 400)


@pytest.fixture
def keys(tiny_teacher: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "teacher.model": tiny_teacher,
        "teacher.noise": "fixed",
        "teacher.standardize_images": 4,
        "data.train_limit": IMAGES,
        "data.heldout_limit": HELD_OUT,
        "timesteps.values": list(TIMES),
        "env.num_envs": 8,
        "optimizer.batch_size": 8,
        "cache.folder": str(tmp_path / "kept"),
        "device": "cpu",
    }


def _words(keys: dict[str, Any]) -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def _folder(keys: dict[str, Any], out: str) -> Path:
    """The folder of the first cache that the command has named."""
    return next(path for path in Path(keys["cache.folder"]).iterdir() if path.name in out)


def test_a_run_finds_what_the_command_has_computed(keys, capsys, monkeypatch):
    encoded: list[int] = []
    encode = NetworkTeacher.encode
    with monkeypatch.context() as patch:
        patch.setattr(
            NetworkTeacher, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x)
        )
        assert cache.main(_words(keys)) == 0
    # One that told the shapes, the statistics, and each image for the agent and for all timesteps.
    assert sum(encoded) == 1 + 3 * 4 + 2 * (IMAGES + HELD_OUT)
    out = capsys.readouterr().out
    assert f"{3 * IMAGES} features, {3 * IMAGES} computed, 0 were there" in out
    assert f"{3 * HELD_OUT} features, {3 * HELD_OUT} computed, 0 were there" in out
    seen: list[int] = []
    honest = NetworkTeacher.features

    def counted(self: NetworkTeacher, images: torch.Tensor, timesteps: torch.Tensor) -> Any:
        seen.append(len(images))
        return honest(self, images, timesteps)

    monkeypatch.setattr(NetworkTeacher, "features", counted)
    env = RepFusionVectorEnv(config=merge(keys, {"cache.store": "disk"}))
    env.reset(seed=0)
    for step in range(4):
        env.action_space.seed(step)
        env.step(env.action_space.sample())
    env.trainer.judge(env.trainer.parts.heldout, *[torch.zeros(4, dtype=torch.int64)] * 3)
    assert seen == [1]  # which told the features' shapes


def test_the_same_command_goes_on_where_it_was_stopped(keys, capsys, monkeypatch):
    honest, asked = ImageBank.pixels, []

    def pixels(self: ImageBank, ids: torch.Tensor) -> torch.Tensor:
        asked.append(len(ids))
        # After the statistics and the observations, in the middle of the first timestep.
        if sum(asked) > 3 * 4 + 1 + IMAGES + HELD_OUT and len(asked) % 2 == 0:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(ImageBank, "pixels", honest)
        return honest(self, ids)

    monkeypatch.setattr(ImageBank, "pixels", pixels)
    assert cache.main(_words(keys)) == 130
    stopped = capsys.readouterr()
    assert "the same command goes on from there" in stopped.err
    done = int(stopped.out.split(" features")[0].split()[-1])
    assert 0 < done < 3 * IMAGES
    assert cache.main(_words(keys)) == 0
    out = capsys.readouterr().out
    assert f"{3 * IMAGES} features, {3 * IMAGES - done} computed, {done} were there" in out


def test_a_stop_is_heard_before_the_first_feature_too(keys, monkeypatch):
    looks: list[Any] = []
    monkeypatch.setattr(TeacherFeatures, "embedded", lambda *given: looks.append(given))
    (found,) = fill(load_config("digits", keys), stopped=lambda: True)
    assert not found.finished and found.features == 0 and not looks


def test_only_what_is_named_is_computed_and_seeds_share_where_they_can(keys, capsys):
    words = _words(keys | {"augmentation.flip": True})
    assert cache.main([*words, "--timesteps", "200", "--split", "train", "--seeds", "0", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count(f"{2 * IMAGES} features, {2 * IMAGES} computed") == 2  # mirrored ones too
    folder = _folder(keys, out)
    assert sorted(path.name for path in folder.glob("*.bin")) == ["t0200.bin", "t0200m.bin"]
    shared = [*words, "--teacher.noise_seed", "4", "--timesteps", "200", "--split", "train"]
    assert cache.main([*shared, "--seeds", "0", "1"]) == 0
    assert capsys.readouterr().out.count("features,") == 1


def test_damage_is_found_and_repaired(keys, capsys):
    assert cache.main([*_words(keys), "--split", "train"]) == 0
    folder = _folder(keys, capsys.readouterr().out)
    assert cache.main(["--verify", keys["cache.folder"]]) == 0
    assert f"{folder.name}: {3 * IMAGES} records, 0 damaged" in capsys.readouterr().out
    path = folder / "t0200.bin"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    (folder / "t0400.bin").write_bytes(b"cut")
    assert cache.main(["--verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"{2 * IMAGES - 1} records, 1 damaged" in out and "it has 3 bytes where" in out
    assert cache.main(["--verify", str(folder), "--repair"]) == 1
    assert cache.main(["--verify", str(folder)]) == 0
    capsys.readouterr()
    assert cache.main([*_words(keys), "--split", "train"]) == 0
    assert f"{3 * IMAGES} features, {IMAGES + 1} computed" in capsys.readouterr().out


def test_a_list_tells_what_is_kept(keys, capsys):
    assert cache.main([*_words(keys), "--split", "train", "--cache.precision", "bf16"]) == 0
    folder = _folder(keys, capsys.readouterr().out)
    assert cache.main(["--list", str(folder)]) == 0
    out = capsys.readouterr().out
    width = json.loads((folder / "manifest.json").read_text())["identity"]["shapes"][0][0]
    assert f"{width}, bf16, {2 * width} bytes each" in out and f"images     {IMAGES} of" in out
    assert "timesteps  0, 200, 400" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--teacher.noise", "fresh"], "under teacher.noise fresh no feature comes twice"),
        (["--timesteps", "7"], "--timesteps: 7 given, which runs of this configuration never ask"),
        (["--seeds", "-1"], "--seeds: -1 given; it must be 0 or more"),
        (["--cache.disk_gib", "1e-6"], "cache.disk_gib: "),
        (["--cache.dist_gib", "1"], "Did you mean 'cache.disk_gib'?"),
        (["--repair"], "--repair: given without --verify FOLDER"),
        (["--verify", "nowhere"], "there is no folder 'nowhere'"),
        (["--list", "."], "there is no feature cache in '.'"),
    ],
)
def test_bad_input_ends_in_a_sentence(arguments, sentence, keys, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = arguments[0] in ("--verify", "--list")
    assert cache.main([*([] if alone else _words(keys)), *arguments]) == 2
    assert sentence in capsys.readouterr().err
