from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from agents.sb3_algorithms import ALGORITHMS
from agents.train_reinforce import main as train_reinforce
from agents.train_sb3 import main

Undrawn = Callable[[], AbstractContextManager[None]]
LANES, STEPS = 4, 24
SMALL: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 4, "batch_size": 8, "n_epochs": 1},
    "replay": {"learning_starts": 16, "buffer_size": 60, "batch_size": 8},
    "a2c": {},
    "trpo": {"n_steps": 4, "batch_size": 8},
    "ars": {"n_delta": 2, "n_top": 1, "n_eval_episodes": 8},
}
SMALL |= dict.fromkeys(["recurrent_ppo", "maskable_ppo"], SMALL["ppo"])


def leaves(value: Any, path: str = "") -> set[str]:
    """Dotted paths of a summary."""
    if not isinstance(value, dict):
        return {path}
    return {leaf for key, item in value.items() for leaf in leaves(item, f"{path}.{key}")}


def settings(name: str) -> dict[str, Any]:
    return {
        "sb3.algo": name,
        "sb3.arguments": SMALL.get(name, SMALL["replay"]),
        "env.action": "discrete" if "Discrete" in ALGORITHMS[name].actions else "continuous",
        "run.decisions": LANES * STEPS,
        "run.log_every": 4,
        "run.checkpoint_every": 8,
        "evaluation.images": 8,
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_goes_on_exactly_and_leaves_the_same_behind(
    name: str,
    experiment: Callable[..., Path],
    logged: Callable[[Path], Any],
    undrawn: Undrawn,
    tmp_path: Path,
):
    config = str(experiment(**settings(name)))
    with undrawn():
        assert main(["--config", config, "--run.name", "whole"]) == 0
    whole = tmp_path / "whole"
    rows = [row for row in logged(whole) if "reward/mean" in row]
    assert [row["step"] for row in rows] == list(range(4, STEPS + 1, 4))
    assert all(sum(row["timestep/counts"]) == 4 * LANES for row in rows)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["agent"] == f"sb3-{name}"
    assert leaves(summary) == {
        ".agent",
        ".reward.kind",
        ".reward.learned",
        ".reward.random",
        *(f".reward.fixed.{t}" for t in (0, 200, 400, 600, 800)),
        ".reward.best_per_image",
        ".timestep.mean",
        ".timestep.deviation",
        ".student.headline",
        ".student.linear_probe_accuracy",
        ".student.metrics.accuracy",
        ".heldout_images",
        ".decisions",
        ".decisions_per_second",
        ".seconds",
        ".teacher_evaluations.setup",
        ".teacher_evaluations.training",
    }
    assert summary["decisions"] == LANES * STEPS
    assert zipfile.is_zipfile(whole / "model.zip")
    with undrawn():
        assert_goes_on_exactly(whole, main, logged)


def assert_goes_on_exactly(
    whole: Path, main: Callable[[list[str]], int], logged: Callable[[Path], Any]
) -> None:
    # As if it had been killed after the last checkpoint but one: replay buffer, optimizers,
    # counters and random states come back from there.
    run = whole.parent / "again"
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    sorted((run / "checkpoints").iterdir())[-1].unlink()
    assert main(["--resume", str(run)]) == 0
    assert logged(run) == logged(whole)
    for weights in ("policy", "student"):
        ours, theirs = (load_file(path / f"{weights}.safetensors") for path in (run, whole))
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key], value, err_msg=f"{weights}: {key}")


TWO_LAYERS = {"teacher.layers": ["down_blocks.0.resnets.0", "mid_block.resnets.1.conv2"]}
# A space of each kind under an algorithm of each family.
PAIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("reinforce", "timestep_and_layer"): TWO_LAYERS,
    ("ppo", "timestep_set"): {"env.set_size": 2},
    ("maskable_ppo", "timestep_and_layer"): {**TWO_LAYERS, "timesteps.min_snr": 0.1},
    ("dqn", "layer"): {"timesteps.values": [200], **TWO_LAYERS},
    ("sac", "continuous_timestep"): {},
}


