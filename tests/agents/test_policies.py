from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.policies import CategoricalPolicy, make_network
from repfusion_env.config import ReinforceConfig


def test_log_probabilities_are_those_of_a_tanh_network_in_float64():
    torch.manual_seed(1)
    policy = CategoricalPolicy((6,), 4, ReinforceConfig(hidden=(5, 3)))
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    observations = torch.randn(7, 6)
    x = observations.double().numpy()
    weights = [value.detach().double().numpy() for value in policy.parameters()]
    assert [value.shape for value in weights] == [(5, 6), (5,), (3, 5), (3,), (4, 3), (4,)]
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        x = np.tanh(x @ weight.T + bias)
    logits = x @ weights[-2].T + weights[-1]
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(policy(observations).detach().numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(policy.greedy(observations).numpy(), expected.argmax(1))


@pytest.mark.parametrize("shape", [(6,), (3, 16, 16)])
def test_the_first_choices_are_nearly_uniform(shape: tuple[int, ...]):
    torch.manual_seed(1)
    policy = CategoricalPolicy(shape, 5, ReinforceConfig())
    torch.testing.assert_close(
        policy(torch.randn(9, *shape)).exp(), torch.full((9, 5), 0.2), atol=0.02, rtol=0
    )


def test_samples_follow_the_probabilities_and_their_own_generator():
    torch.manual_seed(1)
    policy = CategoricalPolicy((3,), 4, ReinforceConfig(hidden=()))
    torch.nn.init.normal_(policy.network[-1].weight)
    observation = torch.randn(1, 3)
    expected = policy(observation).exp()[0].detach()
    lanes, state = observation.expand(20_000, 3), torch.get_rng_state()
    actions = policy.sample(lanes, torch.Generator().manual_seed(2))
    assert actions.dtype == torch.int64 and actions.shape == (20_000,)
    share = actions.bincount(minlength=4) / 20_000
    # Four deviations of a binomial share.
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt()).all()
    assert torch.equal(actions, policy.sample(lanes, torch.Generator().manual_seed(2)))
    assert not torch.equal(actions, policy.sample(lanes, torch.Generator().manual_seed(3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_closed_choices_are_never_taken_and_leave_gradients_finite():
    torch.manual_seed(1)
    valid = torch.tensor([True, False, True, False])
    policy = CategoricalPolicy((3,), 4, ReinforceConfig(), valid)
    log_probabilities = policy(torch.randn(500, 3))
    probabilities = log_probabilities.exp()
    assert (probabilities[:, ~valid] == 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(500))
    entropy = -(probabilities * log_probabilities).sum(1).mean()
    assert entropy.item() == pytest.approx(np.log(2), abs=0.01)
    entropy.backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())
    actions = policy.sample(torch.randn(500, 3), torch.Generator().manual_seed(1))
    assert set(actions.tolist()) == {0, 2}


def test_pixels_get_convolutions_unless_an_mlp_is_asked_for():
    def kinds(**options: str) -> set[str]:
        network = make_network((1, 16, 16), 2, ReinforceConfig(**options))
        assert network(torch.randn(3, 1, 16, 16)).shape == (3, 2)
        return {type(layer).__name__ for layer in network}

    assert "Conv2d" in kinds() and "Conv2d" in kinds(network="cnn")
    assert "Conv2d" not in kinds(network="mlp")


def test_a_cnn_on_embeddings_is_refused():
    with pytest.raises(ValueError, match=r"reinforce\.network: 'cnn' needs pixels, so .*auto, mlp"):
        make_network((6,), 2, ReinforceConfig(network="cnn"))


def test_several_components_are_a_product_of_categories():
    torch.manual_seed(1)
    valid = torch.tensor([True, True, False, True, True])
    policy = CategoricalPolicy((3,), (3, 2), ReinforceConfig(hidden=()), valid)
    torch.nn.init.normal_(policy.network[-1].weight)
    observation = torch.randn(1, 3)
    log_p = policy(observation)
    logits = policy.network(observation)[0].detach().double().numpy()
    first, second = np.exp(logits[:3]) * [1, 1, 0], np.exp(logits[3:])
    joint = np.outer(first / first.sum(), second / second.sum())  # (3, 2)
    pairs = torch.tensor([[a, b] for a in range(3) for b in range(2)])
    found = policy.log_probability(log_p.expand(6, -1), pairs).exp().detach()
    np.testing.assert_allclose(found, joint.ravel(), atol=1e-6)
    assert found[4:].tolist() == [0.0, 0.0]
    entropy = -(log_p.exp() * log_p).sum()
    positive = joint[joint > 0]
    assert entropy.item() == pytest.approx(-(positive * np.log(positive)).sum(), rel=1e-5)
    greedy = policy.greedy(observation)
    assert greedy.shape == (1, 2)
    assert tuple(greedy[0].tolist()) == np.unravel_index(joint.argmax(), joint.shape)

    actions = policy.sample(observation.expand(20_000, 3), torch.Generator().manual_seed(2))
    assert actions.shape == (20_000, 2) and actions.dtype == torch.int64
    share = (actions @ torch.tensor([2, 1])).bincount(minlength=6) / 20_000
    deviation = np.sqrt(joint * (1 - joint) / 20_000).ravel()
    assert (np.abs(share.numpy() - joint.ravel()) <= 4 * deviation).all()
