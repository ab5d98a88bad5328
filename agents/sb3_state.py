"""The state of a Stable-Baselines3 model as tensors and plain values.

SB3's own archives hold pickles and leave out what an exact resume needs. This captures networks,
optimizers, counters, the replay buffer and every random state, so that a run's checkpoint holds
nothing that executes when it is loaded.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import recursive_getattr
from torch import Tensor

_ARRAY, _DEQUE = "__array__", "__deque__"


class _NotPlainError(TypeError):
    pass


def capture(model: BaseAlgorithm) -> dict[str, Any]:
    """Everything that training changes in ``model``, fit for a checkpoint."""
    _, variables = model._get_torch_save_params()
    replay = getattr(model, "replay_buffer", None)
    return {
        "parameters": model.get_parameters(),
        "variables": {name: recursive_getattr(model, name).detach() for name in variables},
        "attributes": _plain_items(vars(model)),
        # Figures that SB3 has recorded and not yet handed to its outputs.
        "logged": {
            "values": _plain_items(model.logger.name_to_value),
            "counts": _plain_items(model.logger.name_to_count),
            "excluded": _plain_items(model.logger.name_to_excluded),
        },
        "replay_buffer": None if replay is None else _plain_items(vars(replay)),
        "random": {
            "python": _plain(random.getstate()),
            # SB3 draws from NumPy's global generator, so its state is what must be kept.
            "numpy": _plain(np.random.get_state()),  # noqa: NPY002
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "actions": model.action_space.np_random.bit_generator.state,
        },
    }


def restore(model: BaseAlgorithm, state: dict[str, Any]) -> None:
    """Bring a newly built ``model`` to what :func:`capture` saw."""
    model.set_parameters(state["parameters"], exact_match=True)
    for name, value in state["variables"].items():
        recursive_getattr(model, name).data.copy_(value)
    _set_attributes(model, state["attributes"])
    model.logger.name_to_value.update(state["logged"]["values"])
    model.logger.name_to_count.update(state["logged"]["counts"])
    model.logger.name_to_excluded.update(state["logged"]["excluded"])
    replay = getattr(model, "replay_buffer", None)
    if replay is not None:
        _set_attributes(replay, state["replay_buffer"])
    saved = state["random"]
    version, numbers, gauss = _value(saved["python"])
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(_value(saved["numpy"]))  # noqa: NPY002
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"])
    model.action_space.np_random.bit_generator.state = saved["actions"]
    if model.env is not None:
        # The constructor asked for a seeded reset; the run has had it already.
        model.env._reset_seeds()


def _plain_items(items: Mapping[str, Any]) -> dict[str, Any]:
    """The items that are numbers, text, arrays, tensors or containers of them."""
    found = {}
    for name, value in items.items():
        try:
            found[name] = _plain(value)
        except _NotPlainError:
            continue
    return found


def _set_attributes(holder: Any, state: dict[str, Any]) -> None:
    for name, saved in state.items():
        value = _value(saved)
        present = getattr(holder, name, None)
        if isinstance(present, tuple) and hasattr(present, "_fields"):
            value = type(present)(*value)
        if isinstance(present, np.ndarray) and isinstance(value, np.ndarray):
            value = value.astype(present.dtype, copy=False)
        setattr(holder, name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):  # before float: NumPy's float64 is one
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray) and value.dtype != object:
        # torch has no tensors of every unsigned width; NumPy's generator state is uint32.
        wide = value.astype(np.int64) if value.dtype.kind == "u" and value.itemsize > 1 else value
        return {_ARRAY: torch.from_numpy(np.ascontiguousarray(wide)), "dtype": value.dtype.str}
    if isinstance(value, Tensor) and not value.requires_grad:
        return value.clone()
    if isinstance(value, deque):
        return {_DEQUE: [_plain(item) for item in value], "maxlen": value.maxlen}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise _NotPlainError


def _value(saved: Any) -> Any:
    if isinstance(saved, dict) and _ARRAY in saved:
        return saved[_ARRAY].numpy().astype(np.dtype(saved["dtype"]))
    if isinstance(saved, dict) and _DEQUE in saved:
        return deque((_value(item) for item in saved[_DEQUE]), maxlen=saved["maxlen"])
    if isinstance(saved, dict):
        return {key: _value(item) for key, item in saved.items()}
    if isinstance(saved, tuple):
        return tuple(_value(item) for item in saved)
    if isinstance(saved, list):
        return [_value(item) for item in saved]
    return saved
