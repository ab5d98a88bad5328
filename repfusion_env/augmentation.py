"""Random changes of images on the device, in which all that is known of an image takes part.

Mirror, rotation, size and shift move the pixels, and masks, points and boxes with them; brightness,
contrast, saturation and hue change the pixels alone. Every image draws its own change; resampling
and color arithmetic are kornia's.

Shape letters: B images, C,H,W image, P points, G most boxes of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from repfusion_env.config import AugmentationConfig, ExperimentConfig
from repfusion_env.config_loading import ConfigError
from repfusion_env.data.annotations import IGNORE, NO_BOX, Keypoints, Masks
from repfusion_env.data.bank import ImageBank
from repfusion_env.noise import own_randomness
from repfusion_env.ranks import ALONE, Ranks
from repfusion_env.registry import did_you_mean

# The forms of targets, and their dimensions beside B.
FORMS = {
    "labels": "(B,)",
    "masks": "(B, H, W)",
    "keypoints": "(B, P, 3)",
    "boxes": "(B, G, 5)",
}
# Of a turn, at full strength; as far as SimCLR's views go.
HUE = 0.25
# Of an object cut by the edge: with less than this the rest shows too little to be found.
LEAST_AREA, LEAST_SIDE = 0.25, 1.0
# Points on the edge stay inside it, whatever the rounding.
ROUNDING = 1e-4


@dataclass(frozen=True, eq=False)
class Movement:
    """Where the pixels of B images go: mirrored first where they are, then moved.

    Args:
        mirrored: (B,) bool; None: none is.
        matrix: float32 (B, 2, 3), from old to new positions in pixels, x to the right and y down,
            (0, 0) the centre of the corner's pixel; None: nothing moves.
    """

    mirrored: Tensor | None
    matrix: Tensor | None

    def of_images(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1], bilinear; black (-1) comes in from outside."""
        if self.mirrored is not None:
            images = torch.where(self.mirrored[:, None, None, None], images.flip(-1), images)
        if self.matrix is not None:
            # What kornia fills in is 0.
            images = _warped(images + 1.0, self.matrix, "bilinear") - 1.0
        return images

    def of_masks(self, masks: Tensor, exchange: Tensor | None) -> Tensor:
        """(B, H, W) int64, by the nearest pixel; what comes in from outside does not count.

        Args:
            masks: Class ids, or 255.
            exchange: (256,) int64, what each id becomes in a mirrored image; None: the same.
        """
        if self.mirrored is not None:
            flipped = masks.flip(-1) if exchange is None else exchange[masks.flip(-1)]
            masks = torch.where(self.mirrored[:, None, None], flipped, masks)
        if self.matrix is not None:
            # One more than the id, so that the 0 which kornia fills in is no class.
            moved = _warped((masks + 1)[:, None].float(), self.matrix, "nearest")[:, 0].long()
            masks = torch.where(moved > 0, moved - 1, IGNORE)
        return masks

    def of_points(self, points: Tensor, width: int) -> Tensor:
        """Positions (B, P, 2) in pixels from the corner pixel's centre; their order stays."""
        if self.mirrored is not None:
            x, y = points.unbind(-1)
            x = torch.where(self.mirrored[:, None], width - 1 - x, x)
            points = torch.stack((x, y), dim=-1)
        if self.matrix is not None:
            turned, shift = self.matrix[:, None, :, :2], self.matrix[:, None, :, 2]
            # No matrix product: a point that is NaN, since it is unknown, must not spread.
            points = (turned * points[:, :, None]).sum(-1) + shift
        return points


