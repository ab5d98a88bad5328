"""Crops and flips are drawn for each image, and mixtures keep what they mix."""

from __future__ import annotations

import torch

from repfusion_env.noise import own_randomness
from repfusion_env.stage2 import FinetuneConfig
from repfusion_env.stage2.augmentation import augment, mixer, resized_crops, shifts

# Every pixel of an image tells its place: row in one channel, column in the other.
PLACES = torch.stack(
    torch.meshgrid(torch.linspace(0, 1, 12), torch.linspace(0, 1, 12), indexing="ij")
).expand(64, 2, 12, 12)


def test_shifted_images_are_the_image_moved_over_black():
    with own_randomness(0):
        moved = shifts(PLACES, 3)
    seen = set()
    for image in moved:
        inside = (image != -1).all(0).nonzero()
        row, column = inside[0].tolist()
        source_row, source_column = (image[:, row, column] * 11).round().int().tolist()
        down, right = row - source_row, column - source_column
        expected = torch.full((2, 12, 12), -1.0)
        rows = slice(max(down, 0), 12 + min(down, 0))
        columns = slice(max(right, 0), 12 + min(right, 0))
        back = (slice(max(-down, 0), 12 - max(down, 0)), slice(max(-right, 0), 12 - max(right, 0)))
        expected[:, rows, columns] = PLACES[0][:, back[0], back[1]]
        assert torch.equal(image, expected)
        seen.add((down, right))
    assert len(seen) > 20
    assert {down for down, _ in seen} == set(range(-3, 4))


def test_about_half_of_the_images_are_mirrored():
    with own_randomness(0):
        images = augment(PLACES, FinetuneConfig(flip=True))
    mirrored = [torch.equal(image, PLACES[0].flip(-1)) for image in images]
    kept = [torch.equal(image, PLACES[0]) for image in images]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 20 < sum(mirrored) < 44


def test_a_resized_crop_is_a_box_inside_of_the_image():
    with own_randomness(0):
        images = resized_crops(PLACES, 0.25)
    height = images[:, 0].amax((1, 2)) - images[:, 0].amin((1, 2))
    width = images[:, 1].amax((1, 2)) - images[:, 1].amin((1, 2))
    assert images.min() >= 0
    assert images.max() <= 1
    # Rows and columns still rise evenly: a box was taken, nothing was turned.
    assert (images[:, 0].diff(dim=1) >= -1e-6).all()
    assert (images[:, 1].diff(dim=2) >= -1e-6).all()
    area = height * width
    assert area.min() > 0.1
    assert area.max() > 0.6
    assert area.std() > 0.1
    ratio = width / height
    assert (ratio.min() > 0.6) & (ratio.max() < 1.6)


def test_nothing_is_changed_where_nothing_is_asked_for():
    assert torch.equal(augment(PLACES, FinetuneConfig()), PLACES)
    assert mixer(FinetuneConfig(), 10) is None


def test_mixed_targets_are_the_shares_of_the_mixed_images():
    # Images of one colour each, so that a mixture's mean tells how much of which image is in it.
    labels = torch.arange(8)
    images = labels.float()[:, None, None, None].expand(8, 1, 16, 16)
    for settings in ({"mixup": 1.0}, {"cutmix": 1.0}):
        mix = mixer(FinetuneConfig(**settings), 8)
        with own_randomness(1):
            mixed, targets = mix(images, labels)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        assert torch.allclose(mixed.mean((1, 2, 3)), targets @ labels.float(), atol=1e-4)
        assert not torch.equal(mixed, images)
