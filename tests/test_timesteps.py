from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from repfusion_env.config import EnvConfig, TimestepConfig
from repfusion_env.timesteps import TimestepGrid

GRID = TimestepGrid((5, 10, 40, 900), torch.device("cpu"))


def test_grids_are_even_quadratic_or_listed():
    assert TimestepConfig(count=5, first=0, last=800).grid() == (0, 200, 400, 600, 800)
    assert TimestepConfig(count=5, first=100, last=900, spacing="quadratic").grid() == (
        100,
        150,
        300,
        550,
        900,
    )
    assert TimestepConfig(values=(7, 3), count=9).grid() == (7, 3)
    assert TimestepConfig(count=1, first=30, last=900).grid() == (30,)
    assert TimestepConfig(count=1000, first=0, last=999).grid() == tuple(range(1000))


def test_discrete_actions_are_indices():
    assert GRID.space(EnvConfig()) == spaces.Discrete(4)
    assert GRID.indices(torch.tensor([3, 0, 2])).tolist() == [3, 0, 2]
    assert GRID.tensor[GRID.indices(torch.tensor([3]))].tolist() == [900]


def test_continuous_actions_take_the_nearest_index_with_half_going_up():
    assert GRID.space(EnvConfig(action="continuous")) == spaces.Box(0, 1, (1,), np.float32)
    actions = torch.tensor([0.0, 1 / 6 - 1e-4, 1 / 6 + 1e-4, 0.5, 5 / 6 + 1e-4, 1.0])
    assert GRID.indices(actions[:, None]).tolist() == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("actions", "outside"),
    [
        (torch.tensor([-1, 0, 3, 4]), [True, False, False, True]),
        (
            torch.tensor([[-0.1], [0.0], [1.0], [1.1], [float("nan")], [float("inf")]]),
            [True, False, False, True, True, True],
        ),
    ],
)
def test_actions_outside_the_space_are_found_and_clamped(actions, outside):
    assert GRID.outside(actions).tolist() == outside
    indices = GRID.indices(actions)
    assert indices.min() >= 0
    assert indices.max() <= 3
