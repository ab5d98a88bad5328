"""A feature extractor for small images; SB3's own CNN wants 36x36 pixels or more."""

from __future__ import annotations

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from agents.policies import CONVOLUTION_WIDTH, convolutions


class PixelFeatures(BaseFeaturesExtractor):
    """The convolutions of our REINFORCE's pixel policy, (N, C, H, W) -> (N, 64)."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, CONVOLUTION_WIDTH)
        self.layers = nn.Sequential(*convolutions(observation_space.shape[0]))

    def forward(self, observations: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, 64)."""
        features: torch.Tensor = self.layers(observations)
        return features
