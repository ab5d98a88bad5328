"""Heads that turn maps into a class for every position: torchvision's, on any backbone's maps.

All of them are called as ``head(*maps)``, shallow to deep, and give logits (N, K, h, w) at the
resolution of the finest map that they read. They work with a single map too.

The layers are torchvision's, but for two things: batch norms are group norms (arXiv:1803.08494),
and there is no dropout. What a head says of one image must depend neither on the images beside it
nor on chance, because a reward is paid for one lane's timestep alone.

Shape letters: N images, C,H,W map of a stage, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]

# Channels that share a mean: with fewer the pooled branch, one position, would say nothing.
GROUP = 16
# The stride of the finer map that LR-ASPP reads.
LOW_STRIDE = 8
# Maps below the last that have heads of their own under deep supervision.
AUXILIARY = 2
# DeepLabV3's rates, and the side of the map that they are made for: 513 pixels at output stride 8.
ATROUS_RATES = (12, 24, 36)
ATROUS_SIDE = 65


class HeadSettings(NamedTuple):
    """What a head is made of.

    Attributes:
        shapes: (C, H, W) of the maps that it takes, shallow to deep.
        classes: K.
        width: Channels of the hidden layers.
        image_side: Of the images, in pixels: what strides are counted from.
    """

    shapes: Sequence[Shape]
    classes: int
    width: int
    image_side: int


class LastMapHead(nn.Module):
    """Layers on the last map alone.

    Args:
        layers: From (N, C, H, W) to (N, K, H, W).
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, *maps: Tensor) -> Tensor:
        """(N, C, H, W), behind any others, to logits (N, K, H, W)."""
        logits: Tensor = self.layers(maps[-1])
        return logits


class LRASPPSegmentation(nn.Module):
    """The light head of MobileNetV3 (arXiv:1905.02244, section 6.4) on two maps.

    The last map, gated by its averages, is brought to the finer one, and both are classified. The
    finer one is the deepest whose stride is at most 8, as published, and that is finer than the
    last; without such a one the deepest that is no coarser, or the last map itself.

    Args:
        settings: Maps, classes and width.

    Attributes:
        low: Which of the maps is the finer one.
    """

    def __init__(self, settings: HeadSettings) -> None:
        from torchvision.models.segmentation.lraspp import LRASPPHead

        super().__init__()
        shapes = settings.shapes
        self.low = finer_map(shapes, settings.image_side)
        self.layers = _for_single_samples(
            LRASPPHead(shapes[self.low][0], shapes[-1][0], settings.classes, settings.width)
        )

    def forward(self, *maps: Tensor) -> Tensor:
        """One (N, C, H, W) per stage to logits (N, K, h, w) at the finer one's resolution."""
        logits: Tensor = self.layers({"low": maps[self.low], "high": maps[-1]})
        return logits


