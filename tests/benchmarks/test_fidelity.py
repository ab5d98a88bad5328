"""How far fast paths are from the plain one: what is compared, and that differences are seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fidelity import (
    FAST,
    GROUP,
    PATHS,
    FastPath,
    Outcome,
    compare,
    difference,
    learning,
    learning_table,
    main,
    table,
)
from repfusion_env.config_loading import load_config


def _outcome(features: list[list[float]], gradient: list[float], reward: list[float]) -> Outcome:
    return Outcome(torch.tensor(features), torch.tensor(gradient), torch.tensor(reward))


def test_errors_are_relative_to_the_plain_path():
    plain = _outcome([[3.0, 4.0], [0.0, 10.0]], [0.0, 2.0], [-1.0, -3.0])
    other = _outcome([[3.0, 4.5], [0.0, 13.0]], [1.0, 2.0], [-1.0, -2.0])
    assert difference(other, plain) == pytest.approx(
        {
            "features mean": (0.1 + 0.3) / 2,
            "features max": 0.3,
            "gradient": 0.5,
            "reward mean": 0.25,  # of differences 0 and 1, rewards of size 2
            "reward max": 0.5,
        }
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: str) -> dict[str, Any]:
    wanted = {
        "plain fp32, again",
        "both bf16, channels-last (fast)",
        "cache in fp32",
        "cache in bf16",
        "images in groups",
        "reward.student training",
    }
    paths = [path for path in PATHS if path.name in wanted]
    assert len(paths) == len(wanted)
    overrides = {
        "device": "cpu",
        "teacher.model": tiny_teacher,
        "teacher.standardize_images": 32,
        "data.train_limit": 64,
        "data.heldout_limit": 16,
        "timesteps.count": 3,
        "env.num_envs": 8,
        "optimizer.batch_size": 8,
        "observation.source": "pixels",
        "cache.folder": str(tmp_path_factory.mktemp("cache")),
    }
    return compare("digits", overrides, paths=paths, batches=2, trained=3)


def test_the_plain_path_repeats_itself_and_fast_ones_do_not(measured):
    found = measured["paths"]
    assert set(found["plain fp32, again"].values()) == {0.0}
    fast = found["both bf16, channels-last (fast)"]
    # bf16 keeps 8 bits: errors of a few thousandths to a few hundredths.
    assert 1e-4 < fast["features mean"] < fast["features max"] < 0.2
    assert 1e-4 < fast["gradient"] < 0.3
    assert 0 < fast["reward mean"] < fast["reward max"] < 1


def test_a_cache_gives_what_it_was_given_in_its_precision(measured):
    found = measured["paths"]
    assert found["cache in fp32"]["features max"] == 0.0
    # Rounding to 8 bits: at most half of 2^-8 of each value before standardisation.
    assert 1e-4 < found["cache in bf16"]["features mean"] < 0.1


def test_groups_and_the_training_forwards_student_see_the_same_features(measured):
    found = measured["paths"]
    assert found["images in groups"]["features max"] < 1e-4
    assert found["images in groups"]["gradient"] < 1e-3
    training = found["reward.student training"]
    assert (training["features max"], training["gradient"]) == (0.0, 0.0)
    assert training["reward mean"] > 0


def test_the_table_has_a_row_for_every_path(measured):
    rows = table(measured).splitlines()
    assert len(rows) == 2 + len(measured["paths"]) + 2
    assert rows[-1].startswith("Relative errors; configuration digits, 2 steps from a student")


def test_a_path_that_computes_something_else_is_far_away(tiny_teacher):
    path = FastPath("other noise", {"teacher.noise_seed": 1})
    overrides = {
        "device": "cpu",
        "teacher.model": tiny_teacher,
        "teacher.standardize_images": 8,
        "data.train_limit": 32,
        "timesteps.values": (200,),
        "env.num_envs": 4,
        "optimizer.batch_size": 4,
        "observation.source": "pixels",
    }
    found = compare("digits", overrides, paths=[path], batches=1, trained=0)["paths"]
    assert found["other noise"]["features mean"] > 0.1


def test_every_path_is_a_configuration():
    for path in PATHS:
        config = load_config("digits", {"teacher.noise": "fixed", **path.changes})
        assert config.env.group_size == (GROUP if path.grouped else 1)
        assert (config.cache.store == "memory") == path.twice
    assert load_config("digits", FAST).student.precision == "bf16"


def _runs(rewards: list[float], accuracy: float) -> dict[str, Any]:
    return {
        "runs": [
            {
                "seed": seed,
                "reward": {"learned": reward},
                "accuracy": {"50": {"learned": accuracy}},
            }
            for seed, reward in enumerate(rewards)
        ]
    }


def test_learning_is_compared_seed_by_seed(tmp_path: Path, capsys):
    files = []
    for name, result in {
        "plain": _runs([-0.2, -0.3, -0.4], 0.9),
        "same": _runs([-0.21, -0.29, -0.4], 0.9),
        "worse": _runs([-0.30, -0.41, -0.5], 0.9),
    }.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(result), encoding="utf-8")
    assert main(["--learning", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| same | held-out reward | -0.3000 | -0.3000 | +0.0000 [")
    assert lines[2].endswith("| yes |") and lines[3].endswith("| yes |")
    assert lines[4].startswith("| worse | held-out reward | -0.3000 | -0.4033 | -0.1033 [")
    assert lines[4].endswith("| **no** |")


def test_learning_of_other_seeds_is_refused():
    with pytest.raises(ValueError, match=r"of the seeds \[0, 1\] and \[0\] given"):
        learning(_runs([1.0, 2.0], 0.5), _runs([1.0], 0.5))
    assert "within the interval" in learning_table({})
