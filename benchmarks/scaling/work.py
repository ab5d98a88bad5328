"""The work of a network, operation by operation: arithmetic and memory traffic, counted.

Networks run on the meta device, which costs neither memory nor arithmetic. Every operation is
counted twice, at two batch sizes, so that what grows with the images (activations) is told from
what does not (weights).

Shape letters: B images, H heads, L and S tokens, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BATCHES = (2, 3)
# Fresh memory and another view of old memory move nothing.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")


@dataclass(frozen=True)
class Operation:
    """One call of one kernel.

    Attributes:
        name: Of the operator.
        flops: Floating-point operations per image, two to a multiply-add.
        elements: Numbers that are read and written per image.
        fixed: Those that are read and written once per batch: weights and their gradients.
        pointwise: Whether a compiler can make it part of its neighbour, so that it moves nothing.
    """

    name: str
    flops: float
    elements: float
    fixed: float
    pointwise: bool

    @property
    def convolution(self) -> bool:
        """Whether it is one, or its backward."""
        return self.name.startswith("convolution")


@dataclass(frozen=True)
class Work:
    """What a network does for a batch.

    Attributes:
        operations: In their order.
        kept: Numbers per image that the forward keeps for its backward.
    """

    operations: tuple[Operation, ...]
    kept: float = 0.0

    @property
    def flops(self) -> float:
        """Per image."""
        return sum(operation.flops for operation in self.operations)

    @property
    def elements(self) -> float:
        """Read and written per image, with no operation made part of another."""
        return sum(operation.elements for operation in self.operations)

    @property
    def fused_elements(self) -> float:
        """Read and written per image, with every pointwise operation made part of another."""
        return sum(operation.elements for operation in self.operations if not operation.pointwise)

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(self.operations + other.operations, self.kept + other.kept)


def count(run: Callable[[int], object]) -> Work:
    """Count what ``run`` does.

    Args:
        run: Does the work on the meta device for so many images; the same operations for any.

    Raises:
        ValueError: The operations differ between two batch sizes.
    """
    few, many = (_record(run, batch) for batch in BATCHES)
    names = [[call.name for call in calls] for calls, _ in (few, many)]
    if names[0] != names[1]:
        raise ValueError(
            f"the network runs {len(names[0])} operations for {BATCHES[0]} images and "
            f"{len(names[1])} others for {BATCHES[1]}; its work cannot be told per image"
        )
    operations = []
    for a, b in zip(few[0], many[0], strict=True):
        elements = _slope(a.elements, b.elements)
        operations.append(
            Operation(
                name=a.name,
                flops=_slope(a.flops, b.flops),
                elements=elements,
                fixed=a.elements - BATCHES[0] * elements,
                pointwise=a.pointwise,
            )
        )
    return Work(tuple(operations), _slope(few[1], many[1]))


@dataclass(frozen=True)
class _Call:
    name: str
    flops: float
    elements: float
    pointwise: bool


def _slope(few: float, many: float) -> float:
    return (many - few) / (BATCHES[1] - BATCHES[0])


def _record(run: Callable[[int], object], batch: int) -> tuple[list[_Call], float]:
    calls: list[_Call] = []
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # By storage: a tensor that two operations keep takes memory once.
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        _Kernels(calls),
        _Attention(calls),
    ):
        run(batch)
    return calls, float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 4)


class _Kernels(TorchDispatchMode):
    """Notes every operation that reads or writes numbers."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if not func.is_view and packet.__name__ not in FREE:
            flops = (
                flop_registry[packet](*args, **kwargs, out_val=result)
                if (packet in flop_registry)
                else 0
            )
            moved = _elements((args, kwargs)) + _elements(result)
            pointwise = torch.Tag.pointwise in func.tags
            self.calls.append(_Call(packet.__name__, float(flops), float(moved), pointwise))
        return result


class _Attention(TorchFunctionMode):
    """Counts attention as the one kernel it is on an accelerator, without its L x S scores.

    The meta device would take it apart, and its scores would count as traffic.
    """

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = (given[name] for name in ("query", "key", "value"))
        *lead, tokens, width = query.shape  # (B, H, L, E)
        flops = 2 * torch.Size(lead).numel() * tokens * key.shape[-2] * (width + value.shape[-1])
        result = query.new_empty(*lead, tokens, value.shape[-1])
        moved = _elements((query, key, value, result))
        self.calls.append(_Call("attention", float(flops), float(moved), False))
        return result


def _elements(given: Any) -> int:
    leaves: Iterable[Any] = tree_leaves(given)
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
