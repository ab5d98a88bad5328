from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repfusion_env import contrastive_rules
from repfusion_env.config import ContrastiveConfig
from repfusion_env.config_loading import ConfigError, load_config, merge
from repfusion_env.contrastive import Contrastive, Views
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.noise import own_randomness

SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, *SHAPE, generator=generator).mul_(2).sub_(1)


def plain(**settings: Any) -> ContrastiveConfig:
    """Views that are the images themselves."""
    return dataclasses.replace(
        ContrastiveConfig(weight=1.0, crop=1.0, flip=False, jitter=0.0), **settings
    )


def nt_xent(projected: Tensor, ids: list[int], temperature: float) -> float:
    """Equation 1 of the paper, one anchor after the other; an image's views are all positives."""
    unit = projected.double() / projected.double().norm(dim=1, keepdim=True)
    similar = (unit @ unit.T / temperature).exp().tolist()
    losses = []
    for i in range(len(ids)):
        others = [k for k in range(len(ids)) if k != i]
        total = sum(similar[i][k] for k in others)
        own = [-torch.tensor(similar[i][k] / total).log() for k in others if ids[k] == ids[i]]
        losses.append(sum(own) / len(own))
    return float(sum(losses) / len(losses))


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [7, 7, 2, 2, 4, 9]])
def test_the_loss_is_nt_xent_over_all_views_of_an_image(images: Tensor, ids: list[int]) -> None:
    with own_randomness(3):
        contrastive = Contrastive(plain(temperature=0.2), 16, SHAPE)
    mix = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    seen = []

    def embed(views: Tensor) -> Tensor:
        # Another feature for the second view, which is here the same image.
        seen.append(views.flatten(1) @ mix + torch.arange(len(views))[:, None] * 0.3)
        return seen[0]

    found = contrastive(embed, images, torch.tensor(ids))
    expected = nt_xent(contrastive.head(seen[0]).detach(), ids * 2, 0.2)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_more_alike_two_views_are_the_smaller_the_loss(images: Tensor) -> None:
    contrastive = Contrastive(plain(projection=6), 6, SHAPE)
    contrastive.head = nn.Sequential(nn.Identity())
    apart, ids = torch.eye(6), torch.arange(6)
    best = contrastive(lambda _: apart.repeat(2, 1), images, ids)
    worst = contrastive(lambda _: torch.cat((apart, apart.roll(1, 0))), images, ids)
    same = contrastive(lambda _: torch.ones(12, 6), images, ids)
    assert best < same < worst
    assert float(same) == pytest.approx(torch.tensor(11.0).log())  # a guess among 11 others


@pytest.mark.parametrize("channels", [1, 3])
def test_each_view_is_another_one_in_range_and_a_function_of_the_seed(channels: int) -> None:
    shape = (channels, 16, 16)
    views = Views(ContrastiveConfig(), shape)
    one = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
    many = one.repeat(32, 1, 1, 1)
    with own_randomness(5):
        found = views(many)
    with own_randomness(5):
        again = views(many)
    with own_randomness(6):
        others = views(many)
    assert found.shape == many.shape and found.abs().max() <= 1
    assert torch.equal(found, again) and not torch.equal(found, others)
    assert len({row.numpy().tobytes() for row in found}) == 32
    assert torch.equal(many, one.repeat(32, 1, 1, 1))


def test_flip_and_crop_and_jitter_do_what_they_say() -> None:
    ramp = torch.linspace(-1, 1, 16).expand(64, 1, 16, 16).contiguous()
    with own_randomness(0):
        flipped = Views(plain(flip=True), SHAPE)(ramp)
        cropped = Views(plain(crop=0.5), SHAPE)(ramp)
        jittered = Views(plain(jitter=0.3), SHAPE)(ramp)
        same = Views(plain(), SHAPE)(ramp)
    mirrored = [torch.allclose(view, ramp[0].flip(-1), atol=1e-6) for view in flipped]
    kept = [torch.allclose(view, ramp[0], atol=1e-6) for view in flipped]
    assert all(a or b for a, b in zip(mirrored, kept, strict=True)) and 16 < sum(mirrored) < 48
    rises = cropped.diff(dim=-1)
    assert (rises >= -1e-5).all()  # never mirrored
    # At least half of the area is kept, at a ratio of at most 4 to 3.
    span = (cropped[..., -1] - cropped[..., 0]).mean(-1)
    assert span.min() > 2 * (0.5 * 3 / 4) ** 0.5 * 0.8 and span.std() > 0.05
    assert torch.equal(jittered.argsort(-1)[:, 0, 0, 8], torch.full((64,), 8))
    assert (jittered - ramp).abs().amax((1, 2, 3)).gt(0.05).float().mean() > 0.5
    assert torch.allclose(same, ramp, atol=1e-6)


