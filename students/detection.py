"""Detectors on any backbone's maps: torchvision's heads on its feature pyramid.

A grid of positions covers the image at several resolutions; at each position a head says which
classes have an object there, and where its box lies. The grids follow from the sizes of the maps.

Shape letters: N images, C,H,W map of a stage, D pyramid width, A anchors of an image, K classes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

Shape = tuple[int, int, int]
Size = tuple[int, int]

# Pixels between the positions of the finest grid, in images of up to 64 pixels and in larger ones:
# a quarter of the positions is a quarter of the cost. Never so few cells along the image's side
# that neighbouring objects share them. Of the coarsest: a cell is as large as anchors need to be.
FINEST_STRIDES = (4, 8)
SMALL_IMAGE = 64
FEWEST_FINE_CELLS = 8
COARSEST_CELLS = 4
GROUPS = 32
# Side of the smallest anchor, in strides of its grid. Three (or, for SSD, two) sizes up to twice as
# large follow, where the next grid goes on: from an eighth of a 64-pixel image to all of it. The
# papers' 4 strides leave the small objects of small images without an anchor.
ANCHOR_STRIDES = 2.0
OCTAVE = tuple(2 ** (step / 3) for step in range(3))
RATIOS = (0.5, 1.0, 2.0)
SSD_RATIOS = (2, 3)


@dataclass(frozen=True)
class Layout:
    """What a kind of head is built for.

    Attributes:
        grids: Height and width, fine to coarse.
        image: Height and width in pixels.
        classes: K, without the background.
        width: D.
        convs: Hidden convolutions.
    """

    grids: list[Size]
    image: Size
    classes: int
    width: int
    convs: int

    @property
    def strides(self) -> list[tuple[float, float]]:
        """Height and width in pixels of a cell of each grid."""
        height, width = self.image
        return [(height / rows, width / columns) for rows, columns in self.grids]


class Detector(nn.Module):
    """A feature pyramid on a backbone's maps, and one of torchvision's detection heads on that.

    The pyramid (arXiv:1612.03144) takes the maps from a stride of 4 or 8 pixels on: the deepest of
    each size. Where all maps are finer the deepest is averaged down; where all are coarser the
    finest is enlarged; grids missing between the coarsest map and 4x4 are computed from it. All
    norms are group norms: what a head says of one image must not depend on the images beside it.

    * ``fcos``: FCOS (arXiv:2006.09214), one point for each position, four convolutions, class and
      box with its centerness.
    * ``retinanet``: RetinaNet (arXiv:1708.02002) in torchvision's second version
      (arXiv:1912.02424), nine anchors for each position.
    * ``ssdlite``: SSDLite (arXiv:1801.04381), six default boxes, a depthwise convolution of its own
      for each grid.

    Args:
        shapes: (C, H, W) of the maps it is called with, one or several.
        image_size: Height and width of the images in pixels, in which boxes are meant.
        classes: K, without the background.
        kind: One of :data:`HEADS`.
        width: D.
        convs: Hidden convolutions of ``fcos`` and ``retinanet``; published: 4.
        stride: Pixels between the positions of the finest grid; None: 4 in images of up to 64
            pixels, 8 in larger ones. There are at least 8 of them along the image's side.

    Attributes:
        grids: Height and width of the grids, fine to coarse.

    Raises:
        ValueError: There is no such kind, or no map.
    """

    anchors: Tensor

    def __init__(
        self,
        shapes: Sequence[Shape],
        image_size: Size,
        classes: int,
        kind: str = "fcos",
        width: int = 64,
        convs: int = 4,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in HEADS:
            raise ValueError(f"Unknown detector '{kind}'; known: {', '.join(HEADS)}.")
        if not shapes:
            raise ValueError("A detector needs the shape of at least one map.")
        self.sources = _sources(shapes, min(image_size), stride)
        sizes = [size for _, size in self.sources]
        # A depth of one more grid each, down to 4x4.
        while min(sizes[-1]) > COARSEST_CELLS:
            sizes.append(_halved(sizes[-1]))
        extra = len(sizes) - len(self.sources)
        self.pyramid = FeaturePyramidNetwork(
            [shapes[index][0] for index, _ in self.sources],
            width,
            extra_blocks=_CoarserGrids(width, extra) if extra else None,
        )
        # Still coarser maps take part, but nothing is predicted there.
        self.grids = [size for size in sizes if min(size) >= COARSEST_CELLS] or sizes[:1]
        for level in range(len(self.grids), len(self.sources)):
            self.pyramid.layer_blocks[level] = nn.Identity()
        layout = Layout(self.grids, image_size, classes, width, convs)
        self.head, anchors = HEADS[kind](layout)
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, *maps: Tensor) -> dict[str, Tensor]:
        """What the head says of N images.

        Args:
            maps: As in ``shapes``, (N, C, H, W) each.

        Returns:
            ``cls_logits`` (N, A, K), with the background in front (N, A, K + 1) under ``ssdlite``;
            ``bbox_regression`` (N, A, 4), to be decoded by the kind's box coder; ``bbox_ctrness``
            (N, A, 1) under ``fcos`` alone; ``anchors`` (N, A, 4), left, top, right, bottom in
            pixels, the same for each image and fine to coarse.
        """
        taken = OrderedDict(
            (str(level), _resized(maps[index], size))
            for level, (index, size) in enumerate(self.sources)
        )
        levels = list(self.pyramid(taken).values())[: len(self.grids)]
        outputs: dict[str, Tensor] = self.head(levels)
        count = len(outputs["cls_logits"])
        return {**outputs, "anchors": self.anchors.expand(count, -1, -1)}


class FCOSHeads(nn.Module):
    """torchvision's two FCOS heads, of any width and depth."""

    def __init__(self, width: int, classes: int, convs: int) -> None:
        super().__init__()
        norm = group_norm(width)
        self.classification_head = FCOSClassificationHead(width, 1, classes, convs, norm_layer=norm)
        self.regression_head = FCOSRegressionHead(width, 1, convs, norm_layer=norm)
        # Its distances pass a ReLU. Begun at 0, as the library does, a few large steps leave all of
        # them below 0 for good, without a gradient; begun at 1 a box has the size of its anchor's.
        nn.init.ones_(self.regression_head.bbox_reg.bias)

    def forward(self, levels: list[Tensor]) -> dict[str, Tensor]:
        """Maps of all grids (N, D, H, W) to logits, boxes and centerness (N, A, ...)."""
        boxes, centerness = self.regression_head(levels)
        logits = self.classification_head(levels)
        return {"cls_logits": logits, "bbox_regression": boxes, "bbox_ctrness": centerness}


