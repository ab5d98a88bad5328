"""Heatmaps: the loss and the decoding against written-out distributions in float64.

Shape letters: B samples, P points, h,w heatmap.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from repfusion_env.tasks.landmarks_heatmaps import Heatmaps

SIGMA = 1.5


def _gaussian(x: float, y: float, size: tuple[int, int]) -> np.ndarray:
    """The target around a place in heatmap pixels, written out in float64, (h, w)."""
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float64)
    density = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * SIGMA**2))
    return density / density.sum()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _log_targets(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Perfect heatmaps of points in heatmap pixels, (B, P, h, w); never cut to -inf."""
    rows, columns = torch.arange(size[0]), torch.arange(size[1])
    x = (columns - points[..., 0, None, None]) ** 2  # (B, P, 1, w)
    y = (rows[:, None] - points[..., 1, None, None]) ** 2  # (B, P, h, 1)
    return -(x + y) / (2 * SIGMA**2)


def test_loss_is_the_divergence_from_a_written_out_target_of_the_visible_points():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 6, 10, generator=generator)
    points = torch.rand(2, 3, 2, generator=generator) * torch.tensor([40.0, 24.0])
    visible = torch.tensor([[True, False, True], [False, True, False]])
    found = Heatmaps((24, 40), SIGMA).losses(logits, points, visible)
    for image in range(2):
        divergences = []
        for point in np.flatnonzero(visible[image].numpy()):
            x, y = points[image, point].double().numpy()
            # Four image pixels are one heatmap pixel, whose centre lies between the middle two.
            target = _gaussian((x - 1.5) / 4, (y - 1.5) / 4, (6, 10))
            logs = _log_softmax(logits[image, point].double().numpy())
            divergences.append((target * (np.log(target) - logs)).sum())
        assert found[image].item() == pytest.approx(np.mean(divergences), rel=1e-5)


def test_gradient_is_the_softmax_minus_the_target_over_the_visible_points():
    logits = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    points = torch.tensor([[[1.2, 3.1], [4.0, 0.3]]])
    Heatmaps((5, 5), SIGMA).losses(logits, points, torch.ones(1, 2, dtype=torch.bool)).backward()
    for point in range(2):
        x, y = points[0, point].tolist()
        softmax = np.exp(_log_softmax(logits[0, point].detach().double().numpy()))
        np.testing.assert_allclose(
            logits.grad[0, point], (softmax - _gaussian(x, y, (5, 5))) / 2, atol=1e-6
        )


def test_perfect_heatmap_has_no_loss():
    points = torch.tensor([[[3.3, 4.6], [-0.4, 7.2], [8.4, -0.5]]])
    losses = Heatmaps((9, 9), SIGMA).losses(
        _log_targets(points, (9, 9)), points, torch.ones(1, 3, dtype=torch.bool)
    )
    assert 0 <= losses.item() < 1e-5


def test_image_without_a_visible_point_has_loss_zero_and_a_gradient_of_zero():
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    points = torch.full((2, 2, 2), torch.nan)
    points[1, 0] = 2.0
    visible = torch.tensor([[False, False], [True, False]])
    losses = Heatmaps((4, 4), SIGMA).losses(logits, points, visible)
    assert losses[0] == 0 and losses[1] > 0
    losses.sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[0].any() and not logits.grad[1, 1].any() and logits.grad[1, 0].any()


def test_visible_point_far_outside_has_a_finite_loss_at_the_closest_end():
    logits = torch.zeros(1, 1, 4, 4)
    logits[0, 0, 0, 3] = 50.0  # all of the heatmap in the upper right corner
    visible = torch.ones(1, 1, dtype=torch.bool)
    for x in (60.0, 1e6):
        assert Heatmaps((4, 4), SIGMA).losses(
            logits, torch.tensor([[[x, -x]]]), visible
        ).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("stride", [1, 4])
def test_perfect_heatmaps_give_their_points_back_at_the_border_too(size, stride):
    height, width = size
    generator = torch.Generator().manual_seed(2)
    grid = torch.rand(1, 200, 2, generator=generator) * torch.tensor([width, height]) - 0.5
    grid[0, :4] = torch.tensor(
        [[-0.5, -0.5], [width - 0.5, 3.2], [0.0, height - 0.5], [width - 1.0, 0.0]]
    )
    heatmaps = Heatmaps((height * stride, width * stride), SIGMA)
    found = heatmaps.decode(_log_targets(grid, size))
    torch.testing.assert_close(
        found[..., :2], (grid + 0.5) * stride - 0.5, atol=0.01 * stride, rtol=0
    )


