"""Reading weights from files, only those that are needed, and refusing files of another network.

No file can run code: safetensors hold none, and pickles are read with ``weights_only``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.teachers.base import TeacherError

Rename = Callable[[str], str]
# Folders of a pipeline whose files of weights have one name.
COMPONENTS = ("transformer", "unet", "vae")


def unchanged(name: str) -> str:
    """The name in the file is the network's own."""
    return name


class WeightFiles:
    """Tensors by name, read one at a time, from safetensors or pickled files.

    Args:
        model: The teacher's name, for the messages.
        paths: One file, or all shards.
        rename: From a name in the file to the network's; an empty name leaves a tensor out.

    Raises:
        TeacherError: A file is damaged or not what its name says.
    """

    # What follows where names or shapes are not the network's.
    misfit = "so it belongs to another config.json"

    def __init__(self, model: str, paths: list[Path], rename: Rename = unchanged) -> None:
        self.model = model
        self.label = _label(paths[0]) + ("" if len(paths) == 1 else " (and other shards)")
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            try:
                self._open(path, rename)
            except TeacherError:
                raise
            except Exception as error:
                # safetensors, pickle and zipfile raise kinds of their own.
                raise TeacherError(
                    f"teacher '{model}': {_label(path)} is damaged or not what its name says"
                ) from error

    def _open(self, path: Path, rename: Rename) -> None:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            file: Any = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
                name = rename(key)
                if name:
                    self.shapes[name] = tuple(file.get_slice(key).get_shape())
                    self._readers[name] = partial(file.get_tensor, key)
            return
        content = _unpickled(path)
        for key, value in content.items():
            name = rename(str(key))
            if name and isinstance(value, Tensor):
                self.shapes[name] = tuple(value.shape)
                self._readers[name] = partial(_same, value)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse files that are not exactly those of a network.

        Args:
            expected: Shape of each of the network's parameters and saved buffers.

        Raises:
            TeacherError: Naming what is missing, unexpected or of another shape.
        """
        names = self.shapes.keys()
        wrong = [name for name in names & expected.keys() if self.shapes[name] != expected[name]]
        for verb, found in (
            ("lacks", expected.keys() - names),
            ("has the unknown", names - expected.keys()),
            ("has a wrong shape of", wrong),
        ):
            if found:
                listed = sorted(found)
                more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
                raise TeacherError(
                    f"teacher '{self.model}': {self.label} {verb} weights "
                    f"{', '.join(listed[:3])}{more}, {self.misfit}"
                )

    def read(self, name: str) -> Tensor:
        """One tensor as it is saved.

        Raises:
            TeacherError: The file is damaged, or its values are not finite.
        """
        try:
            tensor = self._readers[name]()
        except Exception as error:
            raise TeacherError(
                f"teacher '{self.model}': {self.label} is damaged at {name}"
            ) from error
        # A sum is not finite where one of its terms is not, and takes a tenth of the time.
        suspicious = tensor.is_floating_point() and not tensor.sum(dtype=torch.float64).isfinite()
        if suspicious and not tensor.isfinite().all():
            raise TeacherError(
                f"teacher '{self.model}': {self.label} holds values that are not finite in {name}"
            )
        return tensor


def _label(path: Path) -> str:
    folder = path.parent.name
    return f"{folder}/{path.name}" if folder in COMPONENTS else path.name


def _same(value: Tensor) -> Tensor:
    return value


def _unpickled(path: Path) -> Mapping[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of old torch versions cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise TypeError("no mapping of names to tensors")
    return content


def fill(
    network: nn.Module, files: WeightFiles, needed: Iterable[str], dtype: torch.dtype
) -> nn.Module:
    """Give a network on the meta device the weights that are needed, and drop the others.

    Args:
        network: Parameters on the meta device; buffers that no file holds are real.
        files: Checked to be the network's.
        needed: Names of the parameters and buffers to read.
        dtype: Of floating-point parameters; buffers keep theirs.

    Returns:
        The network in inference mode, without gradients; what is not needed is None.
    """
    needed = set(needed)
    for name, parameter in list(network.named_parameters(remove_duplicate=False)):
        owner, leaf = owner_of(network, name)
        if name not in needed:
            # Nothing reaches it, so there is no need of memory for it on any device.
            owner._parameters[leaf] = None
            continue
        value = files.read(name)
        # Batch norms keep float32 statistics, beside which torch takes no weights of less.
        whole = isinstance(owner, nn.modules.batchnorm._BatchNorm)
        kind = torch.float32 if whole else dtype
        value = value.to(kind if parameter.is_floating_point() else value.dtype, copy=True)
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    for name, buffer in list(network.named_buffers(remove_duplicate=False)):
        owner, leaf = owner_of(network, name)
        if name in files.shapes:
            owner._buffers[leaf] = files.read(name).to(buffer.dtype, copy=True)
    return network.eval().requires_grad_(False)


def owner_of(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter or buffer ``name``, and its name there."""
    path, _, leaf = name.rpartition(".")
    return network.get_submodule(path), leaf
