"""A task's metric over a whole bank of images.

Shape letters: N images of a chunk, C,H,W image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repfusion_env.data.bank import ImageBank
from repfusion_env.features import chunks
from repfusion_env.tasks import Task

# Maps of all stages are held for so many images at once.
CHUNK = 64


@torch.no_grad()
def measure(
    task: Task,
    outputs: Callable[[Tensor], Any],
    bank: ImageBank,
    limit: int | None = None,
) -> dict[str, float]:
    """What the task's metric says of a network on the images of ``bank``.

    Args:
        task: Whose metric and targets.
        outputs: From images (N, C, H, W) in [-1, 1] to what a head of the task returns; in
            inference mode.
        bank: Usually the held-out images.
        limit: Use only the first so many.

    Returns:
        Values by name.
    """
    metric = task.metric()
    images = len(bank) if limit is None else min(limit, len(bank))
    for ids in chunks(torch.arange(images, device=bank.device), CHUNK):
        metric.update(outputs(bank.pixels(ids)), task.targets(bank, ids))
    return metric.compute()
