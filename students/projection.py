"""The projection of the student's feature to the teacher's width.

Shape letters: N images, H,W map, S student width, F teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


class Projection(nn.Module):
    """One linear map from width S to width F, for pooled features and for maps alike.

    On a map it is a 1x1 convolution. Average pooling commutes with it, so projecting the pooled
    feature and pooling the projected map give the same result.

    Args:
        in_features: S.
        out_features: F.
        bias: whether to add a learned offset of shape (F,).

    Attributes:
        weight: (F, S). It is the Jacobian of the projection, at every position.
        bias: (F,), or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"A projection needs widths of at least 1, got {in_features} to {out_features}."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        bias_parameter = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_parameter("bias", bias_parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(-1/sqrt(S), 1/sqrt(S)), as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        """Project.

        Args:
            features: (N, S) or (N, S, H, W).

        Returns:
            (N, F) or (N, F, H, W).

        Raises:
            ValueError: the features have another rank or width.
        """
        if features.ndim not in (2, 4) or features.shape[1] != self.in_features:
            raise ValueError(
                f"The projection takes (N, {self.in_features}) or (N, {self.in_features}, H, W), "
                f"got {tuple(features.shape)}."
            )
        if features.ndim == 2:
            return functional.linear(features, self.weight, self.bias)
        return functional.conv2d(features, self.weight[:, :, None, None], self.bias)

    def extra_repr(self) -> str:
        """Text shown between the parentheses of `repr`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Projections(nn.Module):
    """What brings a student's maps to the features of every teacher layer.

    Made as ``Kind(stages, layers)``: shapes (C, H, W) of the student's maps, shallow to deep, and
    (F, H, W) of the teacher's features.

    Attributes:
        all_stages: Whether it reads the maps below the last stage too.
        sizes: (H, W) at which each teacher layer is matched position by position.
        moved: The maps (indices into the stages) that a look-ahead moves; the others stay.
        sources: For each teacher layer, which of ``moved`` its Jacobian is by; none: the only one.
    """

    all_stages: bool = False
    sizes: list[tuple[int, int]]
    moved: tuple[int, ...] = (-1,)
    sources: tuple[int, ...] = ()

    def forward(self, feature: Tensor, lower: Sequence[Tensor] = ()) -> list[Tensor]:
        """Project.

        Args:
            feature: Map of the last stage, (N, S, H, W); where ``all_stages`` is False also its
                average, (N, S).
            lower: Maps of the stages below, shallow to deep; none where ``all_stages`` is False.

        Returns:
            One tensor per teacher layer, (N, F, H, W), or (N, F) of a pooled feature.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward.")

    def jacobians(self) -> list[Tensor] | None:
        """Derivatives (F, S) by the moved map, the same at each position; None: there are none.

        With them the look-ahead reward solves for its move in closed form.
        """
        return None


class LinearProjections(Projections, nn.ModuleList):
    """One linear map per teacher layer from the student's last stage.

    Args:
        stages: (C, H, W) of the student's stages; the last one counts.
        layers: (F, H, W) of the teacher's layers.
    """

    def __init__(
        self, stages: Sequence[tuple[int, int, int]], layers: Sequence[tuple[int, int, int]]
    ) -> None:
        width, height, wide = stages[-1]
        nn.ModuleList.__init__(self, [Projection(width, layer[0]) for layer in layers])
        self.sizes = [(height, wide)] * len(layers)

    def forward(self, feature: Tensor, lower: Sequence[Tensor] = ()) -> list[Tensor]:
        """See `Projections.forward`."""
        return [projection(feature) for projection in self]

    def jacobians(self) -> list[Tensor]:
        """The weights, (F, S) each."""
        return [projection.weight for projection in self]  # type: ignore[misc]
