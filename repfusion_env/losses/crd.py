"""Contrastive representation distillation: an image's pair of features against other images'.

Shape letters: B samples, M images of the bank, K negatives, E width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repfusion_env.losses.relations import unit
from repfusion_env.losses.shape import Anchors, FeatureShape


class ContrastiveRepresentation(nn.Module):
    """Noise-contrastive estimation of which pairs of features are of one image.

    Tian et al., "Contrastive Representation Distillation", ICLR 2020, section 3.1: the critic ``h =
    P / (P + N / M)`` tells an image's pair from N pairs of different images, ``-log h - sum_N
    log(1 - h)``, once with the student's feature against the teacher's of other images and once the
    other way round. Both sides go through a linear embedding of unit length, ``P = exp(cos /
    temperature) / Z``; negatives come from a memory of both embeddings of all M images. Labels play
    no part. Positive; dense features are averaged first.

    The positive pair is the sample's present features (in the authors' code one side is the
    memory's), for the memory knows nothing of the timestep just chosen. One draw of negatives
    serves the whole batch, less each sample's own image, which makes the published 16384 cheap.
    ``Z``, in the authors' code an estimate on the first batch, is its expectation: M times the mean
    of ``exp(cos / temperature)`` over random directions, known in closed form.

    Args:
        shape: Gives channels and M.
        negatives: K, drawn anew each step; the whole bank where it is no larger.
        temperature: Above 0.
        embedding: E.
        momentum: Part of the memory that an update keeps, in [0, 1).
    """

    def __init__(
        self,
        shape: FeatureShape,
        negatives: int = 16384,
        temperature: float = 0.07,
        embedding: int = 128,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.student_head = nn.Linear(shape.width, embedding)
        self.teacher_head = nn.Linear(shape.width, embedding)
        self.log_mean = _log_mean_over_sphere(embedding, 1.0 / temperature)
        self.seed = int(torch.randint(2**62, ()))
        self.steps = 0
        # No buffers: whoever copies those in case a step is skipped would copy all M images.
        self.memory = unit(torch.randn(2, shape.images, embedding))  # student's, teacher's

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
            anchors: Not used; the memory stays fixed by itself.
            ids: (B,) images of the bank; None for others, none of which is in the memory.
        """
        mine, theirs = self._embedded(student, teacher)
        others = self._draw()  # (K,)
        if ids is None:
            own = torch.zeros(len(student), 1, dtype=torch.bool, device=student.device)
        else:
            own = ids[:, None] == others
        count = (len(others) - own.expand(-1, len(others)).sum(1, keepdim=True)).clamp_min(1)
        # h = sigmoid(logit): M cancels in P / (P + N / M).
        offset = self.log_mean + count.to(student.dtype).log()  # (B, 1)
        positive = (mine * theirs).sum(1, keepdim=True) / self.temperature - offset
        loss = 2.0 * F.softplus(-positive).squeeze(1)
        for embedded, memory in ((mine, self.memory[1]), (theirs, self.memory[0])):
            logits = embedded @ memory[others].T / self.temperature - offset  # (B, K)
            loss = loss + F.softplus(logits).masked_fill(own, 0.0).sum(1)
        return loss

    @torch.no_grad()
    def remember(self, student: Tensor, teacher: Tensor, ids: Tensor, skip: Tensor) -> None:
        """Move the memory of ``ids`` towards their present embeddings, and draw anew from now on.

        Args:
            student: (B, F) or (B, F, H, W).
            teacher: The same shape.
            ids: (B,) images of the bank.
            skip: () bool; where True the memory stays as it is.
        """
        self.steps += 1
        old = self.memory[:, ids]  # (2, B, E)
        moved = torch.lerp(torch.stack(self._embedded(student, teacher)), old, self.momentum)
        new = torch.where(skip, old, unit(moved))
        # Samples of the same image all write what the first of them, the newest, found: no race
        # decides.
        lanes = torch.arange(len(ids), device=ids.device)
        first = torch.where(ids[:, None] == ids, lanes, len(ids)).amin(1)
        self.memory[:, ids] = new[:, first]

    def get_extra_state(self) -> dict[str, Any]:
        """The memory and what the negatives are drawn from."""
        return {"memory": self.memory, "seed": self.seed, "steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`get_extra_state`; nothing is shared with ``state``."""
        if state["memory"].shape != self.memory.shape:
            raise ValueError(
                f"the memory of loss 'crd' is for {self.memory.shape[1]} images by "
                f"{self.memory.shape[2]}, the given one for {state['memory'].shape[1]} by "
                f"{state['memory'].shape[2]}"
            )
        self.memory = state["memory"].to(self.memory, copy=True)
        self.seed, self.steps = state["seed"], state["steps"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.memory = fn(self.memory)  # follows the module to its device, as a buffer would
        return self

    def _embedded(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Two times (B, E), of unit length."""
        if student.ndim == 4:
            student, teacher = student.mean((2, 3)), teacher.mean((2, 3))
        return unit(self.student_head(student)), unit(self.teacher_head(teacher))

    def _draw(self) -> Tensor:
        """Images of this step's negatives, (K,), the same however often a step asks."""
        device, images = self.memory.device, self.memory.shape[1]
        if self.negatives >= images:
            return torch.arange(images, device=device)
        generator = torch.Generator(device).manual_seed(self.seed + self.steps)
        return torch.randint(images, (self.negatives,), generator=generator, device=device)


def _log_mean_over_sphere(width: int, scale: float) -> float:
    """Logarithm of the mean of ``exp(scale * cos)`` over all directions in ``width`` dimensions.

    The series ``0F1(width / 2; scale^2 / 4)``, a Bessel function (Mardia & Jupp, "Directional
    Statistics", 2000, appendix 1).
    """
    half, x = 0.5 * width, math.log(0.25 * scale * scale)
    # Terms k^2 >> scale^2 / 4 no longer count.
    terms = [
        k * x - math.lgamma(k + 1) - math.lgamma(half + k) + math.lgamma(half)
        for k in range(50 + int(2 * scale))
    ]
    largest = max(terms)
    return largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
