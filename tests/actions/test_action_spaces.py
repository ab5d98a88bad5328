"""What each action space means: its space, choices, masks, arms and refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from repfusion_env import registry
from repfusion_env.actions import action_kind, arm_actions, build_actions, conflicts, names_of_kinds
from repfusion_env.actions.base import ActionSpace
from repfusion_env.actions.choice import Choice
from repfusion_env.config_loading import ConfigError, check
from repfusion_env.lane_inputs import Limits
from repfusion_env.timesteps import TimestepGrid

CPU = torch.device("cpu")
TIMESTEPS = (5, 10, 40, 900)
LAYERS = ("mid_block", "conv_in", "up_blocks.0")
TWO = {"teacher.layers": ["mid_block", "conv_in"]}


def make(name: str, timesteps: tuple[int, ...] = TIMESTEPS, **overrides: object) -> ActionSpace:
    config = check({"env.action": name, "timesteps.values": timesteps, **overrides})
    return build_actions(config, TimestepGrid(timesteps, CPU), LAYERS)


def chosen(choice: Choice) -> tuple[Any, ...]:
    return choice.timesteps.tolist(), choice.indices.tolist(), choice.layers


def test_discrete_actions_are_indices():
    actions = make("discrete")
    assert actions.space == spaces.Discrete(4)
    assert chosen(actions.choice(torch.tensor([3, 0, 2]))) == (
        [[900], [5], [40]],
        [[3], [0], [2]],
        None,
    )


def test_continuous_actions_take_the_nearest_index_with_half_going_up():
    actions = make("continuous")
    assert actions.space == spaces.Box(0, 1, (1,), np.float32)
    given = torch.tensor([0.0, 1 / 6 - 1e-4, 1 / 6 + 1e-4, 0.5, 5 / 6 + 1e-4, 1.0])[:, None]
    assert actions.choice(given).indices.tolist() == [[0], [0], [1], [2], [3], [3]]


def test_continuous_timesteps_are_numpys_interpolation_over_the_sorted_grid():
    grid = (40, 5, 900, 10)  # the order of the actions is not that of noise
    actions = make("continuous_timestep", grid)
    assert actions.space == spaces.Box(0, 1, (1,), np.float32)
    given = np.random.default_rng(0).random((500, 1)).astype(np.float32)
    given[:6, 0] = [0.0, 1.0, 1 / 3, 2 / 3, 0.5, 1 / 6]
    found = actions.choice(torch.from_numpy(given))
    expected = np.interp(given[:, 0].astype(np.float64) * 3, range(4), sorted(grid))
    np.testing.assert_array_equal(found.timesteps[:, 0], np.floor(expected + 0.5))
    assert found.timesteps[:6, 0].tolist() == [5, 900, 10, 40, 25, 8]
    # The entry that is nearest in timesteps, not in actions; the lower of two that are as near.
    nearest = [min(grid, key=lambda entry: (abs(entry - t), entry)) for t in found.timesteps[:, 0]]
    assert [grid[index] for index in found.indices[:, 0]] == nearest
    assert len(found.timesteps.unique()) > 100
    arms = actions.choice(arm_actions(actions, CPU))
    assert arms.timesteps[:, 0].tolist() == list(grid)
    assert arms.indices[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("grid", [(7,), tuple(range(1000)), (0, 999)])
def test_continuous_timesteps_reach_the_ends_of_every_grid(grid):
    actions = make("continuous_timestep", grid)
    found = actions.choice(torch.linspace(0, 1, 1000)[:, None])
    assert found.timesteps[0, 0] == grid[0] and found.timesteps[-1, 0] == grid[-1]
    assert found.timesteps[:, 0].tolist() == sorted(found.timesteps[:, 0].tolist())
    assert actions.choice(arm_actions(actions, CPU)).timesteps[:, 0].tolist() == list(grid)


def test_a_layer_is_chosen_at_the_one_timestep():
    actions = make("layer", (40,))
    assert actions.space == spaces.Discrete(3)
    timesteps, indices, layers = chosen(actions.choice(torch.tensor([2, 0])))
    assert (timesteps, indices, layers.tolist()) == ([[40], [40]], [[0], [0]], [2, 0])
    assert [arm.label for arm in actions.arms] == list(LAYERS)


def test_a_timestep_and_a_layer_are_chosen_together():
    actions = make("timestep_and_layer")
    assert actions.space == spaces.MultiDiscrete([4, 3])
    timesteps, indices, layers = chosen(actions.choice(torch.tensor([[3, 0], [1, 2]])))
    assert (timesteps, indices, layers.tolist()) == ([[900], [10]], [[3], [1]], [0, 2])
    assert len(actions.arms) == 12 and actions.arms[4].label == "10, conv_in"


def test_a_set_holds_as_many_timesteps_as_asked_for():
    actions = make("timestep_set", **{"env.set_size": 2})
    assert actions.space == spaces.MultiDiscrete([4, 4])
    timesteps, indices, layers = chosen(actions.choice(torch.tensor([[3, 0], [1, 1]])))
    assert (timesteps, indices, layers) == ([[900, 5], [10, 10]], [[3, 0], [1, 1]], None)
    assert [arm.action for arm in actions.arms] == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("name", registry.ACTIONS)
def test_arms_are_actions_of_the_space_and_mean_what_they_are_called(name):
    grid = (40,) if name == "layer" else (40, 5, 900)
    actions = make(name, grid)
    given = arm_actions(actions, CPU)
    assert all(
        actions.space.contains(action.numpy().astype(actions.space.dtype)) for action in given
    )
    choice = actions.choice(given)
    for index, arm in enumerate(actions.arms):
        parts = {str(t) for t in choice.timesteps[index].tolist()}
        if choice.layers is not None:
            parts = parts | {LAYERS[choice.layers[index]]} if name != "layer" else {LAYERS[index]}
        assert set(arm.label.split(", ")) == parts
    assert len({arm.label for arm in actions.arms}) == len(actions.arms)
    counted = {"Discrete": lambda s: s.n, "MultiDiscrete": lambda s: s.nvec.prod()}
    if actions.kind in counted:
        assert actions.exhaustive == (len(actions.arms) == counted[actions.kind](actions.space))


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("discrete", [1, 0, 1, 0]),
        ("continuous", [1, 0, 1, 0]),
        ("continuous_timestep", [1, 0, 1, 0]),
        ("timestep_and_layer", [1, 0, 1, 0, 1, 1, 1]),
        ("timestep_set", [1, 0, 1, 0] * 3),
    ],
)
def test_masks_lie_flat_over_the_components(name, mask):
    valid = np.array([True, False, True, False])
    assert make(name).masks(valid).tolist() == [bool(entry) for entry in mask]
    assert make("layer", (40,)).masks(np.array([True])).tolist() == [True] * 3


@pytest.mark.parametrize(
    ("space", "actions", "outside", "clamped"),
    [
        (spaces.Discrete(4), [-1, 0, 3, 4], [1, 0, 0, 1], [0, 0, 3, 3]),
        (spaces.Discrete(2, start=5), [4, 5, 6, 7], [1, 0, 0, 1], [5, 5, 6, 6]),
        (
            spaces.MultiDiscrete([2, 3]),
            [[0, 0], [1, 2], [2, 0], [0, 3], [-1, 1]],
            [0, 0, 1, 1, 1],
            [[0, 0], [1, 2], [1, 0], [0, 2], [0, 1]],
        ),
        (
            spaces.Box(0, 1, (1,), np.float32),
            [[-0.1], [0.0], [1.0], [1.1], [float("nan")], [float("inf")]],
            [1, 0, 0, 1, 1, 1],
            [[0.0], [0.0], [1.0], [1.0], [0.0], [1.0]],
        ),
    ],
)
def test_actions_outside_the_space_are_found_and_clamped(space, actions, outside, clamped):
    limits = Limits(space, CPU)
    given = torch.tensor(actions)
    assert limits.outside(given).tolist() == [bool(entry) for entry in outside]
    found = limits.clamped(given)
    assert found.tolist() == clamped and found.dtype == given.dtype
    found.fill_(9)
    assert given[1].tolist() == actions[1]  # the caller's own
    with pytest.raises(TypeError, match="allowed: Discrete, MultiDiscrete, Box"):
        Limits(spaces.MultiBinary(2), CPU)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"env.action": "layer", **TWO},
            "env.action: 'layer' chooses among layers at one timestep, but the grid has 25; give "
            "one in timesteps.values, or use env.action timestep_and_layer",
        ),
        (
            {"env.action": "layer", "timesteps.values": [40], "teacher.layers": ["mid_block"]},
            "env.action: 'layer' chooses among the teacher's layers, but there is one, "
            "'mid_block'; name several in teacher.layers, or use env.action discrete",
        ),
        (
            {"env.action": "timestep_and_layer", "teacher.layers": ["mid_block"]},
            "env.action: 'timestep_and_layer' chooses among the teacher's layers, but there is "
            "one, 'mid_block'; name several in teacher.layers, or use env.action discrete",
        ),
        (
            {"env.action": "timestep_set", "env.set_size": 4, "timesteps.values": [0, 40, 80]},
            "env.set_size: a set of 4 timesteps is larger than the grid, which has 3",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(overrides, sentence):
    with pytest.raises(ConfigError) as caught:
        check(overrides)
    assert caught.value.problems == [sentence]


def test_what_can_be_is_not_refused():
    check({"env.action": "layer", "timesteps.values": [40], **TWO})
    check({"env.action": "timestep_and_layer"})  # the family's own layers may be several
    check({"env.action": "timestep_set", "env.set_size": 25})
    config = check({"env.action": "timestep_and_layer"})
    with pytest.raises(ValueError, match=r"there is one, 'mid_block'; name several in teacher"):
        build_actions(config, TimestepGrid((0, 40), CPU), ("mid_block",))


def test_an_unknown_name_is_refused_with_the_closest():
    with pytest.raises(ConfigError, match=r"env\.action: unknown action 'timestep_sets'\. Did you"):
        check({"env.action": "timestep_sets"})


def test_a_space_of_ones_own_must_be_of_the_kind_that_it_says_and_start_at_0(tmp_path, monkeypatch):
    (tmp_path / "odd_actions.py").write_text(
        "from gymnasium import spaces\n"
        "class Odd:\n"
        "    kind = 'Box'\n"
        "    def __init__(self, grid, layers, env):\n"
        "        self.space = spaces.Discrete(2)\n"
        "class Shifted:\n"
        "    kind = 'MultiDiscrete'\n"
        "    def __init__(self, grid, layers, env):\n"
        "        self.space = spaces.MultiDiscrete([2, 2], start=[0, 1])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = check({"env.action": "odd_actions:Odd"})
    assert conflicts(config) == []
    with pytest.raises(ValueError, match=r"is Discrete\(2\), but its kind is 'Box'; allowed: Dis"):
        build_actions(config, TimestepGrid((0, 40), CPU), LAYERS)
    config = check({"env.action": "odd_actions:Shifted"})
    with pytest.raises(
        ValueError, match=r"is MultiDiscrete\(.*\); agents count from 0, so it must"
    ):
        build_actions(config, TimestepGrid((0, 40), CPU), LAYERS)


def test_kinds_are_told_without_loading_torch():
    assert action_kind("timestep_set") == "MultiDiscrete"
    assert names_of_kinds(("Box",)) == ["continuous", "continuous_timestep"]
    code = (
        "import sys; from repfusion_env import actions, registry\n"
        "print([actions.action_kind(name) for name in registry.ACTIONS], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip()
        == str(["Discrete", "Box", "Box", "Discrete", "MultiDiscrete", "MultiDiscrete"]) + " False"
    )


def test_every_space_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "environment.md").read_text(encoding="utf-8")
    assert [name for name in registry.ACTIONS if f"\n| `{name}` " not in text] == []
