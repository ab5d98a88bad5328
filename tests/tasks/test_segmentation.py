"""The segmentation task: losses, answers and refusals against independent arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from repfusion_env.config import DataConfig, ExperimentConfig, SegmentationConfig
from repfusion_env.data import digit_scenes
from repfusion_env.data.annotations import IGNORE, Masks
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.tasks.segmentation import SegmentationTask
from students import build_backbone

CLASSES = ("background", "nut", "bolt")


def _bank(masks: Tensor, classes: tuple[str, ...] = CLASSES, side: int | None = None) -> ImageBank:
    height, width = (side, side) if side else masks.shape[1:]
    return ImageBank(
        "workshop",
        torch.zeros(len(masks), 3, height, width, dtype=torch.uint8),
        torch.zeros(len(masks), dtype=torch.int64),
        UNLABELLED,
        annotations={"masks": Masks(masks, classes)},
    )


def _task(masks: Tensor | None = None, **settings: Any) -> SegmentationTask:
    config = ExperimentConfig(task="segmentation", segmentation=SegmentationConfig(**settings))
    return SegmentationTask(
        config, _bank(torch.zeros(2, 8, 8, dtype=torch.uint8) if masks is None else masks)
    )


def _random(batch: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and masks, a quarter of whose pixels do not count."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, len(CLASSES), side, side, generator=random)
    masks = torch.randint(0, len(CLASSES), (batch, side, side), generator=random)
    masks[torch.rand(masks.shape, generator=random) < 0.25] = IGNORE
    return logits, masks


def _reference_losses(logits: Tensor, masks: Tensor) -> list[float]:
    """Mean over an image's counting pixels of log sum exp minus the class's logit, in float64."""
    found = []
    for image, mask in zip(logits.double().numpy(), masks.numpy(), strict=True):
        pixels = [
            np.log(np.exp(image[:, y, x]).sum()) - image[mask[y, x], y, x]
            for y, x in np.argwhere(mask != IGNORE)
        ]
        found.append(float(np.mean(pixels)))
    return found


def test_losses_are_mean_cross_entropies_of_the_counting_pixels():
    logits, masks = _random(4, 6)
    losses = _task().losses(logits, masks)
    np.testing.assert_allclose(losses, _reference_losses(logits, masks), rtol=1e-5)
    half = _task().losses(logits.bfloat16(), masks)
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half, _reference_losses(logits.bfloat16(), masks), rtol=1e-5)


def test_coarse_logits_are_brought_to_the_masks_by_bilinear_weights():
    coarse, _ = _random(2, 2, seed=1)
    _, masks = _random(2, 4, seed=2)
    # Between the centres of two coarse pixels lie fine ones at a quarter and three quarters.
    weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    fine = torch.from_numpy(np.einsum("ya,xb,nkab->nkyx", weights, weights, coarse.double()))
    task = _task(torch.zeros(2, 4, 4, dtype=torch.uint8))
    np.testing.assert_allclose(
        task.losses(coarse, masks), _reference_losses(fine, masks), rtol=1e-5
    )
    assert torch.equal(task.predict(coarse), fine.argmax(1))


def test_an_image_without_counting_pixels_costs_nothing_and_teaches_nothing():
    logits, masks = _random(3, 5)
    masks[1] = IGNORE
    logits.requires_grad_()
    losses = _task().losses(logits, masks)
    assert losses[1] == 0 and losses[0] > 0 and losses[2] > 0
    losses.sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert not logits.grad[1].any()
    # Nor do the ignored pixels of another image, and each other one does.
    assert torch.equal(logits.grad[0].abs().sum(0) > 0, masks[0] != IGNORE)
    assert _task().correct(logits, masks)[1] == 1


def test_correct_is_the_part_of_the_counting_pixels_whose_class_is_found():
    masks = torch.tensor([[[0, 1], [2, IGNORE]], [[1, 1], [1, 1]]])
    answers = torch.tensor([[[0, 2], [2, 1]], [[1, 0], [0, 0]]])
    logits = torch.nn.functional.one_hot(answers, 3).permute(0, 3, 1, 2).float()
    correct = _task().correct(logits, masks)
    assert correct.dtype == torch.float32
    np.testing.assert_allclose(correct, [2 / 3, 1 / 4])


def test_targets_are_the_banks_masks_in_the_order_asked_for():
    masks = torch.randint(0, 3, (5, 8, 8), dtype=torch.uint8)
    found = _task(masks).targets(_bank(masks), torch.tensor([4, 0, 4]))
    assert found.dtype == torch.int64
    assert torch.equal(found, masks[[4, 0, 4]].long())


@pytest.mark.parametrize(
    ("head", "auxiliary", "reads"),
    [
        ("linear", 0.0, "last"),
        ("fcn", 0.0, "last"),
        ("deeplabv3", 0.0, "last"),
        ("lraspp", 0.0, "stages"),
        ("fcn", 1.0, "stages"),
    ],
)
def test_heads_ask_for_the_stages_that_they_read(head, auxiliary, reads):
    assert _task(head=head, auxiliary=auxiliary).reads == reads


def test_auxiliary_heads_guide_the_learning_alone():
    task = _task(head="linear", auxiliary=0.5, width=16)
    shapes = [(4, 8, 8), (6, 8, 8), (8, 4, 4), (5, 4, 4)]
    maps = [torch.randn(2, *shape) for shape in shapes]
    masks = torch.randint(0, 3, (2, 8, 8))
    torch.manual_seed(0)
    head = task.head(shapes)
    outputs = head.train()(*maps)
    main, *further = outputs
    assert [tuple(logits.shape) for logits in further] == [(2, 3, 8, 8), (2, 3, 4, 4)]
    expected = task.losses(main, masks)
    expected = expected + 0.5 * sum(task.losses(logits, masks) for logits in further)
    torch.testing.assert_close(task.losses(outputs, masks), expected)
    assert torch.equal(task.predict(outputs), task.predict(main))
    assert torch.equal(task.correct(outputs, masks), task.correct(main, masks))
    # A reward is measured without gradients in training mode, an evaluation in inference mode.
    with torch.no_grad():
        assert torch.equal(head(*maps), main)
    assert torch.equal(head.eval()(*maps), main)
    # The head on the teacher's feature has one map, and so nothing below it.
    assert isinstance(task.head([(9, 4, 4)]).train()(torch.randn(2, 9, 4, 4)), Tensor)


def test_hidden_asks_for_three_layers_at_every_position_whatever_the_head():
    for name in ("fcn", "lraspp"):
        head = _task(head=name, auxiliary=1.0).head([(7, 4, 4)], hidden=12)
        layers = [part for part in head.modules() if isinstance(part, torch.nn.Conv2d)]
        assert [(part.in_channels, part.out_channels) for part in layers] == [
            (7, 12),
            (12, 12),
            (12, 3),
        ]
        assert {part.kernel_size for part in layers} == {(1, 1)}


def test_a_bank_without_masks_is_refused_in_one_sentence():
    bank = replace(_bank(torch.zeros(2, 8, 8, dtype=torch.uint8)), annotations={})
    with pytest.raises(ValueError, match=r"^task 'segmentation' needs masks, but data set 'worksh"):
        SegmentationTask(ExperimentConfig(), bank)


def test_masks_of_another_size_than_the_images_are_refused():
    with pytest.raises(ValueError) as caught:
        SegmentationTask(
            ExperimentConfig(), _bank(torch.zeros(2, 8, 6, dtype=torch.uint8), side=16)
        )
    assert str(caught.value) == (
        "data set 'workshop': images are 16x16 pixels, but their masks 8x6; a mask has one id for "
        "every pixel of its image"
    )


def test_masks_without_a_counting_pixel_are_refused():
    masks = torch.full((3, 8, 8), IGNORE, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no pixel of data set 'workshop' counts: its 3 masks"):
        _task(masks)
    masks[2, 7, 7] = 1
    assert _task(masks).classes == CLASSES


def test_masks_of_a_single_class_are_refused():
    bank = _bank(torch.zeros(2, 8, 8, dtype=torch.uint8), ("nut",))
    with pytest.raises(ValueError, match="the one class 'nut', but task 'segmentation' needs two"):
        SegmentationTask(ExperimentConfig(), bank)


def test_pictures_show_the_classes_where_they_are():
    mask = torch.zeros(8, 8, dtype=torch.int64)
    mask[:4] = 1
    picture = _task().draw(np.full((8, 8, 3), 100, np.uint8), mask, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert (picture[32:] == 100).all()
    assert len(np.unique(picture[:32].reshape(-1, 3), axis=0)) == 1
    assert (picture[0, 0] != 100).any()


@pytest.fixture(scope="module")
def scenes() -> ImageBank:
    """Eight scenes, in which ink is to be found: which digit it is takes longer than a test may."""
    bank = digit_scenes.load(DataConfig())[0].head(8)
    masks = Masks(bank.annotations["masks"].values.clamp(max=1), ("background", "ink"))
    return replace(bank, annotations={"masks": masks})


@pytest.mark.parametrize("head", ["linear", "fcn", "lraspp", "deeplabv3"])
def test_a_small_student_learns_to_find_digits_in_scenes(head, scenes):
    bank, masks = scenes, scenes.annotations["masks"]
    config = ExperimentConfig(segmentation=SegmentationConfig(head=head, width=32))
    task = SegmentationTask(config, bank)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = build_backbone("small_cnn", in_channels=1, image_size=32)
        shapes = [(32, 32, 32), (64, 16, 16), (128, 8, 8)]
        layers = task.head(shapes if task.reads == "stages" else shapes[-1:])
    optimizer = torch.optim.AdamW([*student.parameters(), *layers.parameters()], lr=5e-3)
    ids = torch.arange(len(bank))
    targets = task.targets(bank, ids)
    for _ in range(24):
        maps = list(student(bank.pixels(ids)).values())
        outputs = layers(*(maps if task.reads == "stages" else maps[-1:]))
        losses = task.losses(outputs, targets)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    # The least that an answer which is the same for every pixel costs.
    ink = float(masks.values.float().mean())
    blind = -ink * np.log(ink) - (1 - ink) * np.log(1 - ink)
    assert losses.mean() < 0.6 * blind
    assert (outputs.argmax(1) == 1).any()
