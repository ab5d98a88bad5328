from __future__ import annotations

import pytest

from repfusion_env.config_options import read_options


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--timesteps.values", "[0, 40]"], {"timesteps.values": [0, 40]}),
        (["--timesteps.values=80"], {"timesteps.values": [80]}),
        (["--distillation.dense", "--seed", "3"], {"distillation.dense": True, "seed": 3}),
        (["--distillation.losses.hint", "1e-4"], {"distillation.losses.hint": 1e-4}),
        (["--teacher.revision", "null"], {"teacher.revision": None}),
        (["--data.path", "1e5"], {"data.path": "1e5"}),
        (["--algo", "a2c"], {"sb3.algo": "a2c"}),
        (["--labels", "10%", "--augment"], {"labels": "10%", "augment": "true"}),
    ],
)
def test_words_become_overrides(words, expected):
    problems: list[str] = []
    aliases, own = {"algo": "sb3.algo"}, {"labels": False, "augment": True}
    assert read_options(words, problems, aliases=aliases, own=own) == expected
    assert problems == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["left"], "'left': options look like --key value"),
        (["--sed", "1"], "--sed: there is no such option. Did you mean 'seed'?"),
        (["--imags", "1"], "--imags: there is no such option. Did you mean 'images'?"),
        (["--seed"], "--seed: a value is missing"),
        (["--timesteps.values", "[0,"], "--timesteps.values: '[0,' is not valid YAML"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_sentence(words, sentence):
    problems: list[str] = []
    assert read_options(words, problems, known=("images",)) == {}
    assert problems == [sentence]