def group_norm(width: int) -> Callable[[int], nn.Module]:
    """A norm for maps of ``width`` channels: 32 groups, or as many as divide it."""
    return partial(nn.GroupNorm, math.gcd(GROUPS, width))


def _fcos(layout: Layout) -> tuple[nn.Module, Tensor]:
    """The heads, and one square of a cell's size for each position."""
    levels = []
    for (rows, columns), (high, wide) in zip(layout.grids, layout.strides, strict=True):
        y = (torch.arange(rows) + 0.5) * high
        x = (torch.arange(columns) + 0.5) * wide
        centre = torch.cartesian_prod(y, x).flip(1)
        half = torch.tensor([wide, high]) / 2
        levels.append(torch.cat([centre - half, centre + half], dim=1))
    heads = FCOSHeads(layout.width, layout.classes, layout.convs)
    return heads, torch.cat(levels)


def _retinanet(layout: Layout) -> tuple[nn.Module, Tensor]:
    """The head, and nine anchors around the centre of each cell."""
    sizes = tuple(
        tuple(ANCHOR_STRIDES * math.sqrt(high * wide) * factor for factor in OCTAVE)
        for high, wide in layout.strides
    )
    generator = AnchorGenerator(sizes, (RATIOS,) * len(layout.grids))
    corners = generator.grid_anchors(layout.grids, layout.strides)
    # The generator puts them at each cell's corner, which leaves half a cell at two of the image's
    # edges: little in large images, too much in small ones.
    anchors = [
        boxes + torch.tensor([wide, high, wide, high]) / 2
        for boxes, (high, wide) in zip(corners, layout.strides, strict=True)
    ]
    per_cell = generator.num_anchors_per_location()[0]
    width, convs, norm = layout.width, layout.convs, group_norm(layout.width)
    head = RetinaNetHead(width, per_cell, layout.classes, norm_layer=norm)
    # The library's head has four hidden convolutions and cannot be asked for another number.
    for part in (head.classification_head, head.regression_head):
        more = [Conv2dNormActivation(width, width, norm_layer=norm) for _ in range(convs - 4)]
        part.conv = nn.Sequential(*part.conv[:convs], *more)
    return head, torch.cat(anchors)


