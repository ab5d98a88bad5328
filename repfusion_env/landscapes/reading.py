"""One timestep of a landscape: all layers in one pass, heads, rewards; kept on disk where asked.

Shape letters: D noise draws, L layers, R rows of rewards, M training images, M' held-out images,
F feature width, n images of the similarity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from repfusion_env.atomic import atomic_file
from repfusion_env.data.bank import ImageBank
from repfusion_env.features import chunks
from repfusion_env.landscapes.heads import FITTED_DRAWS, judge_features
from repfusion_env.landscapes.representation import effective_rank, mean_norm, spread_share
from repfusion_env.noise import derive_seed, keyed_noise
from repfusion_env.teachers.base import Teacher

# Images between whose features similarities are measured; their kernels are this squared.
SIMILARITY_IMAGES = 1000
# From (bank, ids, timestep, draw) to rewards (len(ids),).
Judge = Callable[[ImageBank, Tensor, int, int], Tensor]


@dataclass(frozen=True)
class Reading:
    """What one timestep gave; tensors on the CPU.

    Attributes:
        accuracy: (L,) float32.
        strength: (L,).
        train: Rewards (R, D, M).
        heldout: Rewards (R, D, M').
        effective_rank: (L,).
        norm: (L,).
        spread_share: (L,).
        features: (n, sum of F) of the first draw, all layers side by side.
    """

    accuracy: Tensor
    strength: Tensor
    train: Tensor
    heldout: Tensor
    effective_rank: Tensor
    norm: Tensor
    spread_share: Tensor
    features: Tensor


@dataclass(frozen=True)
class Reader:
    """Reads timesteps.

    Attributes:
        teacher: With all the layers that are looked at.
        train: Bank of training images; its first M are read.
        heldout: Held-out bank; its first M' are read.
        train_ids: (M,) on the device.
        heldout_ids: (M',).
        folds: (M,) on the device; see :func:`repfusion_env.landscapes.heads.balanced_folds`.
        draws: D.
        noised: Whether the teacher sees noised images.
        seed: Of the noise.
        judge: A run's reward; None: minus the loss of a head on each layer.
    """

    teacher: Teacher
    train: ImageBank
    heldout: ImageBank
    train_ids: Tensor
    heldout_ids: Tensor
    folds: Tensor
    draws: int
    noised: bool
    seed: int
    judge: Judge | None

    @torch.no_grad()
    def read(self, timestep: int) -> Reading:
        """Measure one timestep."""
        train = self.features(self.train, self.train_ids, timestep, "train")
        heldout = self.features(self.heldout, self.heldout_ids, timestep, "held-out")
        answers = self.train.labels[self.train_ids], self.heldout.labels[self.heldout_ids]
        reports = [
            judge_features(z, answers[0], other, answers[1], self.folds, len(self.train.classes))
            for z, other in zip(train, heldout, strict=True)
        ]
        if self.judge is None:
            rewards = [-torch.stack([report.train_losses for report in reports])]
            rewards.append(-torch.stack([report.heldout_losses for report in reports]))
        else:
            rewards = [
                self._judged(self.train, self.train_ids, timestep),
                self._judged(self.heldout, self.heldout_ids, timestep),
            ]
        first = [z[0] for z in train]
        return Reading(
            accuracy=torch.tensor([report.accuracy for report in reports]),
            strength=torch.tensor([report.strength for report in reports]),
            train=rewards[0].float().cpu(),
            heldout=rewards[1].float().cpu(),
            effective_rank=torch.tensor([effective_rank(z) for z in first]),
            norm=torch.tensor([mean_norm(z) for z in first]),
            spread_share=torch.tensor([spread_share(z) for z in first]),
            features=torch.cat([z[:SIMILARITY_IMAGES] for z in first], dim=1).cpu(),
        )

    @torch.no_grad()
    def features(self, bank: ImageBank, ids: Tensor, timestep: int, purpose: str) -> list[Tensor]:
        """Pooled features (D, len(ids), F) of every layer; one forward for each image and draw."""
        seed = derive_seed(self.seed, "landscape", purpose)
        # Without a reward from them, features serve what two draws say as well as many.
        draws = self.draws if self.judge is None else min(self.draws, FITTED_DRAWS)
        pieces: list[list[list[Tensor]]] = [[[] for _ in range(draws)] for _ in self.layers]
        for part in chunks(ids):
            clean = self.teacher.encode(bank.pixels(part))
            at = torch.full_like(part, timestep)
            for draw in range(draws):
                inputs = clean
                if self.noised:
                    channels, height, width = clean.shape[1:]
                    visits = torch.full_like(part, draw)
                    noise = keyed_noise((channels, height, width), seed, part, at, visits)
                    inputs = self.teacher.add_noise(clean, noise, at)
                maps = self.teacher.features(inputs, at)
                for place, layer in enumerate(self.layers):
                    pieces[place][draw].append(maps[layer].mean((2, 3)))
        return [torch.stack([torch.cat(parts) for parts in layer]) for layer in pieces]

    @property
    def layers(self) -> tuple[str, ...]:
        """The L layers."""
        return tuple(self.teacher.layers)

    def _judged(self, bank: ImageBank, ids: Tensor, timestep: int) -> Tensor:
        """Rewards of the run's student, (1, D, len(ids))."""
        assert self.judge is not None
        rows = [
            torch.cat([self.judge(bank, part, timestep, draw) for part in chunks(ids)])
            for draw in range(self.draws)
        ]
        return torch.stack(rows)[None]


def stored(path: Path, key: str) -> Reading | None:
    """What an earlier measurement left at ``path``; None unless it is whole and of this ``key``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return Reading(**{item.name: file.get_tensor(item.name) for item in fields(Reading)})
    except (OSError, SafetensorError):
        return None


def store(reading: Reading, path: Path, key: str) -> None:
    """Write a reading atomically, marked with what it was measured from."""
    from safetensors.torch import save

    tensors = {item.name: getattr(reading, item.name).contiguous() for item in fields(Reading)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(save(tensors, metadata={"key": key}))