def run(config: dict[str, Any], steps: int, state: Any = None) -> RepFusionVectorEnv:
    env = RepFusionVectorEnv(config=load_config("digits", config))
    env.reset(seed=1)
    if state is not None:
        env.load_state_dict(state)
    for _ in range(steps):
        env.step([0, 1, 2, 3])
    return env


ON = {
    "contrastive": {"weight": 0.5, "hidden": 16, "projection": 8},
    "student.ema": 0.9,
}


def test_without_weight_nothing_changes(
    tiny: dict[str, Any], learned: Callable[[Any], list[Tensor]]
) -> None:
    off = {"contrastive": {"weight": 0.0, "temperature": 0.1, "crop": 0.9, "jitter": 0.0}}
    plain_run, other, on = (run(merge(tiny, more), 3) for more in ({}, off, ON))
    for mine, theirs in zip(learned(plain_run.trainer), learned(other.trainer), strict=True):
        assert torch.equal(mine, theirs)
    assert other.trainer.contrastive is None
    assert "student/contrastive_loss" not in other.drain_metrics()
    first, changed = (env.trainer.student.backbone.state_dict() for env in (plain_run, on))
    assert any(not torch.equal(first[name], changed[name]) for name in first)
    metrics = on.drain_metrics()
    # About a guess among the other views of the batch at first.
    assert 0.5 < metrics["student/contrastive_loss"] < 1.2 * torch.tensor(15.0).log()


def test_a_run_with_views_goes_on_to_the_last_bit(
    tiny: dict[str, Any], learned: Callable[[Any], list[Tensor]]
) -> None:
    config = merge(tiny, ON)
    whole, half = run(config, 5), run(config, 3)
    rest = run(config, 2, half.state_dict())
    for mine, theirs in zip(learned(rest.trainer), learned(whole.trainer), strict=True):
        assert torch.equal(mine, theirs)
    heads = [env.trainer.state_dict()["contrastive"] for env in (rest, whole, half)]
    for name, value in heads[1].items():
        assert torch.equal(heads[0][name], value)
    assert not torch.equal(heads[2]["head.0.weight"], heads[1]["head.0.weight"])  # it learns
    assert rest.drain_metrics() == whole.drain_metrics()


def test_the_callers_random_state_is_left_alone(tiny: dict[str, Any]) -> None:
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    run(merge(tiny, ON), 2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_step_that_is_not_finite_leaves_everything_as_it_was(
    tiny: dict[str, Any], learned: Callable[[Any], list[Tensor]]
) -> None:
    env = run(merge(tiny, ON), 2)
    trainer = env.trainer
    assert trainer.contrastive is not None
    before = learned(trainer) + [p.clone() for p in trainer.contrastive.parameters()]
    trainer.contrastive.loss.temperature = float("nan")
    env.step([0, 1, 2, 3])
    after = learned(trainer) + list(trainer.contrastive.parameters())
    # Adam's count of steps is no weight; all others are compared.
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.numel() > 1]
    assert all(same) and env.drain_metrics()["student/nonfinite_steps"] == 1


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = contrastive_rules.find_spec
    monkeypatch.setattr(
        contrastive_rules, "find_spec", lambda name: None if name == "kornia" else find(name)
    )
    load_config("digits")
    with pytest.raises(ConfigError) as caught:
        load_config("digits", {"contrastive": 0.5})
    assert caught.value.problems == [
        "contrastive.weight: random views and their loss need kornia; "
        'install with: pip install "repfusion-env[compare]"'
    ]
