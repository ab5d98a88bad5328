"""Any convolutional classifier of torchvision as a student, "torchvision/<name>".

The stages are found, not listed: one forward pass on an image of reference size shows which
modules the image runs through and where the resolution changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from students.backbone import Backbone, SequentialBackbone, probe

# Large enough for every architecture of the library and for all its strides to show. The stages
# of a backbone thus do not depend on the size of the images it will see.
REFERENCE_SIZE = 224


class _Call(NamedTuple):
    """What one module did in the forward pass of the whole network."""

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor

    @property
    def depth(self) -> int:
        return self.path.count(".")


def torchvision_names() -> list[str]:
    """Names of torchvision's classifiers, without prefix."""
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def build_torchvision(name: str, in_channels: int, image_size: int, pretrained: bool) -> Backbone:
    """Build a torchvision classifier as a backbone.

    The stages carry the module paths of the network, one for each resolution: the outermost
    module that is last to give it. Everything from global pooling on is removed.

    Args:
        name: a name that `torchvision.models.get_model` knows.
        in_channels: C; for other than 3 channels the first convolution is replaced.
        image_size: not used; the network is the same for every size.
        pretrained: whether to load the library's default weights.

    Raises:
        ValueError: the network is no chain of modules on maps (N, C, H, W).
    """
    from torchvision import models

    network: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None)
    if in_channels != 3:
        replace_first_convolution(network, in_channels, pretrained)
    calls = _record_calls(network, in_channels)
    trunk = _find_trunk(network, calls)
    x = calls[""].input
    for call in trunk:
        # The same tensor object: nothing happens between the modules that running them in a row
        # would miss. The image is square, so a map that is not has its channels last.
        shape = call.output.shape
        if call.input is not x or len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(
                f"'torchvision/{name}' is no chain of modules on (N, C, H, W) maps; "
                "take its counterpart 'timm/<name>'."
            )
        x = call.output
    stages = _find_stages(trunk)
    used = trunk[: 1 + [call.path for call in trunk].index(stages[-1].path)]
    return SequentialBackbone(
        {call.path: call.module for call in used},
        {stage.path: stage.output.shape[1] for stage in stages},
    )


def replace_first_convolution(network: nn.Module, in_channels: int, pretrained: bool) -> None:
    path, old = next(
        (path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d)
    )
    geometry: dict[str, Any] = {
        key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation")
    }
    new = nn.Conv2d(in_channels, old.out_channels, bias=old.bias is not None, **geometry)
    with torch.no_grad():
        if pretrained:
            # Sharing out the sum over the colours keeps the response to a grey image as it was.
            new.weight.copy_(old.weight.sum(1, keepdim=True).expand_as(new.weight) / in_channels)
        else:
            # The scale that the network's own initialisation chose.
            new.weight.normal_(std=old.weight.std().item())
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    # GoogLeNet and Inception rescale three colours on their own when pretrained.
    if hasattr(network, "transform_input"):
        setattr(network, "transform_input", False)  # noqa: B010, a plain flag, not a module
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, new)


def _record_calls(network: nn.Module, in_channels: int) -> dict[str, _Call]:
    """Run a reference image and return what every module did, by path."""
    paths = {module: path for path, module in network.named_modules()}
    calls: dict[str, _Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls[paths[module]] = _Call(paths[module], module, args[0], output)

    hooks = [module.register_forward_hook(record) for module in paths]
    try:
        probe(network, in_channels, REFERENCE_SIZE)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _find_trunk(network: nn.Module, calls: dict[str, _Call]) -> list[_Call]:
    """Return the modules that the image passes one after the other, up to global pooling.

    These are the network's own children, with a container that runs its modules in a row and
    spans several resolutions replaced by those modules. The insides of all other modules
    (branches, attention, squeeze-and-excitation) say nothing about stages.
    """
    trunk: list[_Call] = []
    pending = list(network.named_children())
    while pending:
        path, module = pending.pop(0)
        # Global pooling is a module, or a call before the first (N, features) output. SqueezeNet
        # pools after its classifier, which is convolutional.
        pooled = path in calls and calls[path].output.ndim == 2
        if pooled or isinstance(module, nn.AdaptiveAvgPool2d) or path == "classifier":
            break
        children = [(f"{path}.{key}", child) for key, child in module.named_children()]
        resolutions = {calls[child].output.shape[2:] for child, _ in children if child in calls}
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(resolutions) > 1:
            pending = children + pending
        elif path in calls:
            trunk.append(calls[path])
    return trunk


def _find_stages(trunk: list[_Call]) -> list[_Call]:
    """Return the call that ends the stage at each resolution, shallow to deep.

    At one resolution the outermost module wins, then the later: behind a whole stage may come the
    head of a transition, which is not what one means by the stage.
    """
    stages: dict[int, _Call] = {}
    for call in trunk:
        resolution = call.output.shape[2]
        if resolution not in stages or call.depth <= stages[resolution].depth:
            stages[resolution] = call
    return list(stages.values())
