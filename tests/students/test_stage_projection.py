"""One linear map per teacher layer, from the stage of nearest resolution."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from students.stage_projection import StageProjections

STAGES = [(4, 16, 16), (6, 8, 8), (5, 4, 4)]


def _maps() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, *stage, generator=generator) for stage in STAGES]


@pytest.mark.parametrize(
    ("size", "stage"), [((32, 32), 0), ((16, 16), 0), ((9, 9), 1), ((4, 4), 2), ((1, 1), 2)]
)
def test_a_layer_is_matched_with_the_stage_of_nearest_resolution_alone(size, stage):
    projections = StageProjections(STAGES, [(7, *size)])
    assert projections.sizes == [STAGES[stage][1:]]
    assert (projections.moved, projections.sources) == ((stage,), (0,))
    maps = _maps()
    (found,) = projections(maps[-1], maps[:-1])
    weight, bias = projections[0].weight, projections[0].bias
    torch.testing.assert_close(found, functional.conv2d(maps[stage], weight[..., None, None], bias))
    (jacobian,) = projections.jacobians()
    assert jacobian.shape == (7, STAGES[stage][0])


def test_several_layers_say_which_of_the_moved_stages_is_theirs():
    projections = StageProjections(STAGES, [(3, 4, 4), (2, 16, 16), (9, 5, 5)])
    assert projections.moved == (0, 2)
    assert projections.sources == (1, 0, 1)
    maps = _maps()
    found = projections(maps[-1], maps[:-1])
    assert [tuple(p.shape) for p in found] == [(2, 3, 4, 4), (2, 2, 16, 16), (2, 9, 4, 4)]
    # The stage between them has no layer, so nothing of it is seen.
    maps[1] = maps[1] + 1
    for before, after in zip(found, projections(maps[-1], maps[:-1]), strict=True):
        assert torch.equal(before, after)
