"""Each teacher layer matched at the student's stage of nearest resolution, by one linear map.

Shape letters: N images, C,H,W map of a stage, F teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from students.projection import Projection, Projections
from students.pyramid import nearest_stage


class StageProjections(Projections, nn.ModuleList):
    """One 1x1 convolution per teacher layer, from the stage whose grid is nearest to the layer's.

    FitNets' regressor (Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015) at several
    depths at once. The stages stay independent of one another, and every map is linear, so that the
    look-ahead solves for each stage's move in closed form.

    Args:
        stages: (C, H, W) of the student's stages, shallow to deep.
        layers: (F, H, W) of the teacher's layers.

    Attributes:
        moved: The stages (indices) that some layer is matched with.
        sources: For each layer its place in ``moved``.
    """

    all_stages = True

    def __init__(
        self, stages: Sequence[tuple[int, int, int]], layers: Sequence[tuple[int, int, int]]
    ) -> None:
        sizes = [(height, wide) for _, height, wide in stages]
        self._stage_of = [nearest_stage(layer[1:], sizes) for layer in layers]
        nn.ModuleList.__init__(
            self,
            [
                Projection(stages[stage][0], layer[0])
                for stage, layer in zip(self._stage_of, layers, strict=True)
            ],
        )
        self.sizes = [sizes[stage] for stage in self._stage_of]
        self.moved = tuple(sorted(set(self._stage_of)))
        self.sources = tuple(self.moved.index(stage) for stage in self._stage_of)

    def forward(self, feature: Tensor, lower: Sequence[Tensor] = ()) -> list[Tensor]:
        """See `Projections.forward`."""
        maps = [*lower, feature]
        pairs = zip(self, self._stage_of, strict=True)
        return [projection(maps[stage]) for projection, stage in pairs]

    def jacobians(self) -> list[Tensor]:
        """The weights, (F, C) each, by the map of the layer's own stage."""
        return [projection.weight for projection in self]  # type: ignore[misc]
