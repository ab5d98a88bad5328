"""What every student backbone is: a network whose forward returns its named stages.

Shape letters: N images, C,H,W image, C_s,H_s,W_s the map of stage s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """A network that returns the feature map of each of its stages.

    The last stage is the default feature. Subclasses define `forward`.

    Args:
        channels: width C_s of every stage, in the order of the forward pass.

    Attributes:
        stages: stage names, shallow to deep.
        channels: width C_s by stage name.
    """

    stages: tuple[str, ...]
    channels: dict[str, int]

    def __init__(self, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.stages = tuple(channels)
        self.channels = dict(channels)

    @property
    def feature_channels(self) -> int:
        """Width of the default feature, the last stage."""
        return self.channels[self.stages[-1]]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return every stage's map.

        Args:
            images: (N, C, H, W) float.

        Returns:
            Stage name to (N, C_s, H_s, W_s), shallow to deep.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward.")


class SequentialBackbone(Backbone):
    """A backbone whose modules run one after the other, some of them being stages.

    The modules keep the paths they are given, so that a backbone taken from a published network
    keeps that network's `state_dict` keys.

    Args:
        modules: path, such as "conv1" or "features.3", to module, in the order of the forward pass.
        channels: width by path, for those modules whose output is a stage.
    """

    def __init__(self, modules: Mapping[str, nn.Module], channels: Mapping[str, int]) -> None:
        super().__init__(channels)
        self.paths = tuple(modules)
        for path, module in modules.items():
            *parents, name = path.split(".")
            owner: nn.Module = self
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            owner.add_module(name, module)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        features: dict[str, Tensor] = {}
        x = images
        for path in self.paths:
            x = self.get_submodule(path)(x)
            if path in self.channels:
                features[path] = x
        return features


def conv_bn_relu(
    in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1
) -> nn.Sequential:
    """A convolution that keeps the map's size but for its stride, a batch norm, and a ReLU."""
    padding = kernel_size // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def he_init(module: nn.Module) -> nn.Module:
    """Initialise convolutions and batch norms as residual networks do; other modules are left.

    Convolution weights are drawn from N(0, 2 / (k^2 C_out)) (arXiv:1502.01852, fan-out form), which
    keeps the scale of the gradients from layer to layer; a batch norm starts as the identity.

    Returns:
        The same module.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    return module


@torch.no_grad()
def probe(network: nn.Module, in_channels: int, image_size: int) -> Any:
    """Run one zero image through the network and return what comes out.

    Runs in evaluation mode, so that neither the batch statistics nor the random state change.

    Args:
        network: any network of images (N, C, H, W).
        in_channels: C.
        image_size: H and W.
    """
    modes = {module: module.training for module in network.modules()}
    parameter = next(network.parameters())
    image = torch.zeros(
        1, in_channels, image_size, image_size, device=parameter.device, dtype=parameter.dtype
    )
    network.eval()
    try:
        return network(image)
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_image_size(backbone: Backbone, name: str, in_channels: int, image_size: int) -> None:
    """Refuse an image size that the backbone cannot take.

    Two cases count: the forward pass fails, or a strided layer meets a map smaller than its
    stride, where it would see mostly padding and the stages behind it would be 1x1 in name only.

    Raises:
        ValueError: the image size does not fit the backbone.
    """
    with ExitStack() as hooks:
        for path, module in backbone.named_modules():
            if (stride := _stride(module)) > 1:
                hook = module.register_forward_pre_hook(_refuse_collapse(path, stride))
                hooks.callback(hook.remove)
        try:
            features: dict[str, Tensor] = probe(backbone, in_channels, image_size)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"Student '{name}' cannot take {image_size}x{image_size} images "
                f"with {in_channels} channel(s): {reason.rstrip('.')}."
            ) from error
    found = {stage: feature.shape[1] for stage, feature in features.items()}
    if found != backbone.channels:
        raise ValueError(f"Student '{name}' states widths {backbone.channels} but has {found}.")


def _stride(module: nn.Module) -> int:
    if not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return 1
    stride = module.stride
    return max(stride) if isinstance(stride, tuple) else int(stride)


def _refuse_collapse(path: str, stride: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        height, width = args[0].shape[-2:]
        if min(height, width) < stride:
            raise ValueError(
                f"the map is only {height}x{width} before '{path}', which has stride {stride}, "
                "so use larger images or a student with fewer strides"
            )

    return hook
