"""Policy and value networks of our REINFORCE.

Shape letters: N lanes, D embedding, C,H,W image; A choices, all components of an action together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from repfusion_env.config import ReinforceConfig
from repfusion_env.ranks import ALONE, Ranks

CONVOLUTION_WIDTH = 64
# Not minus infinity: the entropy multiplies it by a probability of 0.
CLOSED_LOGIT = -1e9


def make_network(
    observation_shape: tuple[int, ...], outputs: int, config: ReinforceConfig
) -> nn.Sequential:
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
    """A distribution over the choices for each observation.

    Where an action has several components, each has a categorical distribution of its own: the
    probability of an action is their product, and entropies add up.

    Args:
        observation_shape: (D,) or (C, H, W).
        choices: A, for actions (N,); or the choices of each of m components, for actions (N, m).
        config: Network settings.
        valid: (A,) bool, the open choices, one component's after the other's; default: all.
    """

    closed: Tensor

    def __init__(
        self,
        observation_shape: tuple[int, ...],
        choices: int | Sequence[int],
        config: ReinforceConfig,
        valid: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.flat = isinstance(choices, int)
        self.sizes = [choices] if isinstance(choices, int) else list(choices)
        total = sum(self.sizes)
        self.network = make_network(observation_shape, total, config)
        closed = torch.zeros(total, dtype=torch.bool) if valid is None else ~valid
        self.register_buffer("closed", closed, persistent=False)

    def forward(self, observations: Tensor) -> Tensor:
        """Log-probabilities (N, A); those of closed choices are finite, and exactly 0 as exp."""
        logits = self.network(observations).masked_fill(self.closed, CLOSED_LOGIT)
        parts = [torch.log_softmax(part, dim=-1) for part in logits.split(self.sizes, dim=-1)]
        return torch.cat(parts, dim=-1)

    def log_probability(self, log_probabilities: Tensor, actions: Tensor) -> Tensor:
        """Of the actions (N,) or (N, m), from what :meth:`forward` gave: (N,)."""
        columns = actions.reshape(len(log_probabilities), -1)
        parts = log_probabilities.split(self.sizes, dim=-1)
        chosen = [part.gather(1, columns[:, m : m + 1]) for m, part in enumerate(parts)]
        return torch.cat(chosen, dim=1).sum(1)

    @torch.no_grad()
    def sample(
        self, observations: Tensor, generator: torch.Generator, ranks: Ranks = ALONE
    ) -> Tensor:
        """One action per observation, int64 (N,) or (N, m), drawn with ``generator``.

        Args:
            observations: (N, ...) of this rank's lanes.
            generator: In the same state on every rank; it draws for all of their lanes.
            ranks: Who has the others.
        """
        columns = []
        for part in self(observations).exp().split(self.sizes, dim=-1):
            # A race of exponential clocks draws from categories; torch.multinomial does the same
            # with the same numbers, but knows of no other ranks' rows.
            clocks = part.new_empty(len(part) * ranks.count, part.shape[1])
            clocks.exponential_(generator=generator)
            columns.append((part / ranks.share(clocks)).argmax(dim=-1, keepdim=True))
        return self._action(columns)

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Tensor:
        """The most probable action of each observation, int64 (N,) or (N, m)."""
        parts = self(observations).split(self.sizes, dim=-1)
        return self._action([part.argmax(dim=-1, keepdim=True) for part in parts])

    def _action(self, columns: list[Tensor]) -> Tensor:
        return columns[0][:, 0] if self.flat else torch.cat(columns, dim=1)
