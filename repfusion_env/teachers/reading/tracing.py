"""What a network computes, in which order and from which weights, by one forward without data.

The forward runs on the meta device, where it costs neither memory nor arithmetic.

Shape letters: N lanes, F feature width, h,w feature positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Shape = tuple[int, int, int]
ToMap = Callable[[Any, tuple[int, ...]], Tensor | None]


@dataclass(frozen=True)
class Trace:
    """One forward of a network.

    Attributes:
        shapes: (F, h, w) of every module whose output is a map, in the order in which they finish.
        ends: When each of these finishes, counted in finished modules.
        touched: When each parameter or buffer is used first, counted alike.
        sizes: Number of elements of each parameter.
        users: Parameters and buffers that each module itself uses, by its path ("" is the network);
            under None what is used outside of any module.
    """

    shapes: dict[str, Shape]
    ends: dict[str, int]
    touched: dict[str, int]
    sizes: dict[str, int]
    users: dict[str | None, set[str]]

    @property
    def parameters(self) -> int:
        """Parameters of the whole network."""
        return sum(self.sizes.values())

    def last(self, layers: Iterable[str]) -> str:
        """The one of ``layers`` that finishes last."""
        return max(layers, key=self.ends.__getitem__)

    def cost(self, layers: Iterable[str]) -> int:
        """Parameters that the outputs of ``layers`` depend on."""
        return sum(self.sizes.get(name, 0) for name in self.needed(layers))

    def needed(self, layers: Iterable[str]) -> set[str]:
        """Names of the parameters and buffers that the outputs of ``layers`` depend on."""
        end = self.ends[self.last(layers)]
        return {name for name, first in self.touched.items() if first < end}


def plain_map(output: Any, _input_shape: tuple[int, ...]) -> Tensor | None:
    """The output itself where it is a map (N, F, h, w)."""
    return output if isinstance(output, Tensor) and output.ndim == 4 else None


def trace(
    network: nn.Module,
    run: Callable[[nn.Module], Any],
    to_map: ToMap,
    input_shape: tuple[int, ...],
    device: torch.device | str = "meta",
) -> Trace:
    """Follow one forward.

    Args:
        network: On ``device``.
        run: Runs its forward once on inputs of ``device``.
        to_map: From a module's output and the input's shape to a map, or None where it is none.
        input_shape: Of one input.
        device: Where; the meta device unless the network cannot run there.

    Raises:
        RuntimeError, ValueError: The network cannot take its inputs.
    """
    # Held until the end: a module that a forward throws away would leave the address of its weight
    # to another tensor.
    tensors = [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]
    # Several names where modules share a weight.
    names: dict[int, list[str]] = {}
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    shapes: dict[str, Shape] = {}
    ends: dict[str, int] = {}
    touched: dict[str, int] = {}
    users: dict[str | None, set[str]] = {}
    running: list[str] = []
    finished = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            # Looking at a weight's dtype or shape is no use of its values; `.T` or `.data` is.
            looks = getattr(function, "__name__", "") == "__get__"
            if not looks or isinstance(result, Tensor):
                touch((args, kwargs))
            return result

    def touch(given: Any) -> None:
        for leaf in tree_leaves(given):
            if isinstance(leaf, Tensor):
                for name in names.get(id(leaf), ()):
                    touched.setdefault(name, finished)
                    users.setdefault(running[-1] if running else None, set()).add(name)

    def start(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, *given: Any) -> None:
            # A weight that is handed to another module has been taken by its caller.
            touch(given)
            running.append(name)

        return hook

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal finished
            running.pop()
            if not name:
                return
            finished += 1
            result = to_map(output, input_shape)
            if name in ends:
                again.add(name)
            ends[name] = finished
            # Of one image: more than one lane are windows or other pieces of it.
            if result is not None and len(result) == 1:
                shapes[name] = (result.shape[1], result.shape[2], result.shape[3])

        return hook

    again: set[str] = set()
    handles = [
        handle
        for name, module in network.named_modules()
        for handle in (
            module.register_forward_pre_hook(start(name), with_kwargs=True),
            module.register_forward_hook(note(name)),
        )
    ]
    try:
        with torch.inference_mode(), torch.device(device), Watch():
            run(network)
    finally:
        for handle in handles:
            handle.remove()
    # Which call of a module that runs several times would be meant?
    once = [name for name in shapes if name not in again]
    return Trace(
        {name: shapes[name] for name in once},
        {name: ends[name] for name in once},
        touched,
        sizes,
        users,
    )
