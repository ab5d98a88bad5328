from __future__ import annotations

import sys

import pytest

from repfusion_env import registry

TABLES = {
    "data set": registry.DATASETS,
    "teacher family": registry.TEACHERS,
    "action": registry.ACTIONS,
    "task": registry.TASKS,
    "projection": registry.PROJECTIONS,
    "loss": registry.LOSSES,
    "reward": registry.REWARDS,
    "observation": registry.OBSERVATIONS,
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_registered_part_exists(kind):
    for name in TABLES[kind]:
        part = registry.look_up(kind, name, TABLES[kind])
        assert callable(part) or kind == "reward"


def test_an_unknown_name_is_refused_with_the_closest_and_all_allowed():
    with pytest.raises(ValueError, match=r"unknown reward 'studnt'\. Did you mean 'student'") as e:
        registry.look_up("reward", "studnt", registry.REWARDS)
    assert all(name in str(e.value) for name in registry.REWARDS)
    assert "Did you mean" not in registry.complaint("loss", "zzzzzz", registry.LOSSES)


def test_a_part_of_ones_own_is_named_by_module_and_attribute():
    import math

    assert registry.look_up("loss", "math:hypot", registry.LOSSES) is math.hypot


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.part:f", "there is no module 'no_such_package'"),
        ("math.nothing:f", "there is no module 'math.nothing'"),
        ("math:nothing", "module 'math' has no attribute 'nothing'"),
        (":f", "named 'module:attribute'"),
        ("math:", "named 'module:attribute'"),
    ],
)
def test_what_cannot_be_imported_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        registry.look_up("loss", name, registry.LOSSES)


def test_errors_inside_a_users_module_are_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_what_is_missing.py").write_text("import absent_dependency\n")
    (tmp_path / "broken_at_import.py").write_text("import math\nmath.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        registry.look_up("loss", "needs_what_is_missing:f", registry.LOSSES)
    with pytest.raises(AttributeError, match="math"):
        registry.look_up("loss", "broken_at_import:f", registry.LOSSES)
    assert "broken_at_import" not in sys.modules
