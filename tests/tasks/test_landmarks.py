"""The landmarks task: errors and their spread against numpy, refusals, and that it learns.

Shape letters: B samples, P points.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repfusion_env.config_loading import check
from repfusion_env.data import digit_scenes
from repfusion_env.data.annotations import Keypoints
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.tasks.build import build_task
from repfusion_env.tasks.landmarks import LandmarksTask, default_stride
from repfusion_env.tasks.landmarks_errors import LandmarkErrors, normalized_errors, units
from students import build_backbone


def _bank(points: Tensor, visible: Tensor, normalizer=None, side: int = 32) -> ImageBank:
    images = torch.zeros(len(points), 3, side, side, dtype=torch.uint8)
    labels = torch.zeros(len(points), dtype=torch.int64)
    keypoints = Keypoints(points, visible, normalizer)
    return ImageBank("faces", images, labels, UNLABELLED, annotations={"keypoints": keypoints})


def _random_bank(normalizer=None, side: int = 32) -> ImageBank:
    generator = torch.Generator().manual_seed(0)
    points = side * torch.rand(6, 4, 2, generator=generator) - 0.5
    visible = torch.rand(6, 4, generator=generator) < 0.7
    visible[0] = True
    visible[3] = False
    points[~visible] = torch.nan
    return _bank(points, visible, normalizer, side)


def _task(bank: ImageBank, **options: object) -> LandmarksTask:
    return LandmarksTask(
        check({"task": "landmarks", "landmarks": options, "distillation.dense": True}), bank
    )


def _peaks(predictions: Tensor, side: int = 32) -> Tensor:
    """Heatmaps whose decoded points are ``predictions`` (B, P, 2)."""
    places = torch.arange(side)
    x = (places - predictions[..., 0, None, None]) ** 2
    y = (places[:, None] - predictions[..., 1, None, None]) ** 2
    return -(x + y) / (2 * 1.5**2)


def test_targets_are_points_and_visibility_without_a_number_that_is_none():
    bank = _random_bank()
    keypoints = bank.annotations["keypoints"]
    targets = _task(bank).targets(bank, torch.tensor([4, 3, 4]))
    assert targets.shape == (3, 4, 3) and targets.dtype == torch.float32
    assert targets.isfinite().all()
    for row, image in enumerate((4, 3, 4)):
        seen = keypoints.visible[image]
        assert torch.equal(targets[row, :, 2] > 0, seen)
        assert torch.equal(targets[row, seen, :2], keypoints.points[image, seen])


@pytest.mark.parametrize("normalizer", [None, (1, 2)])
def test_metric_is_the_mean_error_per_image_in_its_unit_and_its_spread(normalizer):
    generator = torch.Generator().manual_seed(1)
    points = 31 * torch.rand(300, 4, 2, generator=generator)
    visible = torch.rand(300, 4, generator=generator) < 0.8
    wrong = points + torch.randn(points.shape, generator=generator) * 1.5
    wrong = wrong.clamp(-0.5, 31.5)
    bank = _bank(points, visible, normalizer)
    task = _task(bank)
    metric = task.metric()
    for ids in torch.arange(300).split(77):
        metric.update(_peaks(wrong[ids]), task.targets(bank, ids))
    found = metric.compute()

    errors = []
    for at, seen, said in zip(points.numpy(), visible.numpy(), wrong.numpy(), strict=True):
        if normalizer is None:
            sides = np.ptp(at[seen], axis=0) if seen.any() else np.zeros(2)
            unit = np.sqrt(sides.prod())
        else:
            both = seen[list(normalizer)].all()
            unit = np.linalg.norm(at[normalizer[0]] - at[normalizer[1]]) if both else 0.0
        if unit > 0:
            errors.append(np.linalg.norm(said[seen] - at[seen], axis=1).mean() / unit)
    errors = np.array(errors)
    assert 100 < len(errors) < 300
    assert found["nme"] == pytest.approx(errors.mean(), rel=5e-3)
    assert found["left_out"] == pytest.approx(1 - len(errors) / 300)
    assert found["failure_rate_0.1"] == pytest.approx((errors > 0.1).mean(), abs=0.01)
    across = np.linspace(0, 0.1, 20001)
    curve = [(errors <= limit).mean() for limit in across]
    assert found["auc_0.1"] == pytest.approx(np.trapezoid(curve, across) / 0.1, abs=2e-3)
    assert 0.05 < found["auc_0.1"] < 0.95 and 0.05 < found["failure_rate_0.1"] < 0.95


def test_area_under_the_curve_of_three_images_is_the_staircases():
    metric = LandmarkErrors((0, 1))
    # Eyes 10 pixels apart; both points off by 0.2, 0.5 and 3 pixels.
    targets = torch.tensor([[5.0, 5.0, 1.0], [15.0, 5.0, 1.0]]).expand(3, 2, 3)
    off = torch.tensor([0.2, 0.5, 3.0])[:, None]
    predictions = targets.clone()
    predictions[..., 1] += off
    metric.update(predictions, targets)
    found = metric.compute()
    # A third of the images from 0.02 on, two thirds from 0.05 on.
    assert found["auc_0.1"] == pytest.approx((0.03 / 3 + 0.05 * 2 / 3) / 0.1)
    assert found["failure_rate_0.1"] == pytest.approx(1 / 3)
    assert found["nme"] == pytest.approx((0.02 + 0.05 + 0.3) / 3)


def test_image_without_a_unit_is_left_out_and_counted():
    same = torch.tensor([[5.0, 5.0, 1.0], [5.0, 5.0, 1.0], [9.0, 2.0, 1.0]])
    hidden = torch.tensor([[5.0, 5.0, 1.0], [9.0, 5.0, 0.0], [9.0, 2.0, 1.0]])
    good = torch.tensor([[5.0, 5.0, 1.0], [9.0, 8.0, 1.0], [9.0, 2.0, 0.0]])
    targets = torch.stack([same, hidden, good])
    assert units(targets, (0, 1)).tolist() == [0.0, 0.0, 5.0]
    errors, counts = normalized_errors(targets + 1.0, targets, (0, 1))
    assert counts.tolist() == [[False] * 3, [False] * 3, [True, True, False]]
    assert errors[2, :2].tolist() == pytest.approx([2**0.5 / 5] * 2) and not errors[:2].any()
    metric = LandmarkErrors((0, 1))
    metric.update(targets, targets)
    assert metric.compute() == pytest.approx(
        {"nme": 0.0, "auc_0.1": 1.0, "failure_rate_0.1": 0.0, "left_out": 2 / 3}
    )


def test_box_unit_is_the_root_of_the_visible_points_area():
    targets = torch.tensor([[[2.0, 3.0, 1.0], [11.0, 7.0, 1.0], [99.0, 99.0, 0.0]]])
    assert units(targets, None).item() == pytest.approx((9 * 4) ** 0.5)
    line = torch.tensor([[[2.0, 3.0, 1.0], [11.0, 3.0, 1.0], [0.0, 0.0, 0.0]]])
    assert units(line, None).item() == 0.0
    assert units(torch.zeros(1, 3, 3), None).item() == 0.0


def test_metric_of_nothing_is_no_number():
    assert all(np.isnan(value) for value in LandmarkErrors(None).compute().values())


def test_solved_part_of_a_sample_is_that_of_its_visible_points_within_a_tenth():
    points = torch.tensor([[[4.0, 4.0], [24.0, 4.0], [14.0, 20.0], [9.0, 9.0]]]).repeat(3, 1, 1)
    visible = torch.tensor([[True, True, True, False], [True] * 4, [False] * 4])
    bank = _bank(points, visible, (0, 1))
    task = _task(bank)
    said = points.clone()
    # The unit is 20 pixels, so that 2 are allowed.
    said[0] += torch.tensor([[0.0, 1.8], [2.3, 0.0], [1.0, 1.0], [9.0, 9.0]])
    targets = task.targets(bank, torch.arange(3))
    solved = task.correct(_peaks(said), targets)
    assert solved.dtype == torch.float32
    assert solved.tolist() == pytest.approx([2 / 3, 1.0, 0.0])


def test_predictions_have_the_form_of_targets():
    task = _task(_random_bank())
    at = torch.tensor([[[3.2, 8.1], [30.9, 0.2], [16.0, 16.5], [7.7, 21.4]]])
    found = task.predict(_peaks(at))
    assert found.shape == (1, 4, 3)
    torch.testing.assert_close(found[..., :2], at, atol=0.01, rtol=0)
    assert ((found[..., 2] > 0.95) & (found[..., 2] <= 1)).all()


@pytest.mark.parametrize(
    ("head", "reads", "size"),
    [("linear", "last", 8), ("deconv", "last", 32), ("hrnet", "stages", 32)],
)
def test_each_head_reads_its_maps_of_a_student_and_one_map_of_a_teacher(head, reads, size):
    bank = _random_bank()
    task = _task(bank, head=head, width=16)
    assert task.reads == reads
    shapes = [(32, 32, 32), (64, 16, 16), (128, 8, 8)]
    if reads == "last":
        shapes = shapes[-1:]
    network = task.head(shapes)
    assert network(*(torch.zeros(2, *shape) for shape in shapes)).shape == (2, 4, size, size)
    teacher = task.head([(96, 4, 4)])(torch.zeros(2, 96, 4, 4))
    assert task.losses(teacher, task.targets(bank, torch.tensor([0, 1]))).isfinite().all()
    deep = task.head([(96, 4, 4)], 12)
    assert sum(isinstance(part, nn.Conv2d) for part in deep.modules()) == 3


def test_stride_sets_the_size_of_heatmaps_and_is_by_default_4_but_for_small_images():
    assert [default_stride(side) for side in (16, 32, 64, 127, 128, 256, 512)] == [
        1,
        1,
        2,
        2,
        4,
        4,
        4,
    ]
    task = _task(_random_bank(side=64), stride=8, width=8)
    assert task.head([(4, 2, 2)])(torch.zeros(1, 4, 2, 2)).shape == (1, 4, 8, 8)
    default = _task(_random_bank(side=64), width=8)
    assert default.head([(4, 2, 2)])(torch.zeros(1, 4, 2, 2)).shape == (1, 4, 32, 32)


def test_stride_that_leaves_no_heatmap_is_refused_with_the_largest_that_does():
    with pytest.raises(ValueError, match=r"landmarks\.stride: 17 given, .* 64x64 .*: 1\.\.16"):
        _task(_random_bank(side=64), stride=17)
    assert _task(_random_bank(side=64), stride=16).config.stride == 16


def test_bank_without_keypoints_is_refused():
    images, labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])
    bank = ImageBank("birds", images, labels, ("a", "b"))
    with pytest.raises(ValueError, match="task 'landmarks' needs keypoints, but data set 'birds'"):
        _task(bank)


@pytest.mark.parametrize(
    ("normalizer", "sentence"),
    [
        ((0, 1), "needs the points 0 and 1 visible and apart"),
        (None, "needs two visible points that are not on one line with the image's sides"),
    ],
)
def test_bank_that_no_error_can_be_measured_on_is_refused(normalizer, sentence):
    points = torch.tensor([[[3.0, 3.0], [3.0, 3.0]], [[1.0, 2.0], [5.0, 6.0]]])
    visible = torch.tensor([[True, True], [True, False]])
    with pytest.raises(ValueError) as caught:
        _task(_bank(points, visible, normalizer))
    message = str(caught.value)
    assert "data set 'faces' has no image whose error can be measured" in message
    assert sentence in message and "\n" not in message


def test_picture_shows_visible_points_where_they_are():
    bank = _random_bank()
    task = _task(bank)
    image = np.full((32, 32, 3), 255, np.uint8)
    answer = torch.tensor([[4.0, 20.0, 1.0], [28.0, 6.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    picture = task.draw(image, answer, 128)
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
    changed = (picture != 255).any(2)
    rows, columns = np.nonzero(changed)
    # The pixel's centre is at (4.5, 20.5) / 32 of the picture.
    assert abs(columns.mean() - 18) < 1.5 and abs(rows.mean() - 82) < 1.5
    assert changed[78:86, 14:22].any() and not changed[:60].any()


def test_small_student_learns_the_points_of_digits():
    config = check(
        {
            "task": "landmarks",
            "landmarks": {"head": "hrnet"},
            "data": {"name": "digit_scenes"},
            "distillation": {"dense": True},
        }
    )
    bank = digit_scenes.load(config.data)[0].head(8)
    task = build_task(config, bank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone("small_cnn", in_channels=1, image_size=32)
        ids = torch.arange(8)
        images, targets = bank.pixels(ids), task.targets(bank, ids)
        head = task.head([tuple(x.shape[1:]) for x in backbone(images).values()])
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-2)
    losses, errors = [], []
    for _ in range(12):
        outputs = head(*backbone(images).values())
        loss = task.losses(outputs, targets).mean()
        metric = task.metric()
        metric.update(outputs.detach(), targets)
        losses.append(loss.item())
        errors.append(metric.compute()["nme"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert errors[-1] < 0.3 * errors[0]


def test_real_faces_lose_nothing_on_their_way_through_heatmaps_and_back(real_data: Path):
    arrays = np.load(real_data / "ytfaces68_64.npz")
    points = torch.from_numpy(arrays["test_keypoints"])[::8]
    bank = _bank(points, torch.ones(points.shape[:2], dtype=torch.bool), (36, 45), side=64)
    task, ids = _task(bank), torch.arange(len(points))
    metric = task.metric()
    # Heatmaps of 32 x 32 for images of 64 x 64.
    outputs = _peaks((points + 0.5) / 2 - 0.5, 32)
    targets = task.targets(bank, ids)
    metric.update(outputs, targets)
    found = metric.compute()
    assert found["nme"] < 1e-4 and found["left_out"] == 0 and found["auc_0.1"] > 0.999
    assert (task.correct(outputs, targets) == 1).all()
    assert task.losses(outputs, targets).max() < 1e-4
    eyes = points[:, 36] - points[:, 45]
    np.testing.assert_allclose(units(targets, (36, 45)), np.hypot(*eyes.T.numpy()), rtol=1e-5)
