from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agents.command_line import guarded, parse
from agents.train_reinforce import conflicts
from agents.train_reinforce import main as train_reinforce
from agents.train_sb3 import main as train_sb3
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import ConfigError, load_config


def read(*words: str, **options: Any) -> ExperimentConfig:
    command = parse(words, prog="test", description="", **options)
    assert command.config is not None
    return command.config


def refused(*words: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(words, prog="test", description="", **options)
    return caught.value.problems


def test_without_options_it_is_the_default_configuration():
    command = parse([], prog="test", description="")
    assert (command.config, command.label, command.resume) == (
        load_config("digits"),
        "digits",
        None,
    )


@pytest.mark.parametrize(
    ("words", "path", "expected"),
    [
        ("--env.num_envs 8", "env.num_envs", 8),
        ("--env.num_envs=8", "env.num_envs", 8),
        ("--env 8", "env.num_envs", 8),  # a section's main key
        ("--seed 3 --seed 4", "seed", 4),
        ("--optimizer.learning_rate 1e-4", "optimizer.learning_rate", 1e-4),
        ("--reward teacher_probe", "reward.kind", "teacher_probe"),
        ("--reward.kind=student", "reward.kind", "student"),
        ("--distillation.dense", "distillation.dense", True),
        ("--distillation.dense --seed 3", "distillation.dense", True),
        ("--distillation.dense false", "distillation.dense", False),
        ("--reinforce.normalize_advantage=false", "reinforce.normalize_advantage", False),
        ("--timesteps.values [0,50,100]", "timesteps.values", (0, 50, 100)),
        ("--timesteps.values 50", "timesteps.values", (50,)),
        ("--teacher.layers mid_block", "teacher.layers", ("mid_block",)),
        ("--teacher.layers [mid_block,conv_in]", "teacher.layers", ("mid_block", "conv_in")),
        ("--reinforce.hidden []", "reinforce.hidden", ()),
        ("--distillation.losses cosine", "distillation.losses", {"cosine": 1.0}),
        ("--distillation.losses.cosine 2", "distillation.losses", {"cosine": 2.0}),
        (
            "--distillation.losses.hint 1 --distillation.losses.cosine 2",
            "distillation.losses",
            {"hint": 1.0, "cosine": 2.0},
        ),
        ("--sb3.arguments.n_steps 4", "sb3.arguments", {"n_steps": 4}),
        ("--data.path 123", "data.path", "123"),  # text stays text
        ("--run.name null", "run.name", None),
        ("--run.name=--x", "run.name", "--x"),
        ("--data.image_size null", "data.image_size", None),
        ("--algo dqn", "sb3.algo", "dqn"),
    ],
)
def test_options_set_keys(words: str, path: str, expected: Any):
    found: Any = read(*words.split(), aliases={"algo": "sb3.algo"})
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)


def test_options_replace_those_of_the_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 5\nenv: {num_envs: 8, group_size: 2}\n")
    command = parse(["--env.num_envs", "4", "--config", str(file)], prog="test", description="")
    assert command.config is not None and command.label == "mine"
    assert (command.config.seed, command.config.env.num_envs) == (5, 4)
    assert command.config.env.group_size == 2


def test_a_run_repeated_from_its_folder_keeps_its_label(tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps({"agent": "reinforce", "label": "cifar10"}))
    (tmp_path / "config.yaml").write_text("seed: 5\n")
    command = parse(["--config", str(tmp_path / "config.yaml")], prog="test", description="")
    assert command.label == "cifar10"


def test_all_that_is_wrong_is_said_at_once():
    words = (
        "--env.num_env 8 stray --teacher.input foggy --seed -1 --reward --distillation.losses [1 "
        "--timesteps.values [3,3] --run.name a/b"
    )
    problems = refused(
        *words.split(),
        conflicts=lambda config: ["never reached, as there is no configuration to judge"],
    )
    assert problems == [
        "--env.num_env: there is no such option. Did you mean 'env.num_envs'?",
        "'stray': options look like --key value",
        "--reward: a value is missing",
        "--distillation.losses: '[1' is not valid YAML",
        "seed: -1 given; it must be 0 or more",
        "teacher.input: 'foggy' given; allowed: 'noised' or 'clean'.",
        "timesteps.values: [3] stand more than once in the grid",
    ]
    problems = refused("--run.name", "a/b", "--env.action", "continuous", conflicts=conflicts)
    assert [problem.partition(":")[0] for problem in problems] == ["env.action", "run.name"]


def test_resume_takes_no_other_options():
    command = parse(["--resume", "runs/x"], prog="test", description="")
    assert (command.config, command.resume) == (None, Path("runs/x"))
    assert refused("--resume", "runs/x", "--seed", "1") == [
        "--resume: a run goes on with its own configuration; give no other options"
    ]
    assert refused("--resume") == ["--resume: expected one argument"]


@pytest.mark.parametrize("main", [train_reinforce, train_sb3])
def test_wrong_use_ends_in_sentences_and_code_2(main: Any, capsys: pytest.CaptureFixture[str]):
    assert main(["--env.nums", "3"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"{main.__module__.removeprefix('agents.')}: error: --env.nums: there")
    assert line.endswith("Did you mean 'env.num_envs'?")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "--env.action continuous",
            "env.action: REINFORCE draws from categories, but 'continuous' is",
        ),
        ("--env.num_envs 1", "reinforce.baseline: 'batch' compares the lanes of a step"),
        ("--reinforce.network cnn", "reinforce.network: 'cnn' needs images, so observation.source"),
    ],
)
def test_what_reinforce_cannot_do_is_refused(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
):
    assert train_reinforce(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train_reinforce: error: {sentence}")


def test_a_taken_name_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "mine").mkdir()
    words = ["--run.folder", str(tmp_path), "--run.name", "mine", "--teacher.model", "/nowhere"]
    assert train_reinforce(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run.name: '{tmp_path / 'mine'}' exists already; go on with it by --resume" in line


def test_errors_of_other_libraries_keep_their_traceback():
    with pytest.raises(ValueError, match="invalid literal"):
        guarded(lambda: int("x"), "test")


def test_ctrl_c_before_training_is_one_line(capsys: pytest.CaptureFixture[str]):
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert guarded(interrupted, "test") == 130
    assert capsys.readouterr().err == "stopped before training began\n"


def test_help_names_every_option_with_its_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        train_sb3(["--help", "--config", "debug"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "python -m agents.train_sb3 [--config FILE]" in text
    assert (
        "--env.num_envs INT lanes of the vector environment: images per step (default: 16)" in text
    )
    assert "--distillation.dense BOOL" in text and "(default: false)" in text
    assert "(default: {hint: 1.0})" in text and "(default: [])" in text
    assert "--sb3.algo TEXT, --algo TEXT" in text
    assert "--teacher.input {noised,clean}" in text
    assert "--reinforce." not in text and "--bandit." not in text
    for section in ("data", "teacher", "observation", "evaluation"):
        assert f"--{section}." in text


def test_wrong_use_and_help_load_nothing_heavy():
    code = """
import sys
from agents.train_reinforce import main
try:
    main(["--help"])
except SystemExit:
    pass
print("END OF HELP")
assert main(["--env.action", "continuous", "--teacher.layers", "nothing"]) == 2
from agents.train_sb3 import main
assert main(["--algo", "sac"]) == 2
print({"torch", "diffusers", "matplotlib", "stable_baselines3"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    shown = done.stdout.partition("END OF HELP")[0]
    assert "--reinforce.baseline" in shown
    assert "--sb3." not in shown and "--bandit." not in shown
