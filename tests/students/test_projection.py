"""The projection: one weight for pooled features and maps."""

import pytest
import torch
from torch import Tensor

from students import Projection
from students.projection import LinearProjections


def pool(maps: Tensor) -> Tensor:
    return maps.mean((2, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_projecting_the_pooled_feature_equals_pooling_the_projected_map(bias: bool) -> None:
    torch.manual_seed(0)
    projection = Projection(24, 40, bias=bias)
    maps = torch.randn(5, 24, 6, 6)
    torch.testing.assert_close(projection(pool(maps)), pool(projection(maps)))


def test_projection_is_the_stated_linear_map() -> None:
    torch.manual_seed(0)
    projection = Projection(7, 3)
    maps = torch.randn(2, 7, 4, 5)
    weight, bias = projection.weight.detach().double(), projection.bias.detach().double()
    expected = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for f in range(3):
        for s in range(7):
            expected[:, f] += weight[f, s] * maps[:, s].double()
        expected[:, f] += bias[f]
    torch.testing.assert_close(projection(maps).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        projection(maps[:, :, 2, 3]).double(), expected[:, :, 2, 3], rtol=1e-5, atol=1e-6
    )


def test_weight_is_the_jacobian_of_shape_teacher_by_student() -> None:
    projection = Projection(6, 9)
    assert projection.weight.shape == (9, 6)
    jacobian = torch.autograd.functional.jacobian(lambda h: projection(h[None])[0], torch.randn(6))
    torch.testing.assert_close(jacobian, projection.weight.detach())


def test_pooled_and_dense_losses_train_the_same_weight() -> None:
    torch.manual_seed(0)
    projection = Projection(4, 2)
    maps = torch.randn(3, 4, 5, 5)
    projection(pool(maps)).sum().backward()
    pooled_gradient = projection.weight.grad.clone()
    projection.zero_grad()
    pool(projection(maps)).sum().backward()
    torch.testing.assert_close(projection.weight.grad, pooled_gradient)
    assert pooled_gradient.abs().min() > 0


def test_initial_weights_fill_the_bound_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    projection = Projection(64, 256)
    for parameter in (projection.weight, projection.bias):
        assert parameter.abs().max() <= 1 / 8
        assert parameter.abs().max() > 0.95 / 8
    # A uniform variable on (-b, b) has variance b^2 / 3.
    assert projection.weight.var().item() == pytest.approx((1 / 8) ** 2 / 3, rel=0.05)


def test_without_bias_zero_stays_zero() -> None:
    projection = Projection(4, 2, bias=False)
    assert projection.bias is None
    assert [name for name, _ in projection.named_parameters()] == ["weight"]
    assert projection(torch.zeros(1, 4)).abs().max() == 0


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3, 3), (2, 4, 3), (4,)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        Projection(4, 2)(torch.zeros(shape))
    assert str(caught.value) == (
        f"The projection takes (N, 4) or (N, 4, H, W), got {tuple(shape)}."
    )


def test_empty_width_is_refused() -> None:
    with pytest.raises(ValueError, match="widths of at least 1, got 0 to 3"):
        Projection(0, 3)


def test_one_projection_per_teacher_layer_reads_the_last_stage() -> None:
    torch.manual_seed(0)
    projections = LinearProjections([(9, 8, 8), (4, 2, 2)], [(3, 4, 4), (6, 1, 1)])
    assert [tuple(weight.shape) for weight in projections.jacobians()] == [(3, 4), (6, 4)]
    maps = torch.randn(5, 4, 2, 2)
    for feature in (maps, pool(maps)):
        found = projections(feature)
        for layer, projection in zip(found, projections, strict=True):
            assert torch.equal(layer, projection(feature))
    assert [name for name, _ in projections.named_parameters()][:2] == ["0.weight", "0.bias"]