def test_decoded_point_is_the_one_whose_target_is_closest_to_the_heatmap():
    generator = torch.Generator().manual_seed(3)
    size = (9, 9)  # within the window everywhere, so that the whole heatmap counts
    for place in ([4.2, 3.7], [0.3, 5.1], [-0.2, 8.1]):
        logits = _log_targets(torch.tensor([[place]]), size)
        logits = logits + 0.3 * torch.randn(logits.shape, generator=generator)
        found = Heatmaps(size, 3.0).decode(logits)[0, 0, :2].numpy()
        logs = _log_softmax(logits[0, 0].double().numpy())

        steps = np.linspace(-0.5, 8.5, 181)
        square = (np.arange(9) - steps[:, None]) ** 2
        away = square[:, None, :, None] + square[None, :, None, :]  # every centre, every pixel
        targets = np.exp(-away / (2 * 3.0**2))
        targets /= targets.sum((2, 3), keepdims=True)
        every = (np.exp(logs) * (logs - np.log(targets))).sum((2, 3))
        row, column = np.unravel_index(every.argmin(), every.shape)
        np.testing.assert_allclose(found, [steps[column], steps[row]], atol=0.03)


def test_a_second_peak_elsewhere_does_not_move_the_point_but_makes_it_less_sure():
    both = torch.tensor([[[5.3, 6.1], [24.0, 22.0]]])
    densities = _log_targets(both, (32, 32))[0].exp()
    densities = densities / densities.sum((1, 2), keepdim=True)
    mixed = (0.7 * densities[0] + 0.3 * densities[1] + 1e-12).log()[None, None]
    alone = (densities[0] + 1e-12).log()[None, None]
    heatmaps = Heatmaps((32, 32), SIGMA)
    assert heatmaps.decode(mixed)[0, 0, :2].tolist() == pytest.approx([5.3, 6.1], abs=0.01)
    assert heatmaps.decode(mixed)[0, 0, 2].item() == pytest.approx(0.7, abs=0.01)
    assert heatmaps.decode(alone)[0, 0, 2].item() == pytest.approx(1.0, abs=0.01)


def test_decoding_noisy_heatmaps_is_far_finer_than_their_largest_pixel():
    generator = torch.Generator().manual_seed(4)
    grid = torch.rand(8, 20, 2, generator=generator) * 31
    logits = _log_targets(grid, (32, 32))
    logits = logits + 0.3 * torch.randn(logits.shape, generator=generator)
    found = Heatmaps((32, 32), SIGMA).decode(logits)[..., :2]
    peak = logits.flatten(2).argmax(-1)
    largest = torch.stack([peak % 32, peak // 32], dim=-1)
    error, rough = ((at - grid).norm(dim=2).mean().item() for at in (found, largest))
    assert error < 0.15 and error < rough / 4


def test_half_precision_heatmaps_are_read_in_full_precision():
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    heatmaps, visible = Heatmaps((16, 16), SIGMA), torch.ones(2, 3, dtype=torch.bool)
    points = torch.full((2, 3, 2), 7.3)
    assert heatmaps.decode(logits.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(
        heatmaps.losses(logits.bfloat16(), points, visible),
        heatmaps.losses(logits, points, visible),
        atol=0.02,
        rtol=0,
    )


@pytest.mark.parametrize("sigma", [0.05, 30.0])
def test_extreme_deviations_stay_finite_and_within_the_image(sigma):
    logits = 5 * torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(6))
    heatmaps = Heatmaps((32, 24), sigma)
    points = 20 * torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(7))
    assert heatmaps.losses(logits, points, torch.ones(2, 4, dtype=torch.bool)).isfinite().all()
    found = heatmaps.decode(logits)
    assert found.isfinite().all()
    assert (found[..., :2] >= -0.5).all()
    assert (found[..., 0] <= 23.5).all() and (found[..., 1] <= 31.5).all()


def test_single_pixel_heatmap_answers_its_middle():
    found = Heatmaps((8, 8), SIGMA).decode(torch.zeros(1, 1, 1, 1))
    assert found[0, 0].isfinite().all() and (found[0, 0, :2] >= -0.5).all()
