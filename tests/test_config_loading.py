from __future__ import annotations

import dataclasses
import random
import re
import typing

import pytest

from repfusion_env import ConfigError, load_config, registry
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import (
    accepts_text,
    config_folder,
    merge,
    options,
    parse_yaml,
    sections,
    to_dict,
    to_yaml,
)


def _problems(overrides, config=None):
    with pytest.raises(ConfigError) as refused:
        load_config(config, overrides)
    return refused.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E3", -2e3),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("7", 7),
        ("'1e-4'", "1e-4"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("true", True),
        ("null", None),
    ],
)
def test_yaml_numbers_are_what_people_mean(text, value):
    found = parse_yaml(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def _random_value(kind, rng):
    """A value that the option's type allows."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return rng.choice(parts)
    if origin is typing.Annotated and typing.get_origin(parts[0]) is typing.Literal:
        return _random_value(parts[0], rng)
    if origin is typing.Annotated:
        limits = re.findall(r"(Ge|Gt|Le|Lt)\(\w+=([\d.]+)\)", repr(parts[1:]))
        top = min([float(v) for name, v in limits if name in ("Le", "Lt")] or [1e6])
        if parts[0] is int:
            return rng.randint(1, int(min(top, 1e6)))
        if parts[0] is float:
            # Magnitudes for which YAML has several spellings.
            return rng.choice([rng.random() * min(top, 1), min(top, 1) * 10 ** -rng.randint(1, 9)])
        if parts[0] is bool:
            return rng.random() < 0.5
        return rng.choice(["name", "1e-4", "yes", "null", "5", "a: b", "ünïcode", "#no", ""])
    if origin is tuple:
        return tuple(_random_value(parts[0], rng) for _ in range(rng.randint(1, 4)))
    if origin is dict:
        keys = [_random_value(parts[0], rng) for _ in range(rng.randint(1, 3))]
        return {key: _random_value(parts[1], rng) for key in keys}
    if type(None) in parts:
        return rng.choice([None, _random_value(parts[0], rng)])
    assert kind is typing.Any, kind
    return rng.choice([1, 0.25, "text", True, None, {"nested": [1, 2.5, "x"]}])


def test_every_option_survives_yaml_with_random_values():
    rng = random.Random(0)
    named = {
        "task": "a.b:C",
        "device": "cuda:1",
        "data.name": "a.b:load",  # which may have subsets
        "data.storage": "resident",
        "student.name": "timm/resnet18",
        "sb3.device": "auto",
        "teacher.family": "unet2d",
        "teacher.noise": "fixed",  # which may have a seed
        "cache.store": "off",
        "reward.kind": "student",
        "reward.student": "updated",
        "speed.compile": "auto",
        "observation.source": "teacher",
        "distillation.losses": {"hint": 1e-7, "my.own:loss": 3.0},
        "distillation.options": {"my.own:loss": {"rate": 1e-4, "name": "1e-4"}},
        "distillation.projection": "linear",
        "teacher.layers": ("1e-4", "no"),
        "fusion.timesteps": (0, 1_000_000),
        "fusion.mixture": (1e-4, 0.5, 2.0),
        "fusion.layers": (1e-7, 3.0),
        "fusion.weights": "fixed",
        "env.action": "discrete",
        "reinforce.baseline": "value",
        "env.group_size": 1,
        "optimizer.nesterov": False,
    }
    for _ in range(60):
        values = {path: _random_value(kind, rng) for path, _, kind in options()}
        values |= named
        first = values["timesteps.first"]
        values |= {"timesteps.last": first + 5000, "timesteps.count": rng.randint(1, 50)}
        if values["timesteps.values"]:
            values["timesteps.values"] = tuple(set(values["timesteps.values"]))
        config = load_config(None, values)
        for path, value in values.items():
            section, _, name = path.rpartition(".")
            holder = getattr(config, section) if section else config
            assert getattr(holder, name) == value, path
        assert load_config(ExperimentConfig(), parse_yaml(to_yaml(config))) == config
        assert load_config(config) == config


def test_a_resolved_file_repeats_the_configuration(tmp_path):
    config = load_config(None, {"reward": "teacher_probe", "optimizer.learning_rate": 1e-4})
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == load_config(str(path)) == config


def test_all_that_is_wrong_is_said_at_once():
    problems = _problems(
        {
            "seed": -1,
            "rewrd": "student",
            "env": {"num_envs": "4", "lanes": 3},
            "teacher.input": "noisy",
            "optimizer": {"momentum": 1.0, "learning_rate": float("inf")},
            "reward": "studnt",
            "device": "gpu",
        }
    )
    heads = {problem.partition(":")[0] for problem in problems}
    assert heads == {
        "seed",
        "rewrd",
        "env.num_envs",
        "env.lanes",
        "teacher.input",
        "optimizer.momentum",
        "optimizer.learning_rate",
        "reward.kind",
        "device",
    }
    assert len(problems) == len(heads)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"seed": 1.5}, "seed: 1.5 given; it must be a whole number"),
        ({"seed": True}, "seed: True given; it must be a whole number"),
        ({"seed": -1}, "seed: -1 given; it must be 0 or more"),
        ({"env": {"num_envs": 0}}, "env.num_envs: 0 given; it must be greater than 0"),
        ({"data.download": "yes"}, "data.download: 'yes' given; it must be true or false"),
        ({"data.name": 3}, "data.name: 3 given; it must be text"),
        ({"data.path": 3}, "data.path: 3 given; it must be text"),
        ({"teacher.layers": "mid"}, "teacher.layers: 'mid' given; it must be a list"),
        ({"teacher.layers": [1]}, "teacher.layers.0: 1 given; it must be text"),
        ({"timesteps": [0, -3]}, "timesteps.values.1: -3 given; it must be 0 or more"),
        ({"optimizer.learning_rate": "1e-4"}, "optimizer.learning_rate: '1e-4' given; it must be "),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate: nan given; it must"),
        ({"optimizer.momentum": 1}, "optimizer.momentum: 1 given; it must be less than 1"),
        ({"reinforce.entropy_decay": 1.1}, "reinforce.entropy_decay: 1.1 given; it must be 1.0 or"),
        ({"distillation": {"hint": -1}}, "distillation.losses.hint: -1 given; it must be 0.0 or"),
        ({"sb3.arguments": [1]}, "sb3.arguments: [1] given; it must be 'name: value' pairs"),
        ({"teacher.input": "clena"}, "teacher.input: 'clena' given; allowed: 'noised' or 'clean'."),
        ({"nothing": 1}, "nothing: there is no such key. Allowed: data, teacher,"),
        ({"stuent": "x"}, "stuent: there is no such key. Did you mean 'student'?"),
        ({"teacher.modle": "x"}, "teacher.modle: there is no such key. Did you mean 'teacher.mod"),
        ({"learning_rate": 1}, "learning_rate: there is no such key. Did you mean 'optimizer.lea"),
        # Keys that begin like a type's name are keys all the same.
        ({"interval": 1}, "interval: there is no such key."),
        ({"run.interval": 1}, "run.interval: there is no such key."),
        ({"env": {"strategy": 1}}, "env.strategy: there is no such key."),
        # A value and keys below it.
        ({"seed": 2, "seed.x": 1}, "seed: {'x': 1} given; it must be a whole number"),
        ({"teacher.model": "a", "teacher.model.b": 1}, "teacher.model: {'b': 1} given; it must"),
        ({"env": [1]}, "env.num_envs: [1] given; it must be a whole number"),
    ],
)
def test_each_refusal_is_a_sentence(overrides, sentence):
    (problem,) = _problems(overrides)
    assert problem.startswith(sentence)


def test_a_literals_closest_match_is_named():
    assert "Did you mean 'clean'?" in _problems({"teacher.input": "clena"})[0]


def test_every_section_has_a_main_key():
    values = {"timesteps": [1, 2], "distillation": {"cosine": 2.0}, "env": 8, "optimizer": "sgd"}
    config = load_config(None, values)
    assert config.timesteps.values == (1, 2)
    assert config.distillation.losses == {"cosine": 2.0}
    assert config.env.num_envs == 8
    assert config.optimizer.name == "sgd"
    assert load_config(None, {"distillation": "cosine"}).distillation.losses == {"cosine": 1.0}
    for section, kind in sections().items():
        names = {item.name for item in dataclasses.fields(kind)}
        assert kind.shorthand in names, section


def test_later_keys_replace_earlier_ones_whichever_way_they_are_written():
    base = {"env": {"num_envs": 8, "episode_length": 3}, "reward": "student"}
    config = load_config(base, {"env.num_envs": 16, "reward": {"eta": 2.0}})
    assert (config.env.num_envs, config.env.episode_length) == (16, 3)
    assert (config.reward.kind, config.reward.eta) == ("student", 2.0)
    assert load_config(base, {"env": 4}).env.episode_length == 3
    # A mapping that is a value is replaced whole.
    replaced = merge({"distillation.losses": {"hint": 1.0}}, {"distillation": {"cosine": 1.0}})
    assert replaced == {"distillation": {"losses": {"cosine": 1.0}}}


def test_merging_changes_neither_side():
    base, over = {"env": {"num_envs": 8}}, {"env": {"group_size": 2}}
    merge(base, over)["env"]["num_envs"] = 99
    assert (base, over) == ({"env": {"num_envs": 8}}, {"env": {"group_size": 2}})
    config = load_config(None)
    to_dict(config)["distillation"]["losses"]["hint"] = 5.0
    assert config.distillation.losses == {"hint": 1.0}


def test_shipped_configurations_load_by_name_and_by_path_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [path.stem for path in config_folder().glob("*.yaml")]
    assert "digits" in names
    for name in names:
        expected = load_config(config_folder() / f"{name}.yaml")
        assert load_config(name) == load_config(f"configs/{name}.yaml") == expected
        assert load_config(f"{name}.yaml") == expected
    assert load_config() == load_config("digits")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"seed: 1\ndata:\n  path: a\n  path: b\n", "gives 'path' twice in one place (line 4)"),
        (b"\xff\xfe\x00binary", "is not valid YAML"),
        (b"- 1\n- 2", "must hold 'key: value' pairs"),
        (b"just text", "must hold 'key: value' pairs"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path, content, sentence):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    (problem,) = _problems({}, path)
    assert problem.startswith("config: ")
    assert sentence in problem


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == ExperimentConfig()


def test_a_missing_file_is_refused_with_the_closest_name():
    (problem,) = _problems({}, "digitz")
    assert problem.startswith("config: there is no file 'digitz'. Did you mean 'digits'? Shipped: ")
    (problem,) = _problems({}, "some/where/else.yaml")
    assert "there is no file 'some/where/else.yaml'" in problem
    with pytest.raises(TypeError, match=r"config must be a path, .* not int"):
        load_config(3)


def test_losses_of_ones_own_and_registered_ones_go_together():
    config = load_config(None, {"distillation": {"hint": 1, "my_losses:huber": 0.5}})
    assert config.distillation.losses == {"hint": 1.0, "my_losses:huber": 0.5}
    assert all(":" in target for target in registry.LOSSES.values())


def test_options_that_take_text_are_told_from_those_that_do_not():
    taking = {path for path, _, kind in options() if accepts_text(kind)}
    assert {"device", "data.path", "teacher.input", "run.name"} <= taking
    assert not taking & {
        "seed",
        "timesteps.values",
        "optimizer.learning_rate",
        "student.pretrained",
        "data.channels",
    }


def test_precision_of_both_networks_stands_behind_that_of_one():
    config = load_config("digits", {"precision": "bf16", "student.precision": "fp16"})
    assert (config.teacher.precision, config.student.precision) == ("bf16", "fp16")
    config = load_config(config, {"channels_last": True})
    assert config.teacher.channels_last and config.student.channels_last


def test_on_and_off_are_the_words_that_they_are_elsewhere():
    given = parse_yaml("{speed: on, cache: {store: off}}")
    config = load_config("digits", given)
    assert (config.speed.compile, config.cache.store) == ("on", "off")
    with pytest.raises(ConfigError, match=r"cache.store: 'on' given; allowed: 'off', 'memory'"):
        load_config("digits", {"cache.store": True})