class Augmentation:
    """Random changes of images and of one kind of target.

    Draws from torch's global generator of the images' device; the same numbers are drawn whatever
    the images hold, and the host waits for none of them.

    Args:
        config: What is changed, and how far.
        bank: Whose annotation tells what a mirrored image's classes or points are.
        annotation: What the targets are: ``labels``, ``masks``, ``keypoints`` or ``boxes``.

    Raises:
        ConfigError: Images are to be mirrored whose points have no known mirror image.
        ValueError: There is no such kind, or the bank has no such annotation.
    """

    def __init__(self, config: AugmentationConfig, bank: ImageBank, annotation: str) -> None:
        if annotation not in FORMS:
            raise ValueError(
                f"augmentation of '{annotation}' asked for; allowed: {', '.join(FORMS)}."
                f"{did_you_mean(annotation, FORMS)}"
            )
        if annotation != "labels" and annotation not in bank.annotations:
            have = " and ".join(sorted(bank.annotations)) or "none"
            raise ValueError(
                f"augmentation of {annotation} asked for, but data set '{bank.name}' has "
                f"annotations of another kind: {have}"
            )
        self.config, self.annotation = config, annotation
        self._exchange = _exchange(bank, annotation) if config.flip else None

    @torch.no_grad()
    def __call__(
        self, images: Tensor, targets: Tensor, group: int = 1, ranks: Ranks = ALONE
    ) -> tuple[Tensor, Tensor]:
        """Change each image, and its target with it.

        Args:
            images: float32 (B, C, H, W) in [-1, 1].
            targets: In the form of :meth:`repfusion_env.tasks.Task.targets`: labels (B,); masks
                int64 (B, H, W); points float32 (B, P, 3) as x, y, visible; boxes float32 (B, G, 5)
                as left, top, right, bottom, label.
            group: Neighbouring rows that share one change (lanes that hold the same image).
            ranks: Changes are drawn for the lanes of all of them; these are this rank's.

        Returns:
            New tensors of the same shapes and types; the given ones stay as they are. Pixels from
            outside are black in images and 255 in masks. Points outside are not visible. Boxes are
            the smallest around the moved ones' corners, cut at the edges; one of which less than a
            pixel's width or a quarter of the area is left is gone (label -1).

        Raises:
            ValueError: Images or targets of another shape.
        """
        self._check(images, targets)
        height, width = images.shape[2:]
        groups = math.ceil(len(images) / max(group, 1))
        rows = torch.arange(len(images), device=images.device) // max(group, 1)
        rows, groups = rows + ranks.index * groups, ranks.count * groups
        movement = self._movement(groups, rows, height, width, images.device)
        moved = movement.of_images(images)
        if self.config.jitter:
            moved = self._jittered(moved, groups, rows)
        return moved, self._follow(movement, targets, height, width)

    def drawn_by(
        self, seed: int, images: Tensor, targets: Tensor, group: int = 1, ranks: Ranks = ALONE
    ) -> tuple[Tensor, Tensor]:
        """As a call, but drawn from ``seed`` alone; the global generators stay as they are.

        Rows that are no whole number of groups are changed each by itself.
        """
        with own_randomness(seed, images.device):
            return self(images, targets, group if len(images) % group == 0 else 1, ranks)

    def _check(self, images: Tensor, targets: Tensor) -> None:
        count, form = len(images), FORMS[self.annotation]
        fits = targets.ndim == form.count(",") + (self.annotation != "labels")
        last = {"keypoints": 3, "boxes": 5}.get(self.annotation)
        fits = fits and len(targets) == count and (last is None or targets.shape[-1] == last)
        if self.annotation == "masks":
            fits = fits and targets.shape[1:] == images.shape[2:]
        if images.ndim != 4 or not fits:
            raise ValueError(
                f"augmentation takes images (B, C, H, W) and {self.annotation} {form}, not "
                f"{tuple(images.shape)} and {tuple(targets.shape)}"
            )

    def _movement(
        self, groups: int, rows: Tensor, height: int, width: int, device: torch.device
    ) -> Movement:
        config = self.config
        mirrored = None
        if config.flip:
            mirrored = (torch.rand(groups, device=device) < 0.5)[rows]
        if not (config.rotation or config.scale or config.translation):
            return Movement(mirrored, None)
        from kornia.geometry.transform import get_affine_matrix2d

        angle, size, right, down = torch.rand(4, groups, device=device).mul_(2.0).sub_(1.0)
        # From plain numbers, here and below: a tensor made of them would wait for its way over.
        far = config.translation
        shift = torch.stack((right * (far * width), down * (far * height)), dim=1)
        middle = (torch.full_like(right, (side - 1) / 2.0) for side in (width, height))
        centre = torch.stack(tuple(middle), dim=1)
        matrix: Tensor = get_affine_matrix2d(
            shift,
            centre,
            (1.0 + config.scale * size)[:, None].expand(groups, 2),
            config.rotation * angle,
        )
        return Movement(mirrored, matrix[rows, :2])

    def _jittered(self, images: Tensor, groups: int, rows: Tensor) -> Tensor:
        from kornia import enhance

        strength = self.config.jitter
        drawn = torch.rand(4, groups, device=images.device)[:, rows].mul_(2.0).sub_(1.0)
        factors = 1.0 + strength * drawn
        changed = images.add(1.0).div_(2.0).clamp_(0.0, 1.0)
        changed = enhance.adjust_brightness_accumulative(changed, factors[0])
        changed = enhance.adjust_contrast_with_mean_subtraction(changed, factors[1])
        if images.shape[1] == 3:
            changed = enhance.adjust_saturation_with_gray_subtraction(changed, factors[2])
            changed = enhance.adjust_hue(changed, 2.0 * math.pi * HUE * strength * drawn[3])
        return changed.clamp_(0.0, 1.0).mul_(2.0).sub_(1.0)

    def _follow(self, movement: Movement, targets: Tensor, height: int, width: int) -> Tensor:
        if self.annotation == "masks":
            return movement.of_masks(targets, self._exchange)
        if self.annotation == "keypoints":
            return self._points(movement, targets, height, width)
        if self.annotation == "boxes":
            return _boxes(movement, targets, height, width)
        return targets.clone()

    def _points(self, movement: Movement, targets: Tensor, height: int, width: int) -> Tensor:
        places = movement.of_points(targets[..., :2], width)
        x, y = places[..., 0], places[..., 1]
        near = 0.5 + ROUNDING
        inside = (x > -near) & (x < width - 1 + near) & (y > -near) & (y < height - 1 + near)
        found = torch.cat((places, (targets[..., 2] * inside)[..., None]), dim=-1)
        if movement.mirrored is None or self._exchange is None:
            return found
        # The left eye of a mirrored face is where the right one was.
        exchanged = found.index_select(1, self._exchange)
        return torch.where(movement.mirrored[:, None, None], exchanged, found)


