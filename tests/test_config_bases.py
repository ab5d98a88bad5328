"""Configurations that are built on others, and the shipped ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from agents import train_reinforce
from agents.command_line import parse
from repfusion_env import ConfigError, load_config
from repfusion_env.config_loading import config_folder, parse_yaml, to_yaml


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    return problem


def test_a_file_is_laid_over_its_base_beside_it(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(
        tmp_path,
        bottom="{seed: 1, env: {num_envs: 8, group_size: 2}, distillation: {losses: {l1: 2.0}}}",
        middle="{base: bottom.yaml, seed: 2, env.num_envs: 16}",
        top="{base: ./middle.yaml, reward: teacher_probe, distillation.losses: {cosine: 1.0}}",
    )
    config = load_config(tmp_path / "top.yaml")
    assert (config.seed, config.env.num_envs, config.env.group_size) == (2, 16, 2)
    assert config.reward.kind == "teacher_probe"
    assert config.distillation.losses == {"cosine": 1.0}  # mappings are replaced, not mixed


def test_of_several_bases_the_later_wins(tmp_path):
    write(tmp_path, mine="{base: [cifar10, published], data.path: somewhere}")
    config = load_config(tmp_path / "mine.yaml")
    assert config.data.path == "somewhere"
    assert (config.data.name, config.teacher.precision) == ("cifar10", "bf16")  # of cifar10 alone
    assert (config.teacher.input, config.timesteps.count) == ("clean", 1000)  # published wins
    write(tmp_path, other="{base: [published, cifar10]}")
    assert load_config(tmp_path / "other.yaml").timesteps.count == 25


def test_a_file_may_be_called_like_the_shipped_one_that_it_is_built_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, digits="{base: digits, seed: 3}")
    config = load_config(tmp_path / "digits.yaml")
    assert config.seed == 3 and config.timesteps == load_config("digits").timesteps


def test_the_resolved_file_has_no_base(tmp_path):
    write(tmp_path, mine="base: debug")
    config = load_config(tmp_path / "mine.yaml")
    assert "base" not in parse_yaml(to_yaml(config))
    write(tmp_path, resolved=to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config == load_config("debug")


def test_circles_missing_and_broken_bases_are_refused_in_one_sentence(tmp_path):
    write(tmp_path, a="base: b.yaml", b="base: [digits, a.yaml]")
    assert "is built on itself: a.yaml -> b.yaml -> a.yaml" in refused(tmp_path / "a.yaml")
    write(tmp_path, lost="base: cifar11")
    assert re.search(r"lost.yaml': there is no .* Did you mean 'c", refused(tmp_path / "lost.yaml"))
    write(tmp_path, odd="base: {name: digits}")
    assert "it must be a name, a path, or a list" in refused(tmp_path / "odd.yaml")
    write(tmp_path, bad="seed: [", over="base: bad.yaml")
    assert re.search(r"bad.yaml' is not valid YAML", refused(tmp_path / "over.yaml"))


def test_two_files_may_share_a_base(tmp_path):
    write(
        tmp_path,
        root="seed: 5",
        left="{base: root.yaml, env.num_envs: 4}",
        right="{base: root.yaml, run.log_every: 7}",
        top="base: [left.yaml, right.yaml]",
    )
    config = load_config(tmp_path / "top.yaml")
    assert (config.seed, config.env.num_envs, config.run.log_every) == (5, 4, 7)


SHIPPED = sorted(config_folder().glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_header_of_a_shipped_file_runs_it_and_says_what_to_expect(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    header = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert header is not None
    commands = re.findall(r"^#\s+(python agents/train_reinforce\.py.*)$", header[0], re.MULTILINE)
    commands = [command.split("   ")[0] for command in commands]
    named = [c for c in commands if path.stem in c] if path.stem != "digits" else commands[:1]
    assert named
    for command in named:
        words = shlex.split(command)[2:]
        parsed = parse(words, prog="train_reinforce", description="",
                       conflicts=train_reinforce.conflicts)  # fmt: skip
        assert parsed.config is not None and parsed.label == path.stem
    if path.stem != "debug":
        assert re.search(r"\b(Time|Takes)\b", header[0]) and "easured" in header[0]
        assert "MEASURED" not in header[0]