def _ssdlite(layout: Layout) -> tuple[nn.Module, Tensor]:
    """The head, and six default boxes around the centre of each cell."""
    side, count = math.sqrt(math.prod(layout.image)), len(layout.grids)
    reach = [ANCHOR_STRIDES * math.sqrt(high * wide) for high, wide in layout.strides]
    scales = [min(1.0, length / side) for length in reach]
    scales.append(min(1.0, 2 * scales[-1]))
    generator = DefaultBoxGenerator([list(SSD_RATIOS)] * count, scales=scales)
    image = ImageList(torch.empty(1, 1, *layout.image), [layout.image])
    (anchors,) = generator(image, [torch.empty(1, 1, *grid) for grid in layout.grids])
    per_cell = generator.num_anchors_per_location()
    # One class more: the background.
    width = layout.width
    head = SSDLiteHead([width] * count, per_cell, layout.classes + 1, group_norm(width))
    return head, anchors


HEADS: dict[str, Callable[[Layout], tuple[nn.Module, Tensor]]] = {
    "fcos": _fcos,
    "retinanet": _retinanet,
    "ssdlite": _ssdlite,
}


class _CoarserGrids(ExtraFPNBlock):
    """Grids of half the resolution each, by a convolution of stride 2 on the one before."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1) for _ in range(count))

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """The pyramid's levels, with the coarser ones behind."""
        for number, layer in enumerate(self.layers):
            results.append(layer(functional.relu(results[-1]) if number else results[-1]))
            names.append(f"coarser{number}")
        return results, names


def _sources(
    shapes: Sequence[Shape], side: int, stride: int | None = None
) -> list[tuple[int, Size]]:
    """Which maps the pyramid takes, by index, and at which size; fine to coarse."""
    stride = stride or FINEST_STRIDES[side > SMALL_IMAGE]
    most = max(FEWEST_FINE_CELLS, side // stride)
    # Of maps of one size the deepest stays.
    deepest = {(h, w): index for index, (_, h, w) in enumerate(shapes) if min(h, w) <= most}
    if not deepest:
        _, height, wide = shapes[-1]
        return [(len(shapes) - 1, _scaled((height, wide), most))]
    taken = [
        (deepest[size], size) for size in sorted(deepest, key=lambda s: (min(s), max(s)))[::-1]
    ]
    index, size = taken[0]
    if min(size) < FEWEST_FINE_CELLS:
        taken[0] = index, _scaled(size, FEWEST_FINE_CELLS)
    return taken


def _scaled(size: Size, short: int) -> Size:
    """The size of a map of the same proportions whose shorter side is ``short``."""
    factor = short / min(size)
    return round(size[0] * factor), round(size[1] * factor)


def _halved(size: Size) -> Size:
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def _resized(features: Tensor, size: Size) -> Tensor:
    """Averaged where the map is too fine, interpolated where it is too coarse."""
    if features.shape[2:] == size:
        return features
    if min(features.shape[2:]) > min(size):
        return functional.adaptive_avg_pool2d(features, size)
    return functional.interpolate(features, size, mode="bilinear", align_corners=False)
