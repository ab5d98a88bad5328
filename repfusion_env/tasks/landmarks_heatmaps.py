"""Heatmaps: from where points are to what a head should say, and back to a part of a pixel.

A heatmap is a distribution over the positions of a grid, given by its logits; its target is a
Gaussian around the point, cut off at the grid's edge. Both directions use the same measure: the
loss is the divergence of the heatmap from the target, and the decoded point is the one whose target
is closest to the heatmap, so that a perfect heatmap gives its point back exactly, on the image's
border too.

Shape letters: B samples, P points, h,w heatmap, n its length along one axis, k window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Half a window in deviations: 99.7 % of a target lie within, other peaks mostly without.
REACH = 3.0
NEWTON_STEPS = 8
# Probabilities and variances below this count as it, so that a division stays finite.
TINY = 1e-6


@dataclass(frozen=True)
class Heatmaps:
    """The code between points and heatmaps of any size over one image.

    Args:
        image: (H, W) of the images.
        sigma: Deviation of the targets, in heatmap pixels.
    """

    image: tuple[int, int]
    sigma: float

    def losses(self, logits: Tensor, points: Tensor, visible: Tensor) -> Tensor:
        """Divergence of the heatmaps from their targets, averaged over the visible points.

        The cross-entropy of a softmax over all positions, as of Mask R-CNN's keypoint head
        (arXiv:1703.06870, section 5), with a Gaussian for the single position and its entropy taken
        off, so that a perfect heatmap has loss 0.

        Args:
            logits: (B, P, h, w).
            points: (B, P, 2), x and y in image pixels; without meaning where not visible.
            visible: (B, P), bool.

        Returns:
            In nats, (B,), float32; 0 for an image with no visible point.
        """
        logits = logits.float()
        logs = logits.flatten(2).log_softmax(-1).view_as(logits)  # (B, P, h, w)
        x, y = self._to_grid(torch.where(visible[..., None], points, 0.0), logits)
        across = _gaussian(x, logits.shape[3], self.sigma)  # (B, P, w)
        down = _gaussian(y, logits.shape[2], self.sigma)  # (B, P, h)
        # The target is the product of the two: it is never written out.
        cross = -torch.einsum("bph,bphw,bpw->bp", down, logs, across)
        entropy = -torch.xlogy(across, across).sum(-1) - torch.xlogy(down, down).sum(-1)
        # Rounding can bring a divergence of nothing below 0.
        divergence = (cross - entropy).clamp_min(0.0) * visible
        return divergence.sum(1) / visible.sum(1).clamp_min(1)

    def decode(self, logits: Tensor) -> Tensor:
        """The points whose targets are closest to the heatmaps.

        Around the heatmap's peak, along each axis: of the Gaussians of this deviation, cut off
        where the window is, the one with the least divergence from the heatmap is that with the
        same mean.
        Far from the border this is the mean of the window (local soft-argmax), near it the mean
        alone would lie too far inside.

        Args:
            logits: (B, P, h, w).

        Returns:
            x and y in image pixels, within the image, and the probability that the heatmap gives to
            the window, in [0, 1]; (B, P, 3), float32.
        """
        logits = logits.float()
        height, width = logits.shape[2:]
        flat = logits.flatten(2)
        peak = flat.argmax(-1)
        row, column = peak // width, peak % width
        reach = min(math.ceil(REACH * self.sigma), max(height, width) - 1)
        offsets = torch.arange(-reach, reach + 1, device=logits.device)
        rows, columns = row[..., None] + offsets, column[..., None] + offsets  # (B, P, k)
        down_in, across_in = _within(rows, height), _within(columns, width)
        places = rows.clamp(0, height - 1)[..., :, None] * width
        places = places + columns.clamp(0, width - 1)[..., None, :]
        probabilities = flat.softmax(-1).gather(2, places.flatten(2)).view_as(places)
        inside = down_in[..., :, None] & across_in[..., None, :]
        window = probabilities * inside  # (B, P, k, k)
        mass = window.sum((2, 3))
        window = window / mass.clamp_min(TINY)[..., None, None]
        x = column + _closest(window.sum(2), across_in, offsets, self.sigma)
        y = row + _closest(window.sum(3), down_in, offsets, self.sigma)
        return torch.stack([*self._to_image(x, y, (height, width)), mass.clamp_max(1.0)], dim=-1)

    def _to_grid(self, points: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """From image pixels to heatmap pixels; in both, (0, 0) is the centre of the corner's."""
        height, width = logits.shape[2:]
        x = (points[..., 0] + 0.5) * (width / self.image[1]) - 0.5
        y = (points[..., 1] + 0.5) * (height / self.image[0]) - 0.5
        return x, y

    def _to_image(self, x: Tensor, y: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x = (x + 0.5) * (self.image[1] / size[1]) - 0.5
        y = (y + 0.5) * (self.image[0] / size[0]) - 0.5
        return x.clamp(-0.5, self.image[1] - 0.5), y.clamp(-0.5, self.image[0] - 0.5)


def _gaussian(center: Tensor, length: int, sigma: float) -> Tensor:
    """Around ``center`` (B, P) on the places 0..n-1, (B, P, n); each sums to 1.

    A centre far outside gives all to the closest end.
    """
    places = torch.arange(length, device=center.device)
    return (-((places - center[..., None]) ** 2) / (2 * sigma**2)).softmax(-1)


def _within(places: Tensor, length: int) -> Tensor:
    return (places >= 0) & (places < length)


def _closest(weights: Tensor, inside: Tensor, offsets: Tensor, sigma: float) -> Tensor:
    """The centre of the cut-off Gaussian with the mean of ``weights``, by Newton's method.

    The mean grows with the centre at the rate of the variance over sigma squared.

    Args:
        weights: (B, P, k), which sum to 1, 0 where not inside.
        inside: (B, P, k), bool: where the Gaussian is.
        offsets: (k,).
        sigma: Its deviation.

    Returns:
        (B, P), in the unit of the offsets.
    """
    wanted = (weights * offsets).sum(-1)
    center = wanted
    outside = torch.where(inside, 0.0, -torch.inf)  # (B, P, k)
    for _ in range(NEWTON_STEPS):
        scores = -((offsets - center[..., None]) ** 2) / (2 * sigma**2) + outside
        gaussian = scores.softmax(-1)
        mean = (gaussian * offsets).sum(-1)
        variance = (gaussian * (offsets - mean[..., None]) ** 2).sum(-1)
        step = sigma**2 * (wanted - mean) / variance.clamp_min(TINY)
        # Behind the border the mean hardly moves, and the whole step would lead far away.
        center = center + step.clamp(-1.0, 1.0)
    return center
