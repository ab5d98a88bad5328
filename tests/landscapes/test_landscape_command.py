"""The landscape of real teachers, through the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from repfusion_env import landscape
from repfusion_env.config_loading import load_config
from repfusion_env.landscapes import LandscapeSettings, measure
from repfusion_env.landscapes.denoising import measure_denoising

LAYERS = ("down_blocks.2.resnets.0", "mid_block.resnets.1.conv2")
SETTINGS = LandscapeSettings(layers=LAYERS, images=60, draws=2)
KEYS = {
    "timesteps.values": [0, 40, 900],
    "data.train_limit": 60,
    "data.heldout_limit": 40,
    "teacher.standardize_images": 16,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("landscape") / "digits"
    keys = [word for key, value in KEYS.items() for word in (f"--{key}", str(value))]
    chosen = ["--images", "60", "--draws", "2", "--layers", *LAYERS]
    assert landscape.main([*chosen, *keys, "--out", str(out)]) == 0
    return out


def test_command_writes_one_row_for_each_layer_and_timestep(folder):
    with (folder / "landscape.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["timestep"]) for row in rows] == [
        (layer, timestep) for layer in LAYERS for timestep in ("0", "40", "900")
    ]
    accuracy = {row["timestep"]: float(row["accuracy"]) for row in rows[3:]}
    assert accuracy["40"] > 0.6 > 0.4 > accuracy["900"]  # of ten classes, 60 labels
    assert sum(float(row["best_for"]) for row in rows[3:]) == pytest.approx(1)


def test_page_figures_and_json_tell_the_verdict(folder):
    told = json.loads((folder / "landscape.json").read_text())
    assert told["verdict"].startswith("Per-sample selection")
    assert told["verdict"] in (folder / "landscape.md").read_text()
    assert told["main_row"] == "mid_block.resnets.1.conv2"
    for name in ("maps", "selection", "representation", "cka", "images", "reconstructions"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_measurement_goes_on_from_what_is_kept(folder, monkeypatch):
    from repfusion_env.landscapes import reading, report

    damaged = folder / "timesteps" / "t40.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:200])
    read: list[int] = []
    original = reading.Reader.read
    monkeypatch.setattr(
        reading.Reader, "read", lambda self, t: (read.append(t), original(self, t))[1]
    )
    found = measure(load_config("digits", KEYS), SETTINGS, folder=folder)
    assert read == [40]
    assert report.as_csv(found) == (folder / "landscape.csv").read_text()


def test_one_step_restores_little_noise_and_fails_where_no_signal_is_left():
    config = load_config("digits", {"data": {"heldout_limit": 20}, "device": "cpu"})
    from repfusion_env.data import load_data

    found = measure_denoising(config, load_data(config.data)[1], (5, 100, 999))
    assert not isinstance(found, str)
    # At t = 5 the noise itself has 0.002 of the variance of pixels in [-1, 1].
    assert found.error[0] < 0.02 < found.error[1] < 0.2
    assert found.error[2] > 0.5


def test_clean_input_has_one_draw_and_says_so():
    overrides = {
        "teacher": {"input": "clean", "standardize_images": 8},
        "data": {"train_limit": 40, "heldout_limit": 20},
        "timesteps": {"values": [0, 300]},
        "device": "cpu",
    }
    settings = LandscapeSettings(layers=("mid_block.resnets.1.conv2",), images=40, draws=3)
    found = measure(load_config("digits", overrides), settings)
    assert found.draws == 1
    assert found.selection.split_noise is None
    np.testing.assert_allclose(
        found.selection.naive.gain,
        found.image_rewards[0].max(0).mean() - found.selection.fixed_reward,
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layers", "mid_blok"], "the teacher has no layer 'mid_blok'"),
        (["--timestep.count", "3"], "there is no such option. Did you mean 'timesteps.count'?"),
        (["--images", "3"], "--images: 3 given; it must be 20 or more"),
        (["--run", "nowhere"], "there is no run folder 'nowhere'"),
        (["--observation.source", "student"], "without --run there is no trained student"),
    ],
)
def test_bad_input_ends_in_a_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert landscape.main(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("*"))
