"""Buffers of a network (running statistics of batch norms), kept in case a step is skipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def snapshot_buffers(network: nn.Module) -> list[Tensor]:
    """A copy of all buffers, one flat tensor per dtype: one kernel each, however many there are."""
    return [torch.cat([b.reshape(-1) for b in group]) for group in _groups(network)]


@torch.no_grad()
def restore_buffers(network: nn.Module, snapshot: list[Tensor], where: Tensor) -> None:
    """Bring the buffers back to ``snapshot`` if ``where`` (() bool), without asking the device."""
    for group, before in zip(_groups(network), snapshot, strict=True):
        now = torch.cat([b.reshape(-1) for b in group])
        kept = torch.where(where, before, now).split([b.numel() for b in group])
        torch._foreach_copy_(group, [k.view_as(b) for k, b in zip(kept, group, strict=True)])


def _groups(network: nn.Module) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for buffer in network.buffers():
        groups.setdefault(buffer.dtype, []).append(buffer)
    return list(groups.values())
