from __future__ import annotations

import torch

from repfusion_env.config import TimestepConfig
from repfusion_env.timesteps import TimestepGrid


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


def test_a_choice_is_the_grids_entries_in_the_order_of_the_actions():
    grid = TimestepGrid((5, 900, 40, 10), torch.device("cpu"))
    choice = grid.choice(torch.tensor([[3, 0], [1, 1]]), torch.tensor([1, 0]))
    assert choice.timesteps.tolist() == [[10, 5], [900, 900]]
    assert choice.indices.tolist() == [[3, 0], [1, 1]]
    assert choice.layers.tolist() == [1, 0]
    assert grid.choice(choice.indices).layers is None
    assert len(grid) == 4
