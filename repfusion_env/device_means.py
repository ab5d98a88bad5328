"""Means that are kept on the device and read by the host only at logging points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repfusion_env.ranks import ALONE, Ranks


class DeviceMeans:
    """Running sums of per-lane values; :meth:`drain` is the only host synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add the elements of ``values`` (any shape) to the mean called ``name``."""
        total = values.detach().sum(dtype=torch.float64)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def drain(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """The means since the last call over the lanes of all ranks; starts anew."""
        if not self._sums:
            return {}
        sums, counts = self._totals(ranks)
        values = torch.stack(list(sums.values())).tolist()
        means = {name: s / counts[name] for name, s in zip(sums, values, strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self, ranks: Ranks = ALONE) -> dict[str, Any]:
        """Sums and counts of all ranks, for an exact resume between two logging points."""
        sums, counts = self._totals(ranks)
        return {"sums": sums, "counts": counts}

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks = ALONE) -> None:
        """Restore what :meth:`state_dict` gave; rank 0 keeps it for all."""
        mine = int(ranks.main)
        self._sums = {name: value.to(self._device) * mine for name, value in state["sums"].items()}
        self._counts = {name: count * mine for name, count in state["counts"].items()}

    def _totals(self, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, int]]:
        if not ranks.several or not self._sums:
            return dict(self._sums), dict(self._counts)
        counted = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        both = torch.stack((torch.stack(list(self._sums.values())), counted.to(self._device)))
        ranks.sum_([both])
        counts = [round(count) for count in both[1].tolist()]
        names = list(self._sums)
        return dict(zip(names, both[0], strict=True)), dict(zip(names, counts, strict=True))
