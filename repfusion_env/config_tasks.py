"""What configures dense tasks and augmentation; see :mod:`repfusion_env.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import StrictBool

from repfusion_env.config_fields import Count, Decay, Fraction, NonNegative, Positive, option


@dataclass(frozen=True)
class SegmentationConfig:
    """The task of finding every pixel's class."""

    shorthand: ClassVar[str] = "head"
    head: Literal["linear", "fcn", "lraspp", "deeplabv3"] = option(
        "fcn", "from the student's maps to classes: linear, fcn, lraspp, deeplabv3"
    )
    width: Count = option(64, "channels of the head's hidden layers")
    auxiliary: NonNegative = option(
        0.0, "weight of further heads on the two stages below the last, as in BiSeNetV1; 0: none"
    )


@dataclass(frozen=True)
class LandmarksConfig:
    """The task of finding the same points in every image."""

    shorthand: ClassVar[str] = "head"
    head: Literal["linear", "deconv", "hrnet"] = option(
        "deconv", "from the student's maps to heatmaps: linear, deconv, hrnet (all stages)"
    )
    width: Count = option(64, "channels of the head's hidden layers")
    stride: Count | None = option(
        None,
        "image pixels in a heatmap pixel's side; default: 4, less where heatmaps would be below 32",
    )
    sigma: Positive = option(1.5, "deviation of the heatmaps' peaks, in heatmap pixels")


@dataclass(frozen=True)
class DetectionConfig:
    """The task of finding objects: their boxes and classes."""

    shorthand: ClassVar[str] = "head"
    head: Literal["fcos", "retinanet", "ssdlite"] = option(
        "fcos", "torchvision's detector on the student's maps: fcos, retinanet, ssdlite"
    )
    width: Count = option(64, "channels of the feature pyramid")
    convs: Count = option(4, "hidden convolutions of fcos and retinanet; ssdlite has its one")
    stride: Count | None = option(
        None,
        "image pixels between the positions of the finest grid; default: 4 up to 64-pixel images, "
        "8 in larger ones",
    )


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of an image and of all that is known of it, anew at each visit."""

    shorthand: ClassVar[str] = "flip"
    flip: StrictBool = option(False, "mirror half of the images")
    rotation: NonNegative = option(0.0, "largest rotation either way, in degrees")
    scale: Decay = option(0.0, "largest change of size: 0.25 is a factor in [0.75, 1.25]")
    translation: Fraction = option(0.0, "largest shift, as a part of the image's side")
    jitter: Fraction = option(0.0, "strength of brightness, contrast, saturation and hue; 0: off")
