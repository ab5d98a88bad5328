"""What the agent sees of an image: embeddings, the student's own features, or pixels.

Every observation is float32, standardised and clipped to finite bounds. Whatever does not change
with training is computed once per image bank and kept on the device; of a streamed bank, of which a
table would take a pass over all images, it is computed at each look.

Shape letters: N lanes, M images of a bank, C,H,W image, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from repfusion_env.config import ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.features import CHUNK, chunks
from repfusion_env.frozen import FrozenParts
from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.progress import watched
from repfusion_env.registry import OBSERVATIONS, look_up
from repfusion_env.trainer import DistillationTrainer
from students import build_backbone

LOSS_BOUND = 10.0
# Images of a streamed bank that say what is usual.
SAMPLE = 2_048


class Source(Protocol):
    """One way to look at images; ``shape`` is (D,) or (C, H, W), values within ``bound``."""

    shape: tuple[int, ...]
    bound: float

    def __call__(self, trainer: DistillationTrainer, bank: ImageBank, ids: Tensor) -> Tensor:
        """Observations of the images ``ids`` (N,), float32 (N, *shape), newly made."""
        ...


class Observer:
    """The configured observation with its Gymnasium space.

    Args:
        trainer: Whose images, teacher and student are looked at.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer
        settings = trainer.config.observation
        builder: Callable[[ExperimentConfig, FrozenParts], Source] = (
            backbone_embedding
            if "/" in settings.source
            else look_up("observation", settings.source, OBSERVATIONS)
        )
        # A bank's embeddings are computed once, however many environments share the teacher.
        sources, key = trainer.parts.sources, (settings, trainer.config.student)
        if key not in sources:
            sources[key] = builder(trainer.config, trainer.parts)
        self.source: Source = sources[key]
        self.student_state = settings.student_state
        if self.student_state and len(self.source.shape) != 1:
            raise ValueError(
                f"observation.student_state: it is appended to an embedding, but "
                f"observation.source '{settings.source}' has the shape {self.source.shape}"
            )

    @property
    def depends_on_student(self) -> bool:
        """Whether the observation of an image changes as the student learns."""
        return self.student_state or isinstance(self.source, _StudentEmbedding)

    def space(self) -> spaces.Box:
        """A finite ``Box``; with the student's state two entries are appended.

        They are the run's progress in [0, 1] and the task loss on the image, clipped to [0, 10].
        """
        low = np.full(self.source.shape, -self.source.bound, np.float32)
        high = np.full(self.source.shape, self.source.bound, np.float32)
        if self.student_state:
            low = np.concatenate((low, np.zeros(2, np.float32)))
            high = np.concatenate((high, np.array([1.0, LOSS_BOUND], np.float32)))
        return spaces.Box(low, high, dtype=np.float32)

    def __call__(self, bank: ImageBank, ids: Tensor) -> Tensor:
        """Observations of the images ``ids`` (N,) of ``bank``, float32, newly made."""
        observations = self.source(self.trainer, bank, ids)
        if not self.student_state:
            return observations
        trainer = self.trainer
        with torch.no_grad():
            targets = trainer.task.targets(bank, ids)
            losses = trainer.task.losses(trainer.outputs(bank.pixels(ids)), targets)
        losses = torch.nan_to_num(losses, nan=LOSS_BOUND).clamp(0.0, LOSS_BOUND)
        progress = torch.full_like(losses, trainer.progress)
        return torch.cat((observations, torch.stack((progress, losses), 1)), dim=1)


