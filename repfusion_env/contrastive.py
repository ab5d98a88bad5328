"""Self-supervision: random views of images, and the loss that pulls two views of one together.

Needs the packages of the ``compare`` extra, which are imported where they are used.

Shape letters: B images, C,H,W image, S student width, P width of the projection head's output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from repfusion_env.config import ContrastiveConfig, ExperimentConfig
from repfusion_env.contrastive_rules import missing_packages
from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.ranks import ALONE, Ranks

# As SimCLR has them: hue moves a quarter as far, and some views are changed in color or lose it.
HUE, JITTERED, GREY = 0.25, 0.8, 0.2


class Views(nn.Module):
    """Random views of images, another for each: crop, mirror, brightness and color.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
    appendix A, without the blur, as there for small images. Draws from torch's global generators.

    Args:
        config: What is drawn, and how strongly.
        shape: (C, H, W) of an image. Without color there are brightness and contrast to change.

    Raises:
        ValueError: A package is missing.
    """

    def __init__(self, config: ContrastiveConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        sentence = missing_packages()
        if sentence is not None:
            raise ValueError(sentence)
        from kornia import augmentation as kornia

        channels, *size = shape
        changes: list[nn.Module] = []
        if config.crop < 1:
            crop = kornia.RandomResizedCrop((size[0], size[1]), scale=(config.crop, 1.0))
            changes.append(crop)
        if config.flip:
            changes.append(kornia.RandomHorizontalFlip(p=0.5))
        strength = config.jitter
        if strength and channels == 3:
            jitter = kornia.ColorJitter(strength, strength, strength, HUE * strength, p=JITTERED)
            changes += [jitter, kornia.RandomGrayscale(p=GREY)]
        elif strength:
            around = (1.0 - strength, 1.0 + strength)
            changes.append(kornia.RandomBrightness(around, p=JITTERED))
            changes.append(kornia.RandomContrast(around, p=JITTERED))
        self.changes = nn.Sequential(*changes)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """One view of each image.

        Args:
            images: (B, C, H, W) in [-1, 1].

        Returns:
            The same shape and range.
        """
        views: Tensor = self.changes(images.add(1.0).div_(2.0))
        return views.clamp_(0.0, 1.0).mul_(2.0).sub_(1.0)


class Contrastive(nn.Module):
    """SimCLR's loss of a backbone: NT-Xent between two views of each image, in nats.

    The cross-entropy of picking an image's other view out of all others of the batch, by cosine
    similarity over the temperature. An image that stands several times in the batch (lanes of a
    group, a batch filled up with earlier decisions) is one image with more views, and no two of
    them are to be told apart; with every image once this is NT-Xent to the letter.

    Args:
        config: Its settings; ``weight`` is left to the caller.
        in_features: S.
        shape: (C, H, W) of an image.

    Raises:
        ValueError: A package is missing.
    """

    def __init__(
        self, config: ContrastiveConfig, in_features: int, shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.views = Views(config, shape)
        self.head = nn.Sequential(
            nn.Linear(in_features, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.projection),
        )
        from pytorch_metric_learning.losses import SupConLoss
        from pytorch_metric_learning.reducers import MeanReducer

        # With one positive for each anchor it is NT-Xent. The library's NTXentLoss is the same
        # number by way of all (pair, negative) triples: 366 ms for 128 images where this takes 2.
        self.loss = SupConLoss(config.temperature, reducer=MeanReducer())

    def forward(
        self,
        embed: Callable[[Tensor], Tensor],
        images: Tensor,
        ids: Tensor,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """The loss of one batch, ().

        Args:
            embed: From images to float32 features (B, S), with gradients.
            images: (B, C, H, W) in [-1, 1].
            ids: (B,) int64, which image each is.
            ranks: Whose images are told apart; each has B.
        """
        pairs = images.repeat(2, 1, 1, 1)
        seen = ranks.all(self.head(embed(self.views(pairs))))
        loss: Tensor = self.loss(seen, ranks.all(ids.repeat(2)))
        return loss


def make_contrastive(
    config: ExperimentConfig,
    in_features: int,
    shape: tuple[int, int, int],
    seed: int,
    device: torch.device,
) -> Contrastive | None:
    """The contrastive loss with its projection head; None where ``contrastive.weight`` is 0.

    Args:
        config: The experiment.
        in_features: S.
        shape: (C, H, W) of an image.
        seed: Of the run; the head's weights follow from it.
        device: Where it is wanted.

    Raises:
        ValueError: A package is missing.
    """
    if not config.contrastive.weight:
        return None
    with own_randomness(derive_seed(seed, "contrastive")):
        return Contrastive(config.contrastive, in_features, shape).to(device)
