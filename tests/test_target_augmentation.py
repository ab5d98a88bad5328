from __future__ import annotations

import colorsys
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from repfusion_env.augmentation import Augmentation, make_augmentation
from repfusion_env.config_loading import ConfigError, load_config
from repfusion_env.data.annotations import Boxes, Keypoints, Masks
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.noise import own_randomness

SIDE, COUNT = 48, 64
ALL = {"flip": True, "rotation": 25.0, "scale": 0.2, "translation": 0.1}
FIRST, SECOND = (13.0, 20.0), (31.0, 26.0)  # two points, x and y
BOX = (12.0, 17.0, 33.0, 26.0)


def bank(**annotations: Any) -> ImageBank:
    return ImageBank(
        "drawn",
        torch.zeros(1, 1, SIDE, SIDE, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
        UNLABELLED,
        annotations=annotations,
    )


def points_bank(mirror: tuple[int, ...] | None) -> ImageBank:
    points = torch.tensor([[FIRST, SECOND, (0.0, 0.0)]])
    return bank(keypoints=Keypoints(points, torch.ones(1, 3, dtype=torch.bool), None, mirror))


def masks_bank(mirror: tuple[int, ...] | None = None) -> ImageBank:
    values = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    return bank(masks=Masks(values, ("ground", "left", "right"), mirror))


def boxes_bank() -> ImageBank:
    return bank(boxes=Boxes(torch.tensor([[BOX]]), torch.tensor([[0]]), ("thing",)))


def made(settings: dict[str, Any], images: ImageBank, annotation: str) -> Augmentation:
    config = load_config({f"augmentation.{key}": value for key, value in settings.items()})
    found = make_augmentation(config, images, annotation)
    assert found is not None
    return found


def grid() -> tuple[Tensor, Tensor]:
    """Every pixel's x and y, (H, W) each."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return x.float(), y.float()


def blob(x: float, y: float) -> Tensor:
    """A bell of light, (H, W) in [-1, 1]."""
    across, down = grid()
    return 2 * torch.exp(-((across - x) ** 2 + (down - y) ** 2) / 8) - 1


def centroid(image: Tensor) -> Tensor:
    """The middle of the light as x and y, (2,)."""
    light, (x, y) = image + 1, grid()
    return torch.stack(((light * x).sum(), (light * y).sum())) / light.sum()


def seen(augmentation: Augmentation, image: Tensor, target: Tensor, seed: int = 0) -> Any:
    """``COUNT`` changes of one image and its target."""
    copies = image.expand(COUNT, *image.shape), target.expand(COUNT, *target.shape)
    with own_randomness(seed):
        return augmentation(*copies)


def test_points_go_where_the_light_at_them_goes() -> None:
    image = torch.stack((blob(*FIRST), blob(*SECOND)))
    target = torch.tensor([[*FIRST, 1.0], [*SECOND, 1.0], [0.0, 0.0, 0.0]])
    images, targets = seen(made(ALL, points_bank((0, 1, 2)), "keypoints"), image, target)
    for row in range(COUNT):
        for point in range(2):
            where = centroid(images[row, point])
            assert torch.allclose(where, targets[row, point, :2], atol=0.05)
    assert bool((targets[:, :2, 2] == 1).all()) and bool((targets[:, 2, 2] == 0).all())


def test_a_mirrored_image_exchanges_its_pairs_of_points_and_no_other() -> None:
    image = torch.stack((blob(*FIRST), blob(*SECOND)))
    target = torch.tensor([[*FIRST, 1.0], [*SECOND, 0.0], [7.0, 5.0, 1.0]])
    images, targets = seen(made({"flip": True}, points_bank((1, 0, 2)), "keypoints"), image, target)
    mirrored = (images != image).flatten(1).any(1)
    assert 20 < int(mirrored.sum()) < 44
    assert torch.equal(images[mirrored], image.flip(-1).expand(int(mirrored.sum()), *image.shape))
    wanted = [[SIDE - 1 - SECOND[0], SECOND[1], 0.0], [SIDE - 1 - FIRST[0], FIRST[1], 1.0]]
    wanted.append([SIDE - 1 - 7.0, 5.0, 1.0])
    assert torch.equal(targets[mirrored], torch.tensor(wanted).expand(int(mirrored.sum()), 3, 3))
    assert torch.equal(targets[~mirrored], target.expand(COUNT - int(mirrored.sum()), 3, 3))


def test_points_outside_are_invisible_and_an_unknown_one_spoils_no_other() -> None:
    target = torch.tensor([[0.0, 0.0, 1.0], [SIDE - 1.0, 0.0, 1.0], [math.nan, 3.0, 0.0]])
    augmentation = made({"translation": 0.2}, points_bank((0, 1, 2)), "keypoints")
    _, targets = seen(augmentation, torch.zeros(1, SIDE, SIDE), target)
    x, y = targets[:, :2, 0], targets[:, :2, 1]
    inside = (x >= -0.5) & (x <= SIDE - 0.5) & (y >= -0.5)
    assert torch.equal(targets[:, :2, 2] == 1, inside)
    assert 0.2 < float(inside.float().mean()) < 0.3  # a corner stays in one of four directions
    assert bool(targets[:, :2].isfinite().all()) and bool((targets[:, 2, 2] == 0).all())


def test_masks_go_with_their_images_and_what_comes_in_does_not_count() -> None:
    x, y = grid()
    mask = ((x > 9) & (x < 22) & (y > 12) & (y < 35)).long() + 2 * ((x - 33) ** 2 + y**2 < 200)
    image = mask.float()[None] - 1.0  # black is the ground, as what comes in
    images, masks = seen(made(ALL, masks_bank(), "masks"), image, mask)
    new = masks == 255
    # Less than half of a pixel that comes in was ever inside.
    assert bool((images[:, 0][new] < 0.01).all()) and 0.02 < float(new.float().mean()) < 0.3
    # Where no other class is near, both kinds of sampling say the same.
    flat = (images[:, 0] + 1.0 - (images[:, 0] + 1.0).round()).abs() < 1e-4
    near_edge = torch.nn.functional.max_pool2d(new[:, None].float(), 3, 1, 1)[:, 0] > 0
    sure = flat & ~near_edge
    assert float(sure.float().mean()) > 0.6
    assert torch.equal(masks[sure], (images[:, 0] + 1.0).round().long()[sure])
    assert {1, 2} <= set(masks[sure].tolist())


def test_a_mirrored_mask_exchanges_left_and_right_and_leaves_what_does_not_count() -> None:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.int64)
    mask[:, :5], mask[0], mask[-1] = 1, 255, 2
    augmentation = made({"flip": True}, masks_bank((0, 2, 1)), "masks")
    images, masks = seen(augmentation, blob(*FIRST)[None], mask)
    mirrored = images[:, 0, 20, 13] < 0
    wanted = torch.zeros_like(mask)
    wanted[:, -5:], wanted[0], wanted[-1] = 2, 255, 1
    assert bool((masks[mirrored] == wanted).all()) and bool((masks[~mirrored] == mask).all())
    assert 20 < int(mirrored.sum()) < 44


def test_boxes_are_the_smallest_around_the_turned_object() -> None:
    x, y = grid()
    left, top, right, bottom = BOX
    inside = (x > left - 0.5) & (x < right - 0.5) & (y > top - 0.5) & (y < bottom - 0.5)
    image = inside.float()[None] * 2 - 1
    target = torch.tensor([[*BOX, 0.0], [0.0, 0.0, 0.0, 0.0, -1.0]])
    images, targets = seen(made(ALL, boxes_bank(), "boxes"), image, target)
    for row in range(COUNT):
        lit = (images[row, 0] > -0.8).nonzero().float()  # y and x
        low, high = lit.amin(0).flip(0), lit.amax(0).flip(0) + 1
        assert torch.allclose(targets[row, 0, :4], torch.cat((low, high)), atol=1.3)
    assert bool((targets[:, 0, 4] == 0).all()) and bool((targets[:, 1, 4] == -1).all())
    # No less than the object as it is when nothing turns, to the pixel.
    _, still = seen(made({"flip": True}, boxes_bank(), "boxes"), image, target)
    assert {tuple(box) for box in still[:, 0, :4].tolist()} == {BOX, (15.0, 17.0, 36.0, 26.0)}


def test_a_box_is_cut_at_the_edge_and_gone_when_little_of_it_is_left() -> None:
    box = (0.0, 0.0, 8.0, 12.0)
    target = torch.tensor([[*box, 0.0]])
    augmentation = made({"translation": 0.25}, boxes_bank(), "boxes")
    images, targets = seen(augmentation, blob(24.0, 24.0)[None], target)
    kept = 0
    for row in range(COUNT):
        across, down = (centroid(images[row, 0]) - 24.0).tolist()  # the blob tells the shift
        width, height = min(8.0, 8.0 + across), min(12.0, 12.0 + down)
        share = max(width, 0) * max(height, 0) / 96
        if abs(share - 0.25) < 0.02 or min(width, height) < 1.2:
            continue
        assert (targets[row, 0, 4] == 0) == (share > 0.25)
        if share > 0.25:
            kept += 1
            corner = (max(across, 0), max(down, 0), 8 + across, 12 + down)
            assert targets[row, 0, :4].tolist() == pytest.approx(corner, abs=0.05)
        else:
            assert targets[row, 0].tolist() == [0, 0, 0, 0, -1]
    assert 20 < kept < 60


def test_rotation_size_and_shift_fill_their_ranges_and_stay_in_them() -> None:
    target = torch.tensor([[13.5, 23.5, 1.0], [33.5, 23.5, 1.0], [23.5, 23.5, 1.0]])
    settings = {"rotation": 30.0, "scale": 0.25, "translation": 0.1}
    augmentation = made(settings, points_bank((0, 1, 2)), "keypoints")
    _, targets = seen(augmentation, torch.zeros(1, SIDE, SIDE), target)
    along = targets[:, 1, :2] - targets[:, 0, :2]
    angle = torch.rad2deg(torch.atan2(along[:, 1], along[:, 0]))
    size = along.norm(dim=1) / 20
    shift = (targets[:, 2, :2] - 23.5) / SIDE
    for values, centre, reach in ((angle, 0.0, 30.0), (size, 1.0, 0.25), (shift, 0.0, 0.1)):
        assert float((values - centre).abs().max()) <= reach * 1.0001
        assert float(values.max()) > centre + 0.85 * reach
        assert float(values.min()) < centre - 0.85 * reach


def test_a_groups_rows_share_a_change_and_other_groups_have_another() -> None:
    images = blob(*FIRST).expand(10, 3, SIDE, SIDE)
    labels = torch.arange(10)
    augmentation = made({**ALL, "jitter": 0.5}, bank(), "labels")
    with own_randomness(1):
        changed, same = augmentation(images, labels, group=4)
    assert torch.equal(same, labels)
    for start, stop in ((0, 4), (4, 8), (8, 10)):
        assert bool((changed[start:stop] == changed[start]).all())
    assert not torch.allclose(changed[0], changed[4], atol=0.1)
    assert not torch.allclose(changed[4], changed[8], atol=0.1)


def test_jitter_changes_colors_as_the_standard_library_turns_hues() -> None:
    color = (0.6, 0.3, 0.2)
    image = torch.tensor(color)[:, None, None].expand(3, 4, 4) * 2 - 1
    images, labels = seen(made({"jitter": 0.5}, bank(), "labels"), image, torch.tensor(3))
    assert bool((labels == 3).all())
    hue, saturation, value = colorsys.rgb_to_hsv(*color)
    found = [colorsys.rgb_to_hsv(*((row + 1) / 2).tolist()) for row in images[:, :, 0, 0]]
    turns = [(after - hue + 0.5) % 1 - 0.5 for after, _, _ in found]
    # Hue by an eighth of a turn at half of the strength; a flat image has no contrast.
    assert max(map(abs, turns)) <= 0.1251 and min(turns) < -0.1 and max(turns) > 0.1
    assert min(v for _, _, v in found) < 0.7 * value and max(v for _, _, v in found) > 1.3 * value
    assert min(s for _, s, _ in found) < 0.7 * saturation < saturation < max(s for _, s, _ in found)
    assert bool((images.std(dim=(2, 3)) < 1e-6).all())


def test_grey_images_change_brightness_and_contrast_within_their_range() -> None:
    image = blob(*FIRST)[None] * 0.5
    images, _ = seen(made({"jitter": 0.4}, bank(), "labels"), image, torch.tensor(0))
    assert images.shape == (COUNT, 1, SIDE, SIDE)
    assert float(images.min()) >= -1 and float(images.max()) <= 1
    means, spreads = (images + 1).mean((1, 2, 3)), images.std((1, 2, 3))
    assert float(means.std()) > 0.1 and float((spreads / means).std()) > 0.02


def test_a_seed_decides_and_what_was_given_stays() -> None:
    image, mask = blob(*FIRST)[None], (blob(*SECOND) > 0).long()
    augmentation = made({**ALL, "jitter": 0.2}, masks_bank(), "masks")
    before = image.clone(), mask.clone()
    first, again = (seen(augmentation, image, mask, seed=5) for _ in range(2))
    other = seen(augmentation, image, mask, seed=6)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    assert torch.equal(image, before[0]) and torch.equal(mask, before[1])


def test_nothing_is_made_where_all_is_off() -> None:
    assert make_augmentation(load_config(), bank(), "labels") is None


def test_mirroring_points_without_pairs_is_refused_and_turning_them_is_not() -> None:
    with pytest.raises(ConfigError, match=r"augmentation.flip: the keypoints of data set 'drawn'"):
        made({"flip": True}, points_bank(None), "keypoints")
    made({"rotation": 5.0}, points_bank(None), "keypoints")


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("mask", r"'mask' asked for; allowed: labels, masks, .* Did you mean 'masks'\?"),
        ("boxes", "augmentation of boxes asked for, but data set 'drawn' .* another kind: masks"),
    ],
)
def test_a_kind_that_there_is_not_is_refused(annotation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made({"rotation": 5.0}, masks_bank(), annotation)


@pytest.mark.parametrize("shape", [(2, SIDE, SIDE - 1), (3, SIDE, SIDE), (2, SIDE)])
def test_targets_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    augmentation = made({"rotation": 5.0}, masks_bank(), "masks")
    with pytest.raises(ValueError, match=r"masks \(B, H, W\), not \(2, 1, 48, 48\) and"):
        augmentation(torch.zeros(2, 1, SIDE, SIDE), torch.zeros(shape, dtype=torch.int64))


def test_a_size_that_could_vanish_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"augmentation.scale: 1.0 given; it must be less than 1"):
        load_config({"augmentation.scale": 1.0})
