"""Buffers of networks (running statistics of batch norms), kept in case a step is skipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def snapshot_buffers(*networks: nn.Module) -> list[Tensor]:
    """A copy of all buffers, one flat tensor per dtype: one kernel each, however many there are."""
    return [torch.cat([b.reshape(-1) for b in group]) for group in _groups(networks)]


@torch.no_grad()
def restore_buffers(snapshot: list[Tensor], where: Tensor, *networks: nn.Module) -> None:
    """Bring the buffers back to ``snapshot`` if ``where`` (() bool), without asking the device."""
    for group, before in zip(_groups(networks), snapshot, strict=True):
        now = torch.cat([b.reshape(-1) for b in group])
        kept = torch.where(where, before, now).split([b.numel() for b in group])
        torch._foreach_copy_(group, [k.view_as(b) for k, b in zip(kept, group, strict=True)])


def _groups(networks: tuple[nn.Module, ...]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for network in networks:
        for buffer in network.buffers():
            groups.setdefault(buffer.dtype, []).append(buffer)
    return list(groups.values())
