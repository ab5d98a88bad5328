"""torch.compile of what a step runs: parts of the teacher, and the student's backbone.

A network is compiled for the number of images that a step gives it. At every other number
(statistics, evaluation, probes) it runs as it always did, so that nothing is compiled for the sake
of a single forward. Names of modules, ``state_dict``s and copies know nothing of all this.

Shape letters: N images, C,H,W image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

BACKEND = "inductor"
# Reasons why a compiler failed in this process.
_told: set[str] = set()


class CompiledForward:
    """A forward that is compiled, until the compiler fails: then the plain one, with one warning.

    Args:
        forward: The plain one.
        cuda_graphs: Replay it as CUDA graphs.
    """

    def __init__(self, forward: Callable[..., Any], *, cuda_graphs: bool) -> None:
        self.plain = forward
        self._run: Callable[..., Any] | None = torch.compile(
            forward,
            backend=BACKEND,
            dynamic=False,
            mode="reduce-overhead" if cuda_graphs else None,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward's result, compiled where that works."""
        if self._run is None:
            return self.plain(*args, **kwargs)
        try:
            return self._run(*args, **kwargs)
        except Exception as error:
            # Whatever a missing compiler, or one that does not know the network, raises. What is
            # wrong with the inputs is wrong with the plain forward too, and is told by it.
            self._run = None
            result = self.plain(*args, **kwargs)
            _tell(error)
            return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Of a copied network the plain forward: the compiled one would run the original."""
        return deepcopy(self.plain, memo)


def _tell(error: Exception) -> None:
    """Warn of a compiler that fails, once however many parts it fails on."""
    cause = getattr(error, "inner_exception", error)
    reason = str(cause).strip().partition("\n")[0].rstrip(".") or type(cause).__name__
    if reason in _told:
        return
    _told.add(reason)
    warnings.warn(
        f"speed.compile: the compiler fails here ({reason}); what it cannot compile runs as it is, "
        "which gives the same results more slowly",
        stacklevel=3,
    )


class CompiledRegions:
    """Compiled forwards of the largest parts of a network that hold none of its taps.

    What is tapped, and what holds something tapped, runs as it always did: hooks are called there,
    and a forward that ends at a tap runs the same compiled parts as one that goes on.

    Args:
        network: Frozen; its own parts get the forwards.
        taps: Paths of the modules that are read.
        cuda_graphs: Replay them as CUDA graphs.

    Attributes:
        sizes: Numbers N of images for which they are used.
        paths: Of the parts.
    """

    def __init__(self, network: nn.Module, taps: Iterable[str], *, cuda_graphs: bool) -> None:
        self.sizes: frozenset[int] = frozenset()
        self.cuda_graphs = cuda_graphs
        self.used = False
        # A module in several places has one forward.
        found = {module: path for path, module in regions(network, frozenset(taps))}
        self.paths, self._modules = tuple(found.values()), list(found)
        for module in self._modules:
            # On the module itself, not a module around it, which would change all names.
            module.forward = _Region(  # type: ignore[assignment]
                self, CompiledForward(module.forward, cuda_graphs=cuda_graphs)
            )

    @contextmanager
    def at(self, count: int) -> Iterator[None]:
        """Around a forward of ``count`` images; what earlier ones gave has been copied."""
        self.used = count in self.sizes
        if self.used and self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            yield
        finally:
            self.used = False

    def remove(self) -> None:
        """Let the parts run as they are."""
        for module in self._modules:
            del module.forward


class _Region:
    """The forward of one part."""

    def __init__(self, regions: CompiledRegions, forward: CompiledForward) -> None:
        self._regions, self._forward = regions, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._regions.used:
            return self._forward(*args, **kwargs)
        return self._forward.plain(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self._forward, memo)


def regions(network: nn.Module, taps: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules, by path, that run by themselves and hold no tap.

    A module without parts of its own is one operation, in which there is nothing to fuse.
    """
    # Not by their paths: a module may stand in several places.
    tapped = {network.get_submodule(tap) for tap in taps}

    def below(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        held = not path or not tapped.isdisjoint(module.modules())
        # Lists of modules are never called themselves.
        if held or type(module).forward is nn.Module.forward:
            for name, child in module.named_children():
                yield from below(f"{path}.{name}" if path else name, child)
        elif any(True for _ in module.children()):
            yield path, module

    yield from below("", network)


class CompiledBackbone:
    """A student's backbone, compiled for the step's batch; a copy of the student has none.

    Args:
        backbone: From images (N, C, H, W) to its stages' maps by name.
        sizes: Numbers N of images for which it is used.
        cuda_graphs: Replay it as CUDA graphs.
    """

    def __init__(self, backbone: nn.Module, sizes: Iterable[int], *, cuda_graphs: bool) -> None:
        self.sizes, self._cuda_graphs = frozenset(sizes), cuda_graphs
        self._forward = CompiledForward(backbone, cuda_graphs=cuda_graphs)

    def __call__(self, images: Tensor) -> Any:
        """The maps by stage name."""
        if len(images) not in self.sizes:
            return self._forward.plain(images)
        if self._cuda_graphs and torch.is_grad_enabled():
            # A training forward comes; nobody reads what earlier forwards gave any more.
            torch.compiler.cudagraph_mark_step_begin()
        return self._forward(images)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None
