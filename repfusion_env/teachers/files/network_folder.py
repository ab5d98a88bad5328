"""The folder of a network whose architecture is ours: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as safetensors_bytes
from torch import nn

from repfusion_env.atomic import atomic_file, write_text
from repfusion_env.registry import did_you_mean
from repfusion_env.teachers.base import TeacherError
from repfusion_env.teachers.files.model_files import ModelFiles


def save_network(network: nn.Module, settings: Mapping[str, Any], folder: str | Path) -> None:
    """Write a network as a teacher's folder; each file is there whole or not at all.

    Args:
        network: Whose weights are saved.
        settings: Content of ``config.json``; ``_class_name`` tells the family.
        folder: Made where it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    with atomic_file(folder / "model.safetensors") as file:
        file.write(safetensors_bytes(weights, metadata={"format": "pt"}))
    write_text(folder / "config.json", json.dumps(dict(settings), indent=2) + "\n")


def read_settings(files: ModelFiles, kind: str, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a model's ``config.json`` over defaults.

    Args:
        files: Of the model.
        kind: Its ``_class_name``.
        allowed: Default by name: a number for a positive whole number, a tuple for a list of them
            that may be empty.

    Raises:
        TeacherError: It is another kind of model, or a setting is unknown or makes no sense.
    """
    config = files.config()
    if config.get("_class_name") != kind:
        raise TeacherError(
            f"teacher '{files.model}' is a {config.get('_class_name') or 'model of unknown class'}"
            f", not a {kind}"
        )
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    for name, value in settings.items():
        if name not in allowed:
            raise TeacherError(
                f"teacher '{files.model}': its config.json gives '{name}', which a {kind} does not "
                f"have.{did_you_mean(name, allowed)} Allowed: {', '.join(allowed)}"
            )
        several = isinstance(allowed[name], tuple)
        numbers = value if several and isinstance(value, list) else [value]
        if not all(type(number) is int and number > 0 for number in numbers):
            wanted = "a list of positive whole numbers" if several else "a positive whole number"
            raise TeacherError(
                f"teacher '{files.model}': its config.json gives {name} {value!r}; "
                f"it must be {wanted}"
            )
        if several:
            settings[name] = tuple(numbers)
    return {**allowed, **settings}
