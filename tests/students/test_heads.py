"""The building blocks of the task heads."""

import numpy as np
import torch

from students import linear_head, mlp_head


def test_linear_head_is_one_affine_map() -> None:
    head = linear_head(5, 3)
    x = torch.randn(4, 5)
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    np.testing.assert_allclose(head(x).detach().numpy(), x.numpy() @ weight.T + bias, atol=1e-6)


def test_mlp_head_is_three_affine_maps_with_relu_between() -> None:
    torch.manual_seed(0)
    head = mlp_head(6, 11, 4)
    tensors = [parameter.detach().double().numpy() for parameter in head.parameters()]
    assert [tensor.shape for tensor in tensors] == [(11, 6), (11,), (11, 11), (11,), (4, 11), (4,)]
    x = torch.randn(8, 6)
    y = x.double().numpy()
    for weight, bias in ((tensors[0], tensors[1]), (tensors[2], tensors[3])):
        y = np.maximum(y @ weight.T + bias, 0)
    y = y @ tensors[4].T + tensors[5]
    assert y.min() < 0  # nothing clips the logits
    np.testing.assert_allclose(head(x).detach().numpy(), y, atol=1e-5)
