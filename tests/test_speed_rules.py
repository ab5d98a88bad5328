"""Speed settings that cannot go together are refused in one sentence."""

from __future__ import annotations

import pytest

from repfusion_env import load_config
from repfusion_env.config_loading import ConfigError


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"speed.cuda_graphs": True}, r"speed.cuda_graphs: .* give speed.compile on or auto"),
        (
            {"speed": {"compile": "on", "cuda_graphs": True}, "device": "cpu"},
            r"speed.cuda_graphs: the CPU has none",
        ),
        (
            {"speed.compile": "on", "teacher.offload": "cpu"},
            r"speed.compile: weights that visit .* teacher.offload none",
        ),
        ({"speed.compile": "no"}, r"speed.compile: 'no' .*off.*auto.*on"),
        ({"student.precision": "fp8"}, r"student.precision: 'fp8' .*fp32.*bf16.*fp16"),
        ({"optimizer.updates": 0}, r"optimizer.updates: 0"),
    ],
)
def test_what_cannot_be_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config("digits", settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"speed": {"compile": "auto", "cuda_graphs": True}},
        {"speed.compile": "auto", "teacher.offload": "cpu"},
        {"speed": "on", "precision": "fp16", "channels_last": True, "optimizer.updates": 4},
    ],
)
def test_what_can_be_is_taken(settings):
    config = load_config("digits", settings)
    assert config.speed.compile != "off"
