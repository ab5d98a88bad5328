"""Earlier decisions that fill up a batch of few lanes.

Shape letters: N lanes, B samples, L teacher layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from repfusion_env.fusion import Targets
from repfusion_env.ranks import ALONE, Ranks


class RecentDecisions:
    """The most recent (image, target) pairs, up to the batch size.

    Args:
        size: Batch size of the update.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lanes = 1
        self._kept: tuple[Tensor, Targets] | None = None
        self._beside: list[Tensor] = []

    def fill_up(
        self, ids: Tensor, new: Targets, beside: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Targets, list[Tensor]]:
        """This step's samples first, then the most recent earlier ones up to the batch size.

        Args:
            ids: (N,) images of this step.
            new: Their targets.
            beside: Whatever else is to be kept of a sample, (N, ...) each: augmented images.

        Returns:
            Images (B,), targets, and what is beside them; B is ``size``, or N where that is more,
            or fewer at the start.
        """
        beside, self._lanes = list(beside), len(ids)
        if len(ids) >= self.size:
            return ids, new, beside
        targets = Targets(new.features, new.weights, probe=new.probe)
        if self._kept is not None:
            lanes = len(ids)
            pairs = zip(beside, self._beside, strict=True)
            beside = [torch.cat(pair)[: self.size] for pair in pairs]
            ids, targets = self._joined(ids, targets, *self._kept)
            # An earlier decision without a finite feature spoilt its own step; the newest decision
            # takes its place, or it would spoil every step until it has left the batch.
            finite = [z.flatten(1).isfinite().all(1) for z in targets.features]
            rows = torch.arange(len(ids), device=ids.device)
            rows = rows * (torch.stack(finite).all(0) | (rows < lanes))
            ids, targets = ids[rows], _taken(targets, rows)
            beside = [values[rows] for values in beside]
        self._kept, self._beside = (ids, targets.kept()), beside
        return ids, targets, beside

    def _joined(
        self, ids: Tensor, new: Targets, old_ids: Tensor, old: Targets
    ) -> tuple[Tensor, Targets]:
        size, lanes = self.size, (len(ids), len(old_ids))
        pairs = zip(new.features, old.features, strict=True)
        features = [torch.cat(pair)[:size] for pair in pairs]
        weights = new.weights
        if any(w is not None and w.ndim == 2 for w in (new.weights, old.weights)):
            both = (new.weights, old.weights)
            rows = [
                torch.full((n, len(features)), 1.0 / len(features), device=ids.device)
                if w is None
                else w.expand(n, -1)
                for n, w in zip(lanes, both, strict=True)
            ]
            weights = torch.cat(rows)[:size]
        probe = None
        if new.probe is not None and old.probe is not None:
            probe = torch.cat((new.probe, old.probe))[:size]
        return torch.cat((ids, old_ids))[:size], Targets(features, weights, probe=probe)

    def state_dict(self, ranks: Ranks = ALONE) -> dict[str, Any] | None:
        """What all ranks keep, for a resume; None before the first decision."""
        if self._kept is None:
            return None
        ids, targets = self._kept
        if ranks.several:
            blocks = len(ids) // self._lanes
            targets = _rows(targets, lambda v: ranks.all(v, blocks))
            ids = ranks.all(ids, blocks)
        return {
            "ids": ids,
            "features": list(targets.features),
            "weights": targets.weights,
            "probe": targets.probe,
            "beside": [
                ranks.all(values, len(values) // self._lanes) if ranks.several else values
                for values in self._beside
            ],
        }

    def load_state_dict(
        self,
        state: dict[str, Any] | None,
        device: torch.device,
        ranks: Ranks = ALONE,
        lanes: int = 1,
    ) -> None:
        """Restore what :meth:`state_dict` gave.

        Args:
            state: Of all ranks together.
            device: Where it is wanted.
            ranks: This rank keeps its share.
            lanes: Of all ranks.
        """
        self._kept, self._beside, self._lanes = None, [], max(1, lanes // ranks.count)
        if state is not None:
            blocks = len(state["ids"]) // lanes if ranks.several else 1

            def own(values: Tensor) -> Tensor:
                return ranks.share(values, blocks).to(device)

            beside = state.get("beside", ())  # of which earlier versions knew nothing
            self._beside = [own(values) for values in beside]
            targets = Targets(state["features"], state["weights"], probe=state["probe"])
            self._kept = (own(state["ids"]), _mapped(_rows(targets, own), lambda v: v.to(device)))


def _mapped(targets: Targets, change: Callable[[Tensor], Tensor]) -> Targets:
    """``change`` applied to every tensor."""
    features = [change(z) for z in targets.features]
    weights = None if targets.weights is None else change(targets.weights)
    return Targets(
        features, weights, probe=None if targets.probe is None else change(targets.probe)
    )


def _taken(targets: Targets, rows: Tensor) -> Targets:
    """The samples ``rows``."""
    return _rows(targets, lambda v: v[rows])


def _rows(targets: Targets, change: Callable[[Tensor], Tensor]) -> Targets:
    """``change`` applied to whatever has a row for each sample; weights (L,) are of all samples."""
    return _mapped(targets, lambda v: v if v is targets.weights and v.ndim == 1 else change(v))
