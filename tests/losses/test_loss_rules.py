"""What a configuration says wrongly about losses is refused before torch loads."""

from __future__ import annotations

import inspect

import pytest

from repfusion_env import ConfigError, load_config
from repfusion_env.config_rules import conflicts
from repfusion_env.loss_rules import OPTIONS, RELATIONAL
from repfusion_env.registry import LOSSES, look_up

CRD = {"losses": {"crd": 1.0}}
CONFLICTS = [
    (
        {"distillation": {**CRD, "options": {"crd": {"temprature": 1}}}},
        "distillation.options.crd.temprature: there is no such option. Did you mean 'temperature'?",
    ),
    (
        {"distillation": {"options": {"hint": {"gamma": 1}}}},
        "distillation.options.hint.gamma: there is no such option. This loss has no options",
    ),
    (
        {"distillation": {**CRD, "options": {"crd": {"temperature": 0}}}},
        "distillation.options.crd.temperature: 0 given; it must be greater than 0",
    ),
    (
        {"distillation": {**CRD, "options": {"crd": {"momentum": 1.0}}}},
        "distillation.options.crd.momentum: 1.0 given; it must be less than 1",
    ),
    (
        {"distillation": {**CRD, "options": {"crd": {"negatives": 1.5}}}},
        "distillation.options.crd.negatives: 1.5 given; it must be a whole number",
    ),
    (
        {"distillation": {**CRD, "options": {"crd": {"temperature": "hot"}}}},
        "distillation.options.crd.temperature: 'hot' given; it must be a finite number",
    ),
    (
        {"distillation": {"losses": {"dist": 1.0}, "options": {"dist": {"inter": -1}}}},
        "distillation.options.dist.inter: -1 given; it must be 0 or more",
    ),
    (
        {
            "distillation": {
                "losses": {"factor_transfer": 1.0},
                "options": {"factor_transfer": {"power": 3}},
            }
        },
        "distillation.options.factor_transfer.power: 3 given; it must be 2 or less",
    ),
    (
        {"distillation": {**CRD, "options": {"cdr": {"temperature": 1}}}},
        "distillation.options: 'cdr' is none of the losses in distillation.losses (crd). Did you "
        "mean 'crd'?",
    ),
    (
        {"distillation": {"pkt": 1, "infonce": 1, "hint": 0}, "env.num_envs": 1},
        "distillation.losses: on pooled features pkt and infonce compare a lane with the others",
    ),
]
ACCEPTED = [
    {"distillation": {**CRD, "options": {"crd": {"temperature": 1, "negatives": 64}}}},
    {"distillation": {"losses": {"my.own:loss": 1.0}, "options": {"my.own:loss": {"x": "y"}}}},
    {"distillation": "pkt"},
    {"distillation": {"pkt": 1, "hint": 1}, "env.num_envs": 1},
    {"distillation": {"losses": {"pkt": 1}, "dense": True}, "env.num_envs": 1},
    {"distillation": "pkt", "env.num_envs": 1, "reward": "student_gain"},
    *({"distillation": {"losses": {name: 1.0}, "dense": True}} for name in LOSSES),
]


@pytest.mark.parametrize(("overrides", "sentence"), CONFLICTS, ids=[s for _, s in CONFLICTS])
def test_each_conflict_is_one_sentence_headed_by_its_path(overrides, sentence):
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)
    (problem,) = refused.value.problems
    assert problem.startswith(sentence)


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_what_is_possible_is_accepted(overrides):
    assert conflicts(load_config(None, overrides)) == []


@pytest.mark.parametrize("name", LOSSES)
def test_the_rules_know_every_loss_as_it_is(name):
    loss = look_up("loss", name, LOSSES)
    parameters = list(inspect.signature(loss).parameters.values())
    options = parameters[1 if inspect.isclass(loss) else 3 :]
    assert [option.name for option in options] == list(OPTIONS.get(name, {}))
    for option in options:
        assert OPTIONS[name][option.name].refusal(option.default) is None


def test_the_rules_name_only_losses_that_there_are():
    assert set(LOSSES) >= RELATIONAL | set(OPTIONS)
