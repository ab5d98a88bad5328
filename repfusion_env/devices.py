"""Which device a configuration means, and processes that a CUDA device does not survive."""

from __future__ import annotations

import os

import torch


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>`` means on this machine.

    Raises:
        ValueError: A CUDA device is asked for that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"device: '{name}' given, but this machine has {count} usable CUDA devices; "
                "allowed here: auto, cpu" + "".join(f", cuda:{i}" for i in range(count))
            )
        device = torch.device("cuda", device.index or 0)
    return device


def refuse_fork(device: torch.device, pid: int) -> None:
    """Say at once that a CUDA trainer has been carried into another process."""
    if device.type == "cuda" and os.getpid() != pid:
        raise RuntimeError(
            "this environment's CUDA trainer was made in another process; CUDA does not survive a "
            "fork, so use lanes (num_envs) instead of worker processes"
        )
