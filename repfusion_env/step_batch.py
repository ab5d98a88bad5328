"""The samples that a step trains on.

Shape letters: N lanes, B samples, M images of them, G samples of each image (B = M * G), C,H,W
image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from repfusion_env.actions.choice import Choice
from repfusion_env.fusion import Targets
from repfusion_env.groups import one_look, spread
from repfusion_env.noise import derive_seed

if TYPE_CHECKING:
    from repfusion_env.trainer import DistillationTrainer


@dataclass(frozen=True)
class Batch:
    """What the updates of a step train on.

    Attributes:
        ids: (B,) int64 images of the training bank.
        targets: Of the B samples.
        images: (M, C, H, W) in [-1, 1].
        answers: The task's targets, M rows.
        group: G neighbouring samples are of one image, which the student sees once.
    """

    ids: Tensor
    targets: Targets
    images: Tensor
    answers: Tensor
    group: int = 1

    def spread(self, values: Tensor) -> Tensor:
        """Rows by image (M, ...) as rows by sample (B, ...)."""
        return spread(values, self.group)

    def kept(self) -> Batch:
        """The same for a further update: the fusion's weights have had their gradient."""
        return replace(self, targets=self.targets.kept())


def step_batch(
    trainer: DistillationTrainer, ids: Tensor, choice: Choice | Tensor, visits: Tensor, group: int
) -> tuple[Batch, Targets]:
    """The batch of a step, its own lanes first, and the targets of these lanes.

    Args:
        trainer: Whose step it is.
        ids: (N,) images of the training bank.
        choice: What the actions chose; or (N,) timesteps.
        visits: (N,) keys of fresh noise.
        group: So many neighbouring lanes hold the same image.
    """
    bank = trainer.parts.train
    if not one_look(len(ids), group, trainer.recent.size, trainer.ranks.count):
        group = 1
    alone = ids[::group]
    seen = augmented(trainer, alone, group)
    shown = None if trainer.augmentation is None else seen[0]
    new = trainer.targets(bank, ids, choice, visits, trainer.noise_seed, shown, group)
    batch_ids, targets, seen = trainer.recent.fill_up(ids, new, seen)
    if not seen:
        alone = batch_ids[::group]
        seen = [bank.pixels(alone), trainer.task.targets(bank, alone)]
    return Batch(batch_ids, targets, seen[0], seen[1], group), new


def augmented(trainer: DistillationTrainer, ids: Tensor, group: int) -> list[Tensor]:
    """Changed images and what is known of them; nothing without augmentation.

    Streamed images are gone after their step: where a later batch needs them they stand here.

    Args:
        trainer: Whose step it is.
        ids: (M,) images, of one lane of each ``group``.
        group: Lanes for which one image stands.
    """
    bank = trainer.parts.train
    kept = bank.streamed and len(ids) < trainer.recent.size
    if trainer.augmentation is None and not kept:
        return []
    images, answers = bank.pixels(ids), trainer.task.targets(bank, ids)
    if trainer.augmentation is None:
        return [images, answers]
    seed, left = derive_seed(trainer.seed, "augment", trainer.steps), trainer.config.env.group_size
    left = max(1, left // group)
    return list(trainer.augmentation.drawn_by(seed, images, answers, left, trainer.ranks))
