"""ResNet-18 with the stem for small images, as used on CIFAR."""

from __future__ import annotations

from torch import nn

from students.backbone import Backbone, SequentialBackbone, he_init


def build_resnet18(in_channels: int, image_size: int) -> Backbone:
    """Build ResNet-18 (arXiv:1512.03385) with a 3x3 stem of stride 1 and no max-pool.

    The ImageNet stem divides the image by 4 before the first block, which leaves a 32-pixel image
    1x1 at the last stage; this stem keeps the full resolution, so that the last stage has stride
    8. For large images take "torchvision/resnet18". The `state_dict` keys are torchvision's.

    Args:
        in_channels: C of the images.
        image_size: not used; the network is the same for every size.

    Returns:
        Backbone with stages "layer1" to "layer4" of widths 64, 128, 256 and 512.
    """
    from torchvision.models import resnet18

    network = resnet18(weights=None)
    modules = {
        "conv1": he_init(nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False)),
        "bn1": network.bn1,
        "relu": network.relu,
        "layer1": network.layer1,
        "layer2": network.layer2,
        "layer3": network.layer3,
        "layer4": network.layer4,
    }
    channels = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
    return SequentialBackbone(modules, channels)
