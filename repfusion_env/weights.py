"""Weights of trained networks, as safetensors."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import nn

from repfusion_env.atomic import atomic_file


def save_weights(module: nn.Module, path: str | Path) -> None:
    """Write all parameters and buffers of ``module`` as safetensors, atomically.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    # Cloned, because the format refuses tensors that share memory, as SB3's extractors do.
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in module.state_dict().items()
    }
    with atomic_file(path) as file:
        file.write(save(tensors))
