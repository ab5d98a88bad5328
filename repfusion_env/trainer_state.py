"""What a resume needs of a trainer: the same file whether one process trained or several ranks did.

Shape letters: N lanes, B samples of an update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repfusion_env.trainer import DistillationTrainer


def saved(trainer: DistillationTrainer) -> dict[str, Any]:
    """All that a resume needs, as tensors and plain values, of all lanes of all ranks."""
    ranks, caches = trainer.ranks, trainer.parts.features.caches
    return {
        "seed": trainer.seed,
        "steps": trainer.steps,
        "student": trainer.student.state_dict(),
        "loss": trainer.loss.state_dict(),
        "fusion": trainer.fusion.state_dict(),
        "contrastive": None if trainer.contrastive is None else trainer.contrastive.state_dict(),
        **trainer.updates.state_dict(),
        "recent": trainer.recent.state_dict(ranks),
        "metrics": trainer.metrics.state_dict(ranks),
        "cache": None if caches is None else caches.state_dict(ranks),
    }


def restore(trainer: DistillationTrainer, state: dict[str, Any]) -> None:
    """Go on from :func:`saved`, to the last bit on CPU with as many ranks as saved it."""
    trainer.reset(state["seed"])
    trainer.steps = state["steps"]
    trainer.student.load_state_dict(state["student"])
    trainer.loss.load_state_dict(state["loss"])
    trainer.fusion.load_state_dict(state["fusion"])
    if trainer.contrastive is not None:
        trainer.contrastive.load_state_dict(state["contrastive"])
    trainer.updates.load_state_dict(state)
    lanes = trainer.config.env.num_envs
    trainer.recent.load_state_dict(state["recent"], trainer.device, trainer.ranks, lanes)
    trainer.metrics.load_state_dict(state["metrics"], trainer.ranks)
    caches = trainer.parts.features.caches
    if caches is not None and state.get("cache") is not None:
        caches.load_state_dict(state["cache"], trainer.ranks)