class WithAuxiliary(nn.Module):
    """A head, and further ones on the two maps below the last that only guide the learning.

    Deep supervision as in BiSeNetV1 (arXiv:1808.00897, section 3.3), whose two maps below the last
    are the context path's.

    Args:
        head: What answers.
        settings: Maps, classes and width of the further heads, each as :func:`fcn`.
    """

    def __init__(self, head: nn.Module, settings: HeadSettings) -> None:
        super().__init__()
        self.head = head
        below = len(settings.shapes) - 1
        self.read = tuple(range(max(0, below - AUXILIARY), below))
        self.auxiliary = nn.ModuleList(
            fcn(settings._replace(shapes=settings.shapes[at : at + 1])) for at in self.read
        )

    def forward(self, *maps: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The head's logits; where they are learned from, those of the further heads behind."""
        logits: Tensor = self.head(*maps)
        # Training mode alone does not say that: rewards are measured in it, too.
        if not (self.training and torch.is_grad_enabled() and self.read):
            return logits
        further = (head(maps[at]) for head, at in zip(self.auxiliary, self.read, strict=True))
        return (logits, *further)


def finer_map(shapes: Sequence[Shape], image_side: int) -> int:
    """The map that LR-ASPP reads beside the last one: see :class:`LRASPPSegmentation`.

    Args:
        shapes: (C, H, W) of all maps, shallow to deep.
        image_side: Of the images, in pixels.
    """
    last = min(shapes[-1][1:])
    sides = [min(shape[1:]) for shape in shapes[:-1]]
    fine = [at for at, side in enumerate(sides) if side > last and side * LOW_STRIDE >= image_side]
    finer = [at for at, side in enumerate(sides) if side > last]
    same = [at for at, side in enumerate(sides) if side == last]
    # Of maps that are all too coarse the finest.
    return max(fine, default=min(finer, default=max(same, default=len(sides))))


def atrous_rates(side: int) -> tuple[int, ...]:
    """DeepLabV3's dilations for a map of ``side``: the published ones, smaller on smaller maps.

    A rate beyond the map leaves a 3x3 kernel only its middle (arXiv:1706.05587, section 3.3), so
    the rates keep their part of the side; equal ones are one branch.
    """
    part = min(1.0, side / ATROUS_SIDE)
    return tuple(sorted({max(1, round(rate * part)) for rate in ATROUS_RATES}))


def linear(settings: HeadSettings) -> nn.Module:
    """One linear layer at every position of the last map: the dense linear probe."""
    return LastMapHead(nn.Conv2d(settings.shapes[-1][0], settings.classes, 1))


def position_mlp(settings: HeadSettings) -> nn.Module:
    """Three linear layers at every position of the last map, with ReLU between them.

    The published method trains such a classifier on the teacher's feature (arXiv:2308.10916).
    """
    channels, width = settings.shapes[-1][0], settings.width
    return LastMapHead(
        nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, settings.classes, 1),
        )
    )


def fcn(settings: HeadSettings) -> nn.Module:
    """A 3x3 layer on the last map, then a linear one (arXiv:1411.4038 as torchvision has it)."""
    from torchvision.models.segmentation.fcn import FCNHead

    # Its hidden layer is a quarter of its input, which a small student's width is too little for.
    head = FCNHead(4 * settings.width, settings.classes)
    head[0] = nn.Conv2d(settings.shapes[-1][0], settings.width, 3, padding=1, bias=False)
    return LastMapHead(_for_single_samples(head))


def deeplabv3(settings: HeadSettings) -> nn.Module:
    """Atrous spatial pyramid pooling on the last map (arXiv:1706.05587), then a 3x3 layer."""
    from torchvision.models.segmentation.deeplabv3 import ASPP

    channels, *sides = settings.shapes[-1]
    width = settings.width
    layers = nn.Sequential(
        ASPP(channels, atrous_rates(min(sides)), width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, settings.classes, 1),
    )
    return LastMapHead(_for_single_samples(layers))


HEADS: dict[str, Callable[[HeadSettings], nn.Module]] = {
    "linear": linear,
    "fcn": fcn,
    "lraspp": LRASPPSegmentation,
    "deeplabv3": deeplabv3,
}
# Those that read more than the last map.
READ_ALL_STAGES = ("lraspp",)


def _for_single_samples(module: nn.Module) -> nn.Module:
    """The module without what ties samples to one another, or to chance."""
    for path, part in list(module.named_modules()):
        owner, _, name = path.rpartition(".")
        if isinstance(part, nn.BatchNorm2d):
            groups = _groups(part.num_features)
            setattr(module.get_submodule(owner), name, nn.GroupNorm(groups, part.num_features))
        elif isinstance(part, nn.Dropout):
            setattr(module.get_submodule(owner), name, nn.Identity())
    return module


def _groups(width: int) -> int:
    """The most groups of at least :data:`GROUP` channels; one where there are fewer."""
    most = max(1, width // GROUP)
    return next(groups for groups in range(most, 0, -1) if width % groups == 0)
