"""Each impossible value or combination is refused with its path and what is allowed."""

from __future__ import annotations

import pytest

from repfusion_env import ConfigError, load_config
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import options
from repfusion_env.config_rules import conflicts

CONFLICTS = [
    ({"task": "clasification"}, "task: unknown task 'clasification'. Did you mean 'classifi"),
    ({"task": "segmentation"}, "distillation.dense: task 'segmentation' reads feature maps"),
    (
        {"task": "landmarks", "distillation.dense": True, "data.labels": "clusters"},
        "data.labels: clusters are labels of whole images, which task 'landmarks'",
    ),
    ({"data": "digit"}, "data.name: unknown data set 'digit'. Did you mean 'digits'?"),
    ({"data": "npz"}, "data.path: data.name 'npz' needs a path"),
    ({"data": "cifar10"}, "data.path: data.name 'cifar10' needs a path"),
    ({"teacher.family": "unet"}, "teacher.family: unknown teacher family 'unet'. Did you mean"),
    ({"env.action": "layr"}, "env.action: unknown action 'layr'. Did you mean 'layer'?"),
    ({"teacher.family": "unet"}, "teacher.family: unknown teacher family 'unet'"),
    ({"distillation.projection": "pyramids"}, "distillation.projection: unknown projection"),
    ({"reward": "studnt"}, "reward.kind: unknown reward 'studnt'. Did you mean 'student'?"),
    ({"distillation": "hnt"}, "distillation.losses: unknown loss 'hnt'. Did you mean 'hint'?"),
    ({"distillation": {"hint": 0}}, "distillation.losses: at least one loss needs a weight"),
    ({"distillation": {}, "distillation.losses": {}}, "distillation.losses: at least one loss"),
    ({"distillation": "attention"}, "distillation.losses: attention transfer compares maps"),
    ({"timesteps": []}, "timesteps.values: the grid is empty"),
    ({"timesteps": [5, 1, 5]}, "timesteps.values: [5] stand more than once in the grid"),
    ({"timesteps": {"first": 9, "last": 3}}, "timesteps.last: 3 lies below timesteps.first 9"),
    (
        {"timesteps": {"count": 20, "first": 0, "last": 10}},
        "timesteps.count: 20 linear timesteps between 0 and 10 are not all different",
    ),
    ({"env": {"num_envs": 6, "group_size": 4}}, "env.group_size: 6 lanes cannot be divided"),
    ({"env": 1, "optimizer.batch_size": 1}, "optimizer.batch_size: one lane and a batch of 1"),
    ({"reinforce": "group"}, "reinforce.baseline: 'group' needs several lanes on one image"),
    ({"optimizer": {"nesterov": True}}, "optimizer.nesterov: needs optimizer.name sgd"),
    (
        {"optimizer": {"nesterov": True, "name": "sgd", "momentum": 0.0}},
        "optimizer.nesterov: needs optimizer.name sgd with a momentum above 0",
    ),
    ({"device": "gpu"}, "device: 'gpu' given; allowed: auto, cpu, cuda, cuda:<index>"),
    ({"device": "cuda:"}, "device: 'cuda:' given"),
    ({"observation": "techer"}, "observation.source: unknown observation 'techer'. Did you mean"),
    ({"observation": "tim/resnet18"}, "observation.source: 'tim/resnet18' names no known library"),
    (
        {"observation": {"source": "pixels", "student_state": True}},
        "observation.student_state: it is appended to an embedding",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), CONFLICTS, ids=[s for _, s in CONFLICTS])
def test_each_conflict_is_one_sentence_headed_by_its_path(overrides, sentence):
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)
    (problem,) = refused.value.problems
    assert problem.startswith(sentence)


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer": {"nesterov": True, "name": "sgd"}},
        {"env": {"num_envs": 6, "group_size": 3}, "reinforce": "group"},
        {"distillation": {"losses": {"attention": 1}, "dense": True}},
        {"device": "cuda:11"},
        {"task": "my.package:Task", "reward": "mine:rule", "observation": "mine/x:f"},
        {"timesteps": {"count": 1000, "first": 0, "last": 999}},
        {"data": {"name": "npz", "path": "a.npz"}},
        {"observation": "timm/resnet18"},
    ],
)
def test_what_is_possible_together_is_accepted(overrides):
    assert conflicts(load_config(None, overrides)) == []


def test_the_defaults_have_no_conflicts():
    assert conflicts(ExperimentConfig()) == []


def test_every_option_has_a_sentence_of_help():
    for path, item, _ in options():
        assert len(item.metadata["help"]) > 10, path


def test_a_runs_steps_are_its_decisions_over_its_lanes_rounded_up():
    config = load_config(None, {"env.num_envs": 64, "run.decisions": 130})
    assert config.total_steps == 3
