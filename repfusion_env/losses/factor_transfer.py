"""Factor transfer: the student matches factors, a code that the teacher's features are made of."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from repfusion_env.losses.shape import Anchors, FeatureShape


class FactorTransfer(nn.Module):
    """Mean absolute (or squared) difference of unit-length factors.

    Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS
    2018, section 3: a paraphraser (autoencoder of the teacher's features) and a translator (from
    the student's), each three 3x3 convolutions with leaky ReLU on maps, linear layers on pooled
    features; ``mean |u_T - u_S|^power`` of the factors divided by their length. Non-negative, 0
    where the factors match.

    The published paraphraser is trained before the student; here both learn at once, the
    paraphraser by :meth:`auxiliary` alone. The published batch normalisation is left out, as
    through it the value of one sample would depend on the others.

    Args:
        shape: Gives channels and whether features are maps.
        rate: Channels of the factors over those of the feature, above 0.
        power: 1 or 2.
    """

    def __init__(self, shape: FeatureShape, rate: float = 0.5, power: int = 1) -> None:
        super().__init__()
        width, factors = shape.width, max(1, round(shape.width * rate))
        self.power = power
        self.encoder = _layers(shape.dense, (width, width, factors, factors))
        self.decoder = _layers(shape.dense, (factors, factors, width, width))
        self.translator = _layers(shape.dense, (width, width, factors, factors))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        anchors: Anchors | None = None,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The loss per sample, (B,), of features (B, F) or (B, F, H, W)."""
        target = F.normalize(self.encoder(teacher).detach().flatten(1), dim=1)
        factors = F.normalize(self.translator(student).flatten(1), dim=1, eps=1e-6)
        return (factors - target).abs().pow(self.power).mean(1)

    def auxiliary(self, teacher: Tensor) -> Tensor:
        """Mean squared error of the paraphraser's reconstruction, ()."""
        return F.mse_loss(self.decoder(self.encoder(teacher)), teacher)


def _layers(dense: bool, widths: tuple[int, ...]) -> nn.Sequential:
    """Three layers with leaky ReLU between them; the last is linear, as features have any sign."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers.append(nn.Conv2d(before, after, 3, padding=1) if dense else nn.Linear(before, after))
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers[:-1])
