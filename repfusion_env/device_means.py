"""Means that are kept on the device and read by the host only at logging points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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

    def drain(self) -> dict[str, float]:
        """The means since the last call, in one transfer; starts anew."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()
        means = {name: s / self._counts[name] for name, s in zip(self._sums, sums, strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, for an exact resume between two logging points."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])