def make_augmentation(
    config: ExperimentConfig, bank: ImageBank, annotation: str
) -> Augmentation | None:
    """What ``config.augmentation`` asks for; None where all of it is off.

    Args:
        config: The experiment.
        bank: Training images; the augmentation works on the bank's device.
        annotation: A task's ``annotation``.

    Raises:
        ConfigError: See :class:`Augmentation`.
        ValueError: See :class:`Augmentation`.
    """
    given = config.augmentation
    if not (given.flip or given.rotation or given.scale or given.translation or given.jitter):
        return None
    return Augmentation(given, bank, annotation)


def _exchange(bank: ImageBank, annotation: str) -> Tensor | None:
    """What becomes what in a mirrored image, on the bank's device; None: nothing changes."""
    known = bank.annotations.get(annotation)
    if isinstance(known, Keypoints):
        if known.mirror is None:
            raise ConfigError(
                [
                    f"augmentation.flip: the keypoints of data set '{bank.name}' name no mirror "
                    "pairs, so that a mirrored image's left and right points would be confused; "
                    "give them (docs/data.md), or leave flip off"
                ]
            )
        return torch.tensor(known.mirror, device=bank.device)
    if isinstance(known, Masks) and known.mirror is not None:
        others = range(len(known.mirror), IGNORE + 1)
        return torch.tensor([*known.mirror, *others], device=bank.device)
    return None


def _boxes(movement: Movement, targets: Tensor, height: int, width: int) -> Tensor:
    left, top, right, bottom, label = targets.unbind(-1)  # (B, G) each
    corners = torch.stack((left, top, right, top, right, bottom, left, bottom), dim=-1)
    # Boxes count from the outer edge, movements from the centre of the corner's pixel.
    places = movement.of_points(corners.reshape(len(targets), -1, 2) - 0.5, width) + 0.5
    places = places.reshape(*corners.shape[:2], 4, 2)
    around = torch.cat((places.amin(2), places.amax(2)), dim=-1)  # (B, G, 4)
    cut = torch.stack((around[..., 0::2].clamp(0, width), around[..., 1::2].clamp(0, height)), -1)
    cut = cut.flatten(2)
    sides = cut[..., 2:] - cut[..., :2]
    kept = (sides >= LEAST_SIDE - ROUNDING).all(-1) & (label >= 0)
    whole = (around[..., 2:] - around[..., :2]).prod(-1)
    kept &= sides.prod(-1) >= (LEAST_AREA - ROUNDING) * whole
    label = torch.where(kept, label, float(NO_BOX))
    return torch.cat((torch.where(kept[..., None], cut, 0.0), label[..., None]), dim=-1)


def _warped(maps: Tensor, matrix: Tensor, mode: str) -> Tensor:
    """(B, C, H, W) moved by ``matrix`` (B, 2, 3); 0 comes in from outside."""
    from kornia.geometry.transform import warp_affine

    height, width = maps.shape[2:]
    # align_corners: the matrix speaks of pixel centres, so that a shift by one pixel is one.
    moved: Tensor = warp_affine(maps, matrix, (height, width), mode=mode, align_corners=True)
    return moved
