"""Exported students: a folder with ``model.safetensors`` and ``config.json``, no other package.

from students import load_backbone
backbone = load_backbone("FOLDER")
maps = backbone(images)  # images (N, C, H, W) in [-1, 1]; maps by stage name
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from students.backbone import Backbone
from students.registry import build_backbone

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def load_backbone(folder: str | Path, *, own_code: bool = False) -> Backbone:
    """Load an exported student.

    Args:
        folder: What ``python -m repfusion_env.export`` wrote.
        own_code: Whether ``config.json`` may name a builder outside of this package
            (``module:function``), which is then imported and run. Only for folders that you trust.

    Returns:
        The backbone in eval mode, on the CPU. It takes images (N, C, H, W) in [-1, 1] of the size
        in ``config.json`` and gives the map of each stage by its name; the last one is the feature.

    Raises:
        ValueError: A file is missing or damaged, the weights are of another network, or the
            student is code of one's own and ``own_code`` is off.
    """
    folder = Path(folder)
    config = read_config(folder)
    if ":" in config["student"] and not own_code:
        raise ValueError(
            f"'{folder / CONFIG}' names code of its own, '{config['student']}'; loading runs it, "
            "so it takes own_code=True, if you trust the folder"
        )
    # Weights are drawn and then replaced; the caller's random numbers go on as they would have.
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(
            config["student"], in_channels=config["in_channels"], image_size=config["image_size"]
        )
    path = folder / WEIGHTS
    try:
        backbone.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"'{path}' cannot be read: {_reason(error)}") from error
    except RuntimeError as error:
        raise ValueError(
            f"'{path}' does not hold the weights of '{config['student']}': {_reason(error)}"
        ) from error
    return backbone.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of an exported student, checked."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"'{folder}' is no exported student: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' cannot be read: {_reason(error)}") from error
    kinds = {"student": str, "in_channels": int, "image_size": int}
    for key, kind in kinds.items():
        if not isinstance(config, dict) or type(config.get(key)) is not kind:
            raise ValueError(f"'{path}' does not say '{key}' ({kind.__name__})")
    return dict(config)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
