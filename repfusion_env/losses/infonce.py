"""InfoNCE: pick the teacher's feature of the same image out of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repfusion_env.losses.relations import itself, per_sample, related, unit
from repfusion_env.losses.shape import Anchors, FeatureShape


class InfoNCE(nn.Module):
    """Cross-entropy of the teacher's own feature among those of the others, in nats.

    van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
    section 2.3, with ``exp(cos / temperature)`` as density ratio: the student's feature asks, the
    teacher's features are the keys. Non-negative; the more a feature points at its own key and away
    from the others, the smaller. Another lane with the same image is no other where ``ids`` say so.
    Memory grows with the square of the related points.

    Args:
        shape: Not used; the loss learns nothing.
        temperature: Above 0.
    """

    def __init__(self, shape: FeatureShape, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        anchors: Anchors | None = None,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The loss per sample, (B,).

        Args:
            student: (B, F) or (B, F, H, W).
            teacher: The same shape.
            anchors: Others that stay fixed.
            ids: (B,) images of the bank; None: no two samples are of one image.
        """
        mine, _, _, keys = related(student, teacher, anchors)
        logits = unit(mine) @ unit(keys).transpose(1, 2) / self.temperature  # (G, L, L')
        if ids is not None and student.ndim == 2:
            same = F.pad(ids[:, None] == ids, (0, keys.shape[1] - len(ids)))
            logits = logits.masked_fill(same & ~itself(logits), -torch.inf)
        own = logits.diagonal(dim1=1, dim2=2)
        return per_sample(logits.logsumexp(-1) - own, student)
