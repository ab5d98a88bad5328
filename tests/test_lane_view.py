from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.lane_view import LATENT_STRENGTH, as_pictures
from repfusion_env.rendering import DENSE_HEIGHT, SECOND_TOP, TILE_LEFTS, TILE_SIDE, WIDTH


def strength(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, size=(1, 6, 6))


@pytest.mark.parametrize("unit", [1.0, 2.0], ids=["pixels", "EDM"])
def test_what_is_not_noised_looks_like_the_image_in_any_unit(image: np.ndarray, unit: float):
    [picture] = as_pictures(unit * image[None], unit * image, image)
    np.testing.assert_allclose(picture, image, rtol=1e-12)


def test_noise_of_any_sigma_is_drawn_no_stronger_than_the_image(image: np.ndarray):
    noise = np.random.default_rng(1).normal(size=(1, *image.shape))
    weak, strong = (as_pictures(image + sigma * noise, image, image)[0] for sigma in (0.5, 80.0))
    for picture, sigma in ((weak, 0.5), (strong, 80.0)):
        seen = (image + sigma * noise)[0]
        np.testing.assert_allclose(
            picture, seen * strength(image) / strength(seen), rtol=1e-12, err_msg=str(sigma)
        )


@pytest.mark.parametrize("channels", [2, 4, 16])
def test_latents_are_drawn_along_the_directions_that_tell_the_image(channels: int):
    rng = np.random.default_rng(2)
    count = min(channels, 3)
    # Orthogonal maps of falling strength, each along a channel direction of its own.
    maps = np.linalg.qr(rng.normal(size=(64, 9)))[0].T.reshape(9, 8, 8)
    maps -= maps.mean((1, 2), keepdims=True)
    maps = np.linalg.svd(maps.reshape(9, 64), full_matrices=False)[2][:count].reshape(-1, 8, 8)
    planted = np.array([3.0, 2.0, 1.0])[:count, None, None] * maps
    along = np.linalg.qr(rng.normal(size=(channels, channels)))[0][:, :count]
    along *= np.sign(along[np.abs(along).argmax(0), range(count)])
    clean = np.einsum("cd,dhw->chw", along, planted) + rng.normal(size=(channels, 1, 1))
    pictures = as_pictures(np.stack([clean, 5 * clean]), clean, np.zeros((1, 8, 8)))
    expected = np.zeros((3, 8, 8))
    expected[:count] = planted
    expected *= LATENT_STRENGTH / strength(expected)
    for picture in pictures:
        np.testing.assert_allclose(picture, expected, atol=1e-9)


def test_values_that_cannot_be_drawn_do_not_stop_a_frame():
    for channels in (1, 4):
        empty = np.zeros((channels, 4, 4))
        broken = np.full((1, channels, 4, 4), np.nan)
        assert not as_pictures(broken, empty, np.zeros((1, 4, 4))).any()


@pytest.mark.parametrize("task", ["segmentation", "landmarks", "detection"])
def test_a_dense_frame_draws_the_targets_and_what_the_student_says_now(
    task: str, tiny: dict[str, Any], squares: str
):
    data = {"name": "npz", "path": squares}
    over = {"task": task, "data": data, "distillation.dense": True, "env.num_envs": 2}
    env = RepFusionVectorEnv(config={**tiny, **over}, render_mode="rgb_array")
    env.reset(seed=0)
    before = env.frame(1)
    env.step(torch.tensor([0, 3]))
    pixels = env.frame(1)
    assert before.shape == pixels.shape == (DENSE_HEIGHT, WIDTH, 3)
    assert env._last is not None
    trainer, bank, ids = env.trainer, env.bank, env._last.ids[1:]
    targets = trainer.task.targets(bank, ids)
    said = trainer.task.predict(trainer.outputs(bank.pixels(ids)))[0]
    if task == "landmarks":
        assert targets[0, :, 2].all()  # all of them are to be seen
    image = bank.images[ids[0]].permute(1, 2, 0).repeat(1, 1, 3).numpy()
    for left, answer in zip(TILE_LEFTS, (targets[0], said), strict=False):
        shown = pixels[SECOND_TOP : SECOND_TOP + TILE_SIDE, left : left + TILE_SIDE]
        np.testing.assert_array_equal(shown, trainer.task.draw(image, answer, TILE_SIDE))
        assert (shown != before[SECOND_TOP : SECOND_TOP + TILE_SIDE, left : left + TILE_SIDE]).any()
