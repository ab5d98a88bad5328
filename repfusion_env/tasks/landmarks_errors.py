"""How far predicted points are off, in the unit of the data set.

Shape letters: B samples, P points.
"""

from __future__ import annotations

import torch
from torch import Tensor

THRESHOLD = 0.1
# A unit of fewer pixels than this is none: two points annotated at the same place.
SMALLEST_UNIT = 1e-3


def units(targets: Tensor, normalizer: tuple[int, int] | None) -> Tensor:
    """The length in pixels that errors are measured by.

    Args:
        targets: (B, P, 3), x, y and visible.
        normalizer: Two points whose distance it is; None: the square root of the area of the box
            around the visible points.

    Returns:
        (B,), float32; 0 for an image that has none: one of the two points is not visible, both are
        at the same place, or the box has no area.
    """
    points, visible = targets[..., :2], targets[..., 2] > 0.5
    if normalizer is None:
        far = torch.finfo(points.dtype).max
        low = torch.where(visible[..., None], points, far).amin(1)
        high = torch.where(visible[..., None], points, -far).amax(1)
        sides = torch.where(visible.any(1)[:, None], high - low, 0.0)
        length, known = sides.prod(1).sqrt(), visible.any(1)
    else:
        first, second = normalizer
        length = (points[:, first] - points[:, second]).norm(dim=1)
        known = visible[:, first] & visible[:, second]
    return torch.where(known & (length >= SMALLEST_UNIT), length, 0.0)


def normalized_errors(
    predictions: Tensor, targets: Tensor, normalizer: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Distance of each point from its target, in the image's unit.

    Args:
        predictions: (B, P, 3), x, y and anything.
        targets: (B, P, 3), x, y and visible.
        normalizer: See :func:`units`.

    Returns:
        The errors (B, P), and which of them count, (B, P) bool: the visible points of images that
        have a unit. The others are 0.
    """
    unit = units(targets, normalizer)[:, None]
    counts = (targets[..., 2] > 0.5) & (unit > 0)
    distances = (predictions[..., :2] - targets[..., :2]).norm(dim=2)
    return torch.where(counts, distances / unit.clamp_min(SMALLEST_UNIT), 0.0), counts


class LandmarkErrors:
    """Normalised mean error, and how the errors of the images are spread.

    Args:
        normalizer: See :func:`units`.
    """

    def __init__(self, normalizer: tuple[int, int] | None) -> None:
        self.normalizer = normalizer
        self._errors: list[Tensor] = []
        self._counts: list[Tensor] = []

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Take predicted and known points, (B, P, 3) each; nothing is read by the host."""
        errors, counts = normalized_errors(predictions, targets, self.normalizer)
        self._errors.append(errors.sum(1) / counts.sum(1).clamp_min(1))  # (B,)
        self._counts.append(counts.any(1))

    def compute(self) -> dict[str, float]:
        """Of the images that have a unit and a visible point, each weighing the same.

        Returns:
            ``nme``: mean of the images' mean errors; ``auc_0.1``: area under the curve of the part
            of the images (up) whose error is at most so much (across) from 0 to 0.1, as a part of
            the whole area; ``failure_rate_0.1``: part of the images whose error is above 0.1;
            ``left_out``: part of all images that could not be measured. NaN where none could.
        """
        if not self._errors:
            return dict.fromkeys(("nme", "auc_0.1", "failure_rate_0.1", "left_out"), float("nan"))
        counted = torch.cat(self._counts).cpu()
        errors = torch.cat(self._errors).cpu()[counted].double()
        # The curve is a staircase that rises at each image's error: its area needs no sampling.
        area = (1 - errors / THRESHOLD).clamp_min(0.0)
        return {
            "nme": float(errors.mean()),
            "auc_0.1": float(area.mean()),
            "failure_rate_0.1": float((errors > THRESHOLD).double().mean()),
            "left_out": float((~counted).double().mean()),
        }