@pytest.mark.parametrize(("name", "action"), PAIRS)
def test_every_kind_of_space_is_driven_and_goes_on_exactly(
    name: str,
    action: str,
    experiment: Callable[..., Path],
    logged: Callable[[Path], Any],
    undrawn: Undrawn,
    tmp_path: Path,
):
    base = settings("ppo" if name == "reinforce" else name)
    command = train_reinforce if name == "reinforce" else main
    config = str(experiment(**{**base, "env.action": action, **PAIRS[name, action]}))
    assert command(["--config", config, "--run.name", "whole"]) == 0
    rows = [row for row in logged(tmp_path / "whole") if "reward/mean" in row]
    chosen = 2 if action == "timestep_set" else 1
    assert all(sum(row["timestep/counts"]) == 4 * LANES * chosen for row in rows)
    assert ("layer/counts" in rows[0]) == ("layer" in action)
    if "timesteps.min_snr" in PAIRS[name, action]:
        assert all(sum(row["timestep/counts"][-2:]) == 0 for row in rows)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert len(summary["reward"]["fixed"]) == {"timestep_and_layer": 10, "layer": 2}.get(action, 5)
    if "layer" in action:
        assert list(summary["layer"]) == TWO_LAYERS["teacher.layers"]
        assert sum(summary["layer"].values()) == pytest.approx(1)
    with undrawn():
        assert_goes_on_exactly(tmp_path / "whole", command, logged)


def test_the_summary_has_the_keys_of_reinforce(experiment: Callable[..., Path], tmp_path: Path):
    config = str(experiment(**settings("a2c")))
    assert main(["--config", config, "--run.name", "sb3"]) == 0
    assert train_reinforce(["--config", config, "--run.name", "ours"]) == 0
    ours, theirs = (
        leaves(json.loads((tmp_path / name / "summary.json").read_text()))
        for name in ("ours", "sb3")
    )
    assert ours == theirs
    tags = [
        {tag for line in (tmp_path / name / "metrics.jsonl").open() for tag in json.loads(line)}
        for name in ("ours", "sb3")
    ]
    shared = {tag for tag in tags[0] if not tag.startswith("policy/")}
    assert shared <= tags[1] and "train/value_loss" in tags[1]


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        (
            ["--algo", "sac"],
            [
                "sb3.algo: sac acts on Box spaces alone, but env.action 'discrete' is Discrete; "
                "choose one of ppo, a2c, dqn, qrdqn, trpo, recurrent_ppo, maskable_ppo, ars, or "
                "env.action continuous or continuous_timestep"
            ],
        ),
        (
            ["--algo", "dqn", "--env.action", "timestep_set"],
            [
                "sb3.algo: dqn acts on Discrete spaces alone, but env.action 'timestep_set' is "
                "MultiDiscrete; choose one of ppo, a2c, trpo, recurrent_ppo, maskable_ppo, or "
                "env.action discrete or layer"
            ],
        ),
        (
            ["--algo", "ars", "--env.action", "timestep_set"],
            ["sb3.algo: ars acts on Discrete and Box spaces alone, but"],
        ),
        (["--algo", "pppo"], ["sb3.algo: unknown algorithm 'pppo'. Did you mean 'ppo'?"]),
        (["--timesteps.min_snr", "0.1"], ["timesteps.min_snr: ppo takes no action masks;"]),
        (["--sb3.arguments.n_step", "3"], ["sb3.arguments: ppo has no 'n_step'. Did you mean"]),
        (
            ["--sb3.arguments", "{seed: 1, device: cpu}"],
            [
                "sb3.arguments: 'seed' is set by seed",
                "sb3.arguments: 'device' is set by sb3.device",
            ],
        ),
        (["--sb3.device", "gpu"], ["sb3.device: 'gpu' given; allowed: auto, cpu, cuda"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    options: list[str], sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*options, "--run.folder", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(sentences)
    for line, sentence in zip(said, sentences, strict=True):
        assert line.startswith(f"train_sb3: error: {sentence}")
    assert not (tmp_path / "runs").exists()


def test_values_that_the_algorithm_refuses_end_in_its_sentence(
    experiment: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    config = str(experiment(**settings("ppo") | {"sb3.policy": "NoSuchPolicy"}))
    assert main(["--config", config]) == 2
    assert "sb3: ppo with policy 'NoSuchPolicy'" in capsys.readouterr().err


def test_a_rollout_of_few_lanes_is_a_whole_mini_batch(
    experiment: Callable[..., Path], recwarn: pytest.WarningsRecorder
):
    # SB3 warns of a mini-batch larger than the rollout.
    config = experiment(**{**settings("ppo"), "sb3.arguments": {}, "run.decisions": LANES * 8})
    assert main(["--config", str(config)]) == 0
    assert not [warning for warning in recwarn if "mini-batch" in str(warning.message)]


def test_pixels_get_our_convolutions(experiment: Callable[..., Path], tmp_path: Path):
    config = str(experiment(**settings("ppo") | {"observation.source": "pixels"}))
    assert main(["--config", config, "--run.name", "pixels"]) == 0
    names = load_file(tmp_path / "pixels" / "policy.safetensors")
    assert names["features_extractor.layers.0.weight"].shape == (32, 1, 3, 3)
