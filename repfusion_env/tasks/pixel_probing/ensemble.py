"""The classifiers of pixels: how one is built, trained and applied, and how several vote.

Shape letters: N images, H,W image, F features of maps of one size h,w, D all features, K classes,
B pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.tasks.pixel_probing.pixels import PixelVectors

# All as in the paper's code: widths by the number of classes, Adam, and when to stop.
MANY_CLASSES = 30
WIDTHS, WIDE = (128, 32), (256, 128)
DEVIATION = 0.02
BATCH, LEARNING_RATE, EPOCHS = 64, 1e-3, 100
PATIENT_EPOCHS, PATIENCE = 4, 50
# Given the number of the optimizer step and its loss.
Watcher = Callable[[int, float], None]
SHOWN_EVERY = 50


class PixelClassifier(nn.Module):
    """From a pixel's vector to logits of its class.

    Args:
        features: D.
        classes: K.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        first, second = WIDTHS if classes < MANY_CLASSES else WIDE
        self.first = nn.Linear(features, first)
        self.rest = nn.Sequential(
            nn.ReLU(),
            nn.BatchNorm1d(first),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.BatchNorm1d(second),
            nn.Linear(second, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, DEVIATION)
                nn.init.zeros_(module.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits (B, K) of vectors (B, D)."""
        logits: Tensor = self.rest(self.first(vectors))
        return logits

    def of_images(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits (N, K, H, W) of all pixels of the images with these maps, each (N, F, h, w).

        The first layer is linear, so it may come before the interpolation: the same numbers, with
        128 channels to enlarge and not thousands.
        """
        weights = self.first.weight.split([found.shape[1] for found in maps], dim=1)
        hidden = torch.zeros((), device=maps[0].device)
        for found, weight in zip(maps, weights, strict=True):
            narrow = F.conv2d(found, weight[:, :, None, None])
            hidden = hidden + F.interpolate(narrow, size, mode="bilinear", align_corners=False)
        count, width = hidden.shape[:2]
        rows = hidden.permute(0, 2, 3, 1).reshape(-1, width) + self.first.bias
        logits: Tensor = self.rest(rows)
        return logits.view(count, *size, -1).permute(0, 3, 1, 2)


def train_member(
    vectors: PixelVectors,
    pixels: Tensor,
    labels: Tensor,
    classes: int,
    seed: int,
    watch: Watcher | None = None,
) -> PixelClassifier:
    """Train one classifier by cross-entropy, until its batches stop getting better.

    At most 100 epochs; from the fifth on it ends after 50 batches in a row none of which had a
    smaller loss than all since then.

    Args:
        vectors: Of the labelled images.
        pixels: (M,) the labelled pixels, as ``vectors`` numbers them.
        labels: (M,) int64, their classes.
        classes: K.
        seed: Of weights and order.
        watch: Told now and then how it goes.

    Returns:
        The classifier, in eval mode.

    Raises:
        ValueError: The loss is not finite.
    """
    device = pixels.device
    with own_randomness(derive_seed(seed, "weights")):
        member = PixelClassifier(vectors.width, classes).to(device)
    optimizer = torch.optim.Adam(member.parameters(), lr=LEARNING_RATE)
    order = torch.Generator().manual_seed(derive_seed(seed, "order"))
    step, best, stale = 0, float("inf"), 0
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(pixels), generator=order).to(device).split(BATCH):
            if len(rows) < 2:  # without a spread there is no batch normalisation
                continue
            loss = F.cross_entropy(member(vectors(pixels[rows])), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if watch is not None and step % SHOWN_EVERY == 0:
                watch(step, float(loss.detach()))
            if epoch < PATIENT_EPOCHS:
                continue
            now = float(loss.detach())
            if now < best:
                best, stale = now, 0
            else:
                stale += 1
            if stale > PATIENCE:
                return _finished(member)
    return _finished(member)


def _finished(member: PixelClassifier) -> PixelClassifier:
    if not all(bool(value.isfinite().all()) for value in member.parameters()):
        raise ValueError(
            "a pixel classifier's weights are not finite any more; are the teacher's features? "
            "teacher.precision 'fp32' has the widest range"
        )
    return member.eval().requires_grad_(False)


@torch.no_grad()
def votes(
    members: Iterable[PixelClassifier], maps: Sequence[Tensor], size: tuple[int, int]
) -> Tensor:
    """How many members are for each class, float32 (N, K, H, W); the class of most has the pixel.

    Args:
        members: At least one.
        maps: Each (N, F, h, w).
        size: (H, W).
    """
    found: Tensor | None = None
    for member in members:
        logits = member.of_images(maps, size)
        chosen = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        found = chosen if found is None else found + chosen
    if found is None:
        raise ValueError("an ensemble needs at least one member to vote")
    return found
