"""Trained classifiers of pixels on disk."""

from __future__ import annotations

from pathlib import Path

from repfusion_env.atomic import atomic_file
from repfusion_env.tasks.pixel_probing.ensemble import PixelClassifier


def save_member(member: PixelClassifier, path: Path, key: str) -> None:
    """Write a classifier atomically, marked with what it was trained from."""
    from safetensors.torch import save

    tensors = {name: value.contiguous() for name, value in member.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(save(tensors, metadata={"key": key}))


def load_member(path: Path, key: str, classes: int) -> PixelClassifier | None:
    """What an earlier command left at ``path``, in eval mode on the CPU.

    Args:
        path: A file of :func:`save_member`.
        key: What it must have been trained from.
        classes: K.

    Returns:
        None unless the file is there, whole and of this ``key``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        member = PixelClassifier(tensors["first.weight"].shape[1], classes)
        member.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError, KeyError):
        return None
    return member.eval().requires_grad_(False)