class _Table:
    """Embeddings of whole banks, standardised with the training bank's mean and deviation.

    Of a streamed bank there is no table: mean and deviation are those of :data:`SAMPLE` images in a
    fixed random order (of all, where there are fewer), and each look is a forward of its own.
    """

    def __init__(
        self,
        embed: Callable[[ImageBank, Tensor], Tensor],
        parts: FrozenParts,
        bound: float,
        size: int | None = None,
    ) -> None:
        self._embed, self._parts, self.bound = embed, parts, bound
        self._size = size or CHUNK
        raw = self._raw(parts.train, SAMPLE if parts.train.streamed else None)
        self._mean = raw.mean(0)
        self._deviation = raw.std(0).clamp_min(1e-6) if len(raw) > 1 else torch.ones_like(raw[0])
        self._tables: dict[int, Tensor] = {}
        if not parts.train.streamed:
            self._tables[id(parts.train)] = self._standardized(raw)
        self.shape: tuple[int, ...] = (raw.shape[1],)

    @torch.no_grad()
    def __call__(self, trainer: DistillationTrainer, bank: ImageBank, ids: Tensor) -> Tensor:
        if bank.streamed:
            return self._standardized(self._embed(bank, ids))
        if id(bank) not in self._tables:
            self._tables[id(bank)] = self._standardized(self._raw(bank))
        return self._tables[id(bank)][ids]

    @torch.no_grad()
    def _raw(self, bank: ImageBank, most: int | None = None) -> Tensor:
        """Embeddings of all images, or of ``most`` of them."""
        ids = torch.arange(len(bank), device=self._parts.device)
        if most is not None and most < len(bank):
            generator = torch.Generator().manual_seed(derive_seed(0, "observation sample"))
            ids = torch.randperm(len(bank), generator=generator)[:most].to(ids.device)
        parts = bank.announced(chunks(ids, self._size))
        pieces = watched(parts, len(ids), description="observations", unit="images")
        return torch.cat([self._embed(bank, part) for part in pieces])

    def _standardized(self, raw: Tensor) -> Tensor:
        return ((raw - self._mean) / self._deviation).clamp(-self.bound, self.bound)


class _StudentEmbedding:
    """The student's own pooled feature, each brought to mean 0 and deviation 1 over its entries.

    The student's scale drifts as it learns; normalising each observation by itself keeps the bounds
    honest without statistics that would have to be tracked and restored.
    """

    def __init__(self, config: ExperimentConfig, parts: FrozenParts) -> None:
        channels, size, _ = parts.train.shape
        with own_randomness(0):  # only its width is wanted
            backbone = build_backbone(config.student.name, in_channels=channels, image_size=size)
        self.shape: tuple[int, ...] = (backbone.feature_channels,)
        self.bound = config.observation.clip

    def __call__(self, trainer: DistillationTrainer, bank: ImageBank, ids: Tensor) -> Tensor:
        _, pooled = trainer.embed(bank.pixels(ids))
        pooled = torch.nn.functional.layer_norm(pooled, pooled.shape[1:])
        return torch.nan_to_num(pooled).clamp(-self.bound, self.bound)


class _Pixels:
    """The image itself in [-1, 1]."""

    def __init__(self, parts: FrozenParts) -> None:
        self.shape: tuple[int, ...] = parts.train.shape
        self.bound = 1.0

    def __call__(self, trainer: DistillationTrainer, bank: ImageBank, ids: Tensor) -> Tensor:
        return bank.pixels(ids)


def teacher_embedding(config: ExperimentConfig, parts: FrozenParts) -> Source:
    """Pooled teacher feature of the clean image at ``observation.timestep``; D = sum of F."""
    timestep = config.observation.timestep

    def embed(bank: ImageBank, ids: Tensor) -> Tensor:
        found = parts.features.embedded(bank, ids, timestep)
        return found * 1.0  # a tensor outside inference mode

    return _Table(embed, parts, config.observation.clip, config.teacher.batch_size)


def backbone_embedding(config: ExperimentConfig, parts: FrozenParts) -> Source:
    """Pooled last stage of any ``torchvision/<name>`` or ``timm/<name>`` backbone."""
    channels, size, _ = parts.train.shape
    with own_randomness(derive_seed(0, "observation backbone")):
        try:
            backbone = build_backbone(
                config.observation.source,
                in_channels=channels,
                image_size=size,
                pretrained=config.observation.pretrained,
            )
        except ValueError as error:
            sentence = str(error).replace("Student ", "").replace("student ", "backbone ")
            raise ValueError(f"observation.source: {sentence}") from error
    backbone = backbone.to(parts.device).eval().requires_grad_(False)

    def embed(bank: ImageBank, ids: Tensor) -> Tensor:
        return backbone(bank.pixels(ids))[backbone.stages[-1]].mean((2, 3))

    return _Table(embed, parts, config.observation.clip)


def student_embedding(config: ExperimentConfig, parts: FrozenParts) -> Source:
    """The current student's pooled feature; D = S."""
    return _StudentEmbedding(config, parts)


def pixels(config: ExperimentConfig, parts: FrozenParts) -> Source:
    """The image, float32 (C, H, W) in [-1, 1]."""
    return _Pixels(parts)
