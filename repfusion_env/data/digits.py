"""scikit-learn's handwritten digits: real data that comes with the wheel.

1,797 grey images of 8x8 pixels with values 0..16 (a test set of UCI's "Optical Recognition of
Handwritten Digits", CC BY 4.0), brought to 16x16 so that a small UNet has room to downsample.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.splits import split

SIDE = 16
TRAIN_IMAGES = 1400


def load(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """1,400 training and 397 held-out images, 1x16x16; the split is the same for every seed."""
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1)  # (M, 1, 8, 8), 0..16
    grey = interpolate(grey, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    images = grey.mul(255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    classes = tuple(str(name) for name in digits.target_names)
    train, heldout = (
        ImageBank("digits", images[ids], labels[ids], classes)
        for ids in split(len(images), train=TRAIN_IMAGES)
    )
    return train, heldout
