"""The feature pyramid against torchvision's, and what it may look at."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork

from students.projection import LinearProjections
from students.pyramid import FeaturePyramid

STAGES = [(4, 16, 16), (6, 8, 8), (5, 3, 4)]


def _maps(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, *stage, generator=generator) for stage in STAGES]


def _pyramid(layers: list[tuple[int, int, int]], **settings: object) -> FeaturePyramid:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FeaturePyramid(STAGES, layers, **settings)  # type: ignore[arg-type]


def test_without_pooling_it_is_torchvisions_feature_pyramid_network():
    # Torchvision's levels all have one width, that of the pyramid.
    pyramid = _pyramid([(8, 16, 16), (8, 8, 8), (8, 3, 3)], width=8, bins=())
    reference = FeaturePyramidNetwork([stage[0] for stage in STAGES], 8)
    for mine, theirs in (
        (pyramid.lateral, reference.inner_blocks),
        (pyramid.output, reference.layer_blocks),
    ):
        for own, block in zip(mine, theirs, strict=True):
            block[0].load_state_dict(own.state_dict())
    maps = _maps()
    expected = reference(OrderedDict(enumerate(maps)))
    found = pyramid(maps[-1], maps[:-1])
    assert pyramid.levels == [0, 1, 2]
    for level, feature in enumerate(found):
        torch.testing.assert_close(feature, expected[level])


@pytest.mark.parametrize(
    ("size", "level"),
    [((16, 16), 0), ((64, 64), 0), ((12, 12), 0), ((9, 9), 1), ((4, 4), 2), ((1, 1), 2)],
)  # fmt: skip
def test_a_layer_is_matched_at_the_level_of_nearest_resolution(size, level):
    pyramid = _pyramid([(7, *size)])
    assert pyramid.levels == [level]
    assert pyramid.sizes == [STAGES[level][1:]]
    maps = _maps()
    (found,) = pyramid(maps[-1], maps[:-1])
    assert found.shape == (2, 7, *STAGES[level][1:])
    # The level's own stage and those above it count, those below do not.
    for stage in range(3):
        changed = [m + (index == stage) for index, m in enumerate(maps)]
        (other,) = pyramid(changed[-1], changed[:-1])
        assert torch.equal(other, found) == (stage < level)


def test_of_equally_near_levels_the_deepest_is_taken():
    stages = [(4, 8, 8), (4, 8, 8), (4, 2, 2)]
    assert FeaturePyramid(stages, [(3, 8, 8)]).levels == [1]
    assert FeaturePyramid(stages, [(3, 4, 4)]).levels == [2]  # half way between 8x8 and 2x2


def test_pyramid_pooling_mixes_the_averages_of_coarser_grids_in():
    pyramid = _pyramid([(7, 3, 4)], width=8)
    pooling = pyramid.pooling
    assert pooling.bins == (1, 2, 3)  # a grid of 6x6 is finer than the map
    features = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(2))
    # With the bin of 1x1 alone kept, each position gets its own linear part and one of the average.
    with torch.no_grad():
        pooling.merge.weight[:, 8 + 2 :] = 0
    average = (
        features.mean((2, 3)) @ pooling.reduce[0].weight[:, :, 0, 0].T + pooling.reduce[0].bias
    )
    both = torch.cat((features, average.relu()[:, :, None, None].expand(2, 2, 3, 4)), 1)
    expected = torch.einsum("fc,nchw->nfhw", pooling.merge.weight[:, : 8 + 2, 0, 0], both)
    expected = expected + pooling.merge.bias[:, None, None]
    torch.testing.assert_close(pooling(features), expected)


def test_lanes_do_not_meet_even_in_training():
    pyramid = _pyramid([(7, 8, 8)]).train()
    maps = _maps(3)
    (found,) = pyramid(maps[-1], maps[:-1])
    (alone,) = pyramid(maps[-1][1:2], [m[1:2] for m in maps[:-1]])
    torch.testing.assert_close(found[1:2], alone)


def test_missing_stages_and_pooled_features_are_refused():
    pyramid = _pyramid([(7, 16, 16)])
    maps = _maps()
    with pytest.raises(ValueError, match=r"the maps of all 3 stages, got 1 .*\(2, 5, 3, 4\)"):
        pyramid(maps[-1])
    with pytest.raises(ValueError, match=r"got 3 and a last one of shape \(2, 5\)"):
        pyramid(maps[-1].mean((2, 3)), maps[:-1])


def test_only_linear_projections_have_jacobians():
    assert _pyramid([(7, 16, 16)]).jacobians() is None
    linear = LinearProjections(STAGES, [(7, 1, 1), (2, 9, 9)])
    assert [j.shape for j in linear.jacobians()] == [(7, 5), (2, 5)]
    assert linear.sizes == [(3, 4), (3, 4)]
    assert not linear.all_stages
