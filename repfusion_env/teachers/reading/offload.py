"""Weights that wait in main memory and visit the device while the module that uses them runs.

Which module uses which weights is what a :class:`~repfusion_env.teachers.reading.tracing.Trace` has
seen, so a module that reaches for a weight of its child without calling that, as many attentions
do, finds it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from repfusion_env.teachers.files.weight_files import owner_of


class CpuOffload:
    """Sends the weights of a network to a device and back, module by module.

    Args:
        network: Whose weights wait; it is moved to the CPU.
        users: Names of the weights that each module itself uses, by the module's path, as
            :attr:`Trace.users` has them.
    """

    def __init__(self, network: nn.Module, users: Mapping[str | None, Set[str]]) -> None:
        self.network, self.users = network.cpu(), users
        self.home = dict(network.named_parameters(remove_duplicate=False))
        self.owners = {name: owner_of(network, name) for name in self.home}
        self.away: set[str] = set()
        self.handles: list[RemovableHandle] = []

    def to(self, device: torch.device | str) -> None:
        """From now on the network runs on ``device``; its buffers stay there."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._pin(torch.device(device))
        self._bring_home(set(self.away))
        for module in self.network.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[leaf] = buffer.to(device)
        # What the forward uses outside of any module stays on the device.
        self._send(self.users.get(None, frozenset()), device)
        for path, names in self.users.items():
            if path is not None:
                self._visit(self.network.get_submodule(path), names, torch.device(device))

    def _visit(self, module: nn.Module, names: Set[str], device: torch.device) -> None:
        sent: list[set[str]] = []

        def send(*_given: Any) -> None:
            sent.append(self._send(names, device))

        def bring_home(*_given: Any) -> None:
            if sent:  # a hook before ours may have failed
                self._bring_home(sent.pop())

        # Also where the forward ends inside, at a tap.
        self.handles.append(module.register_forward_pre_hook(send))
        self.handles.append(module.register_forward_hook(bring_home, always_call=True))

    def _pin(self, device: torch.device) -> None:
        """Lock the weights in main memory, whence a GPU fetches them without the host waiting."""
        if device.type != "cuda":
            return
        for parameter in self.home.values():
            # In a dry run tensors have no memory to lock.
            if type(parameter.data) is torch.Tensor and not parameter.is_pinned():
                parameter.data = parameter.data.pin_memory()

    def _send(self, names: Set[str], device: torch.device | str) -> set[str]:
        """Send those that are at home; returns them."""
        sent = (names & self.home.keys()) - self.away
        for name in sent:
            owner, leaf = self.owners[name]
            owner._parameters[leaf] = nn.Parameter(
                self.home[name].to(device, non_blocking=True), requires_grad=False
            )
        self.away |= sent
        return sent

    def _bring_home(self, names: Set[str]) -> None:
        for name in names:
            owner, leaf = self.owners[name]
            owner._parameters[leaf] = self.home[name]
        self.away -= names
