from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch.nn import functional as F

from repfusion_env import ConfigError
from repfusion_env.config import ExperimentConfig
from repfusion_env.envs import RepFusionEnv, RepFusionVectorEnv
from repfusion_env.frozen import FrozenParts
from repfusion_env.observations import LOSS_BOUND


class _ColumnMeans:
    """A source of one's own: the mean brightness of each column."""

    bound = 1.0

    def __init__(self, parts: FrozenParts) -> None:
        self.shape = (parts.train.shape[2],)

    def __call__(self, trainer, bank, ids):
        return bank.pixels(ids).mean((1, 2))


def column_means(config: ExperimentConfig, parts: FrozenParts) -> _ColumnMeans:
    return _ColumnMeans(parts)


def image_of_ones_own(config: ExperimentConfig, parts: FrozenParts) -> _ColumnMeans:
    source = _ColumnMeans(parts)
    source.shape = parts.train.shape
    return source


SOURCES = {
    "teacher": {},
    "student": {},
    "pixels": {},
    "timm/test_resnet.r160_in1k": {"data.image_size": 32},
    "torchvision/shufflenet_v2_x0_5": {"data.image_size": 64, "teacher.image_size": 16},
    f"{__name__}:column_means": {},
}


@pytest.mark.parametrize(
    ("source", "student_state"),
    [(name, False) for name in SOURCES] + [(name, True) for name in SOURCES if name != "pixels"],
)
def test_observations_lie_in_a_finite_float32_box(tiny, source, student_state):
    random_state = torch.get_rng_state()
    env = RepFusionVectorEnv(
        4,
        tiny,
        observation={"source": source, "student_state": student_state},
        **{**SOURCES[source], "optimizer.learning_rate": 0.05},
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    space = env.single_observation_space
    assert space.dtype == np.float32
    assert np.isfinite(space.low).all()
    assert np.isfinite(space.high).all()
    views = [env, env.heldout_view()]
    for view in views:
        observations = [view.reset(seed=0)[0]]
        for _ in range(10):
            observations.append(view.step([0, 1, 2, 3])[0])
        for observation in observations:
            assert view.observation_space.contains(observation.numpy())
    if source not in ("pixels", f"{__name__}:column_means"):
        every = env.observer(env.bank, torch.arange(96))[:, : 96 if student_state else None]
        every = every[:, :-2] if student_state else every
        assert every.mean().abs() < 0.1
        assert 0.5 < every.std() < 1.1


def test_the_teacher_embedding_is_its_pooled_clean_feature_standardised(tiny, tiny_teacher):
    env = RepFusionVectorEnv(4, tiny, observation={"timestep": 60, "clip": 2.0})
    unet = UNet2DModel.from_pretrained(tiny_teacher).eval()
    taps = []
    unet.get_submodule("mid_block.resnets.1.conv2").register_forward_hook(
        lambda *found: taps.append(found[2])
    )

    def pooled(bank):
        taps.clear()
        with torch.no_grad():
            unet(bank.images.float() / 127.5 - 1, 60)
        return taps[0].mean((2, 3)).double()

    train, heldout = pooled(env.trainer.parts.train), pooled(env.trainer.parts.heldout)
    for bank, raw in ((env.trainer.parts.train, train), (env.trainer.parts.heldout, heldout)):
        expected = ((raw - train.mean(0)) / train.std(0)).clamp(-2, 2)
        found = env.observer(bank, torch.arange(len(bank)))
        torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=1e-3)


def test_the_teachers_embeddings_are_computed_once_for_all_views(tiny, monkeypatch):
    env = RepFusionVectorEnv(4, tiny)
    calls = []
    features = env.trainer.parts.teacher.features
    monkeypatch.setattr(
        env.trainer.parts.teacher,
        "features",
        lambda images, timesteps: calls.append(len(images)) or features(images, timesteps),
    )
    for _ in range(3):
        env.heldout_view(2).reset()
    assert calls == [40]  # the held-out bank, once; the training bank was there already


def test_the_students_embedding_and_state_follow_the_student(tiny):
    env = RepFusionVectorEnv(4, tiny, observation={"source": "student", "student_state": True})
    first, info = env.reset(seed=0)
    for _ in range(5):
        env.step([1, 1, 1, 1])
    ids = info["image_id"]
    later = env.observer(env.bank, ids)
    student = env.trainer.student.eval()
    with torch.no_grad():
        feature = student.backbone(env.bank.pixels(ids))["stage3"].mean((2, 3))
        losses = F.cross_entropy(student.head(feature), env.bank.labels[ids], reduction="none")
    normal = (feature - feature.mean(1, keepdim=True)) / feature.std(1, False, keepdim=True)
    torch.testing.assert_close(later[:, :-2], normal.clamp(-5, 5), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(later[:, -2], torch.full((4,), 5 / 100))  # 100 steps in all
    torch.testing.assert_close(later[:, -1], losses.clamp(0, LOSS_BOUND))
    assert not torch.equal(first, later)


def test_a_single_views_first_observation_is_of_the_student_as_it_is_now(tiny):
    env = RepFusionEnv(tiny, observation={"student_state": True})
    env.reset(seed=0)
    view = env.heldout_view()
    view.reset()
    view.step(0)  # the next image is already shown by the lane
    for _ in range(20):
        env.step(1)
        env.reset()
    observation, info = view.reset()
    fresh = view.lane.observer(view.lane.bank, torch.tensor([info["image_id"]]))[0]
    np.testing.assert_array_equal(observation, fresh.numpy())
    assert observation[-2] == np.float32(20 / 400)


@pytest.mark.parametrize(
    ("source", "error"), [("pixels", ConfigError), (f"{__name__}:image_of_ones_own", ValueError)]
)
def test_the_students_state_cannot_be_appended_to_images(tiny, source, error):
    with pytest.raises(error, match=r"observation.student_state: it is appended to an embedding"):
        RepFusionVectorEnv(4, tiny, observation={"source": source, "student_state": True})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timmm/resnet18", "names no known library; allowed: torchvision/<name>, timm/<name>"),
        ("techer", "unknown observation 'techer'. Did you mean 'teacher'?"),
        ("timm/resnet81", "resnet18"),
        ("torchvision/resnet18", "cannot take 16x16 images"),
    ],
)
def test_sources_that_cannot_be_are_refused(tiny, source, message):
    with pytest.raises(ValueError, match=message):
        RepFusionVectorEnv(4, tiny, observation=source)
