from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from repfusion_env.config import DataConfig
from repfusion_env.data import ImageBank, load_data
from repfusion_env.data.splits import recolor, resize, split


def test_digits_are_1400_to_397_grey_images_of_16x16():
    train, heldout = load_data(DataConfig())
    assert (len(train), len(heldout)) == (1400, 397)
    assert train.shape == heldout.shape == (1, 16, 16)
    assert train.classes == tuple("0123456789")


def test_digits_hold_each_of_scikit_learns_images_once():
    train, heldout = load_data(DataConfig())
    # Averaged over 2x2 pixels, an upsampled image is nearer to its original than any other is.
    ours = torch.cat([train.images, heldout.images]).float()
    labels = torch.cat([train.labels, heldout.labels]).numpy()
    small = torch.nn.functional.avg_pool2d(ours, 2).flatten(1)
    theirs = torch.from_numpy(load_digits().images).float().flatten(1) * 255 / 16
    nearest = torch.cdist(theirs, small).argmin(1)
    assert len(set(nearest.tolist())) >= len(theirs) - 5  # a few originals are nearly equal
    assert np.array_equal(labels[nearest.numpy()], load_digits().target)


def test_digits_are_upsampled_bilinearly():
    train, _ = load_data(DataConfig(train_limit=1))
    ids, _ = split(1797, train=1400)
    source = load_digits().images[int(ids[0])]  # float64, (8, 8)
    at = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)  # pixel centres of the large image
    low = np.minimum(at.astype(int), 6)
    weight = at - low
    rows = source[low] * (1 - weight)[:, None] + source[low + 1] * weight[:, None]
    both = rows[:, low] * (1 - weight) + rows[:, low + 1] * weight
    assert np.abs(train.images[0, 0].numpy() - both * 255 / 16).max() <= 0.5 + 1e-4


def test_the_split_depends_on_no_seed_and_touches_no_random_state():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = load_data(DataConfig())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, _ = load_data(DataConfig())
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("count", [2, 3, 10, 1797])
def test_a_split_uses_every_image_once_and_holds_out_a_fifth(count):
    train, heldout = split(count)
    assert sorted([*train.tolist(), *heldout.tolist()]) == list(range(count))
    assert len(heldout) == max(1, count - round(0.8 * count))


def test_limits_take_the_first_images():
    train, heldout = load_data(DataConfig(train_limit=10, heldout_limit=7))
    whole, _ = load_data(DataConfig())
    assert (len(train), len(heldout)) == (10, 7)
    assert torch.equal(train.images, whole.images[:10])


def test_image_size_resizes_both_banks():
    train, heldout = load_data(DataConfig(image_size=8, train_limit=3))
    assert train.shape == heldout.shape == (1, 8, 8)
    # Halving with antialiasing loses no brightness: means agree, as with no cropping or padding.
    whole, _ = load_data(DataConfig(train_limit=3))
    assert abs(float(train.images.float().mean() - whole.images.float().mean())) < 2


def test_channels_turn_grey_into_rgb_and_back():
    grey, _ = load_data(DataConfig(train_limit=3))
    rgb, heldout = load_data(DataConfig(train_limit=3, channels=3))
    assert rgb.shape == heldout.shape == (3, 16, 16)
    assert all(torch.equal(rgb.images[:, channel], grey.images[:, 0]) for channel in range(3))
    assert (recolor(rgb.images, 1).int() - grey.images.int()).abs().max() <= 1
    red = torch.tensor([100, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert abs(int(recolor(red, 1)) - 29.9) <= 1  # BT.601
    with pytest.raises(ValueError, match="images with 4 channels cannot become 3"):
        recolor(torch.zeros(1, 4, 2, 2, dtype=torch.uint8), 3)


def test_resizing_keeps_proportions_and_cuts_the_middle():
    wide = torch.zeros(1, 8, 24, dtype=torch.uint8)
    wide[..., 8:16] = 200
    assert torch.equal(resize(wide, 8), torch.full((1, 8, 8), 200, dtype=torch.uint8))


def test_an_unknown_name_is_answered_with_the_closest():
    with pytest.raises(ValueError, match=r"unknown data set 'digit'\. Did you mean 'digits'\?"):
        load_data(DataConfig(name="digit"))


def own_loader(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    bank = ImageBank("own", torch.ones(4, 1, 2, 2).byte(), torch.zeros(4).long(), ("x",))
    return bank, bank.head(2)


def broken_loader(config: DataConfig) -> list[int]:
    return [1, 2]


def uneven_loader(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    other = ImageBank("own", torch.ones(4, 1, 2, 3).byte(), torch.zeros(4).long(), ("x",))
    return own_loader(config)[0], other


def test_a_loader_of_ones_own_is_used_and_checked():
    train, heldout = load_data(DataConfig(name=f"{__name__}:own_loader"))
    assert (train.name, len(train), len(heldout)) == ("own", 4, 2)
    with pytest.raises(TypeError, match="must return two ImageBanks"):
        load_data(DataConfig(name=f"{__name__}:broken_loader"))
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) .* \(1, 2, 3\)"):
        load_data(DataConfig(name=f"{__name__}:uneven_loader"))
