"""Any network of timm that gives feature maps as a student, "timm/<name>"."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from students.backbone import Backbone


class TimmBackbone(Backbone):
    """A timm network in its `features_only` form.

    Args:
        network: the network; its forward returns a list of maps.
        channels: width by stage name, in the order of that list.
        channels_last: whether the maps come as (N, H, W, C).
    """

    def __init__(self, network: nn.Module, channels: dict[str, int], channels_last: bool) -> None:
        super().__init__(channels)
        self.network = network
        self.channels_last = channels_last

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        maps: list[Tensor] = self.network(images)
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return dict(zip(self.stages, maps, strict=True))


def timm_names() -> list[str]:
    """Names of timm's networks, without prefix and without the tags of the weights."""
    import timm

    names: list[str] = timm.list_models()
    return names


def build_timm(name: str, in_channels: int, image_size: int, pretrained: bool) -> Backbone:
    """Build a timm network as a backbone.

    The stages are those that timm's `features_only` returns, under its module names; of networks
    with one resolution (vision transformers) these are the last three blocks.

    Args:
        name: a name that `timm.create_model` knows, with or without a tag of weights.
        in_channels: C.
        image_size: H and W; given to the networks that are built for one size.
        pretrained: whether to load weights.

    Raises:
        ValueError: timm gives no feature maps of this network.
    """
    try:
        network = _create(name, in_channels, image_size, pretrained)
    except (RuntimeError, AttributeError, AssertionError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"'timm/{name}' cannot be a backbone for {image_size}x{image_size} images: "
            f"{reason.rstrip('.')}."
        ) from error
    info = network.feature_info
    stages: list[str] = info.module_name()
    if len(set(stages)) < len(stages):
        # One module that runs several branches is named once for each of them.
        stages = [f"stage{i}" for i in range(1, len(stages) + 1)]
    channels = dict(zip(stages, info.channels(), strict=True))
    channels_last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
    return TimmBackbone(network, channels, channels_last)


def _create(name: str, in_channels: int, image_size: int, pretrained: bool) -> Any:
    import timm

    arguments: dict[str, Any] = {
        "pretrained": pretrained,
        "features_only": True,
        "in_chans": in_channels,
    }
    try:
        return timm.create_model(name, img_size=image_size, **arguments)
    except TypeError as error:
        # Fully convolutional networks take any size and have no such argument.
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **arguments)
