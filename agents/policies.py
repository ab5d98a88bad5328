"""Policy and value networks of our REINFORCE.

Shape letters: N lanes, D embedding, C,H,W image, K grid length.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from repfusion_env.config import ReinforceConfig

CONVOLUTION_WIDTH = 64
# Not minus infinity: the entropy multiplies it by a probability of 0.
CLOSED_LOGIT = -1e9


def make_network(
    observation_shape: tuple[int, ...], outputs: int, config: ReinforceConfig
) -> nn.Module:
    """An MLP on embeddings or a small CNN on pixels.

    Args:
        observation_shape: (D,) or (C, H, W).
        outputs: Width of the last layer.
        config: ``network`` and ``hidden``.

    Raises:
        ValueError: A CNN is asked for on embeddings.
    """
    pixels = len(observation_shape) == 3
    if config.network == "cnn" and not pixels:
        raise ValueError(
            "reinforce.network: 'cnn' needs pixels, so observation.source must be 'pixels'; "
            "allowed on embeddings: auto, mlp"
        )
    layers: list[nn.Module] = []
    width = prod(observation_shape)
    if pixels and config.network != "mlp":
        layers += convolutions(observation_shape[0])
        width = CONVOLUTION_WIDTH
    else:
        layers.append(nn.Flatten())
    for hidden in config.hidden:
        layers += [nn.Linear(width, hidden), nn.Tanh()]
        width = hidden
    last = nn.Linear(width, outputs)
    # Near-zero logits: the first choices are uniform, whatever the observation.
    nn.init.orthogonal_(last.weight, 0.01)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def convolutions(channels: int) -> list[nn.Module]:
    """Layers from images (N, channels, H, W) to features (N, CONVOLUTION_WIDTH)."""
    layers: list[nn.Module] = []
    for width in (32, 64, CONVOLUTION_WIDTH):
        layers += [
            nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()]


class CategoricalPolicy(nn.Module):
    """A distribution over the timestep grid for each observation.

    Args:
        observation_shape: (D,) or (C, H, W).
        choices: K.
        config: Network settings.
        valid: (K,) bool, the choices that are open; default: all.
    """

    closed: Tensor

    def __init__(
        self,
        observation_shape: tuple[int, ...],
        choices: int,
        config: ReinforceConfig,
        valid: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = make_network(observation_shape, choices, config)
        closed = torch.zeros(choices, dtype=torch.bool) if valid is None else ~valid
        self.register_buffer("closed", closed, persistent=False)

    def forward(self, observations: Tensor) -> Tensor:
        """Log-probabilities (N, K); those of closed choices are finite, and exactly 0 as exp."""
        logits = self.network(observations).masked_fill(self.closed, CLOSED_LOGIT)
        return torch.log_softmax(logits, dim=-1)

    @torch.no_grad()
    def sample(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """One action per observation, int64 (N,), drawn with ``generator``."""
        probabilities = self(observations).exp()
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Tensor:
        """The most probable action of each observation, int64 (N,)."""
        return self(observations).argmax(dim=-1)
