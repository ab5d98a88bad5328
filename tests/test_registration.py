from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

import repfusion_env
from repfusion_env.envs import RepFusionEnv, RepFusionVectorEnv


@pytest.fixture(autouse=True)
def _no_warning():
    """Gymnasium's own logger warns through ``warnings`` too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_registering_twice_changes_nothing():
    spec = gym.registry["RepFusion-v0"]
    repfusion_env.register()
    assert gym.registry["RepFusion-v0"] is spec
    assert repfusion_env.ENV_ID == "RepFusion-v0"


def test_make_gives_one_numpy_lane_and_make_vec_torch_lanes(tiny):
    env = gym.make("RepFusion-v0", config=tiny, reward="teacher_probe")
    assert isinstance(env.unwrapped, RepFusionEnv)
    assert env.unwrapped.lane.config.reward.kind == "teacher_probe"
    observation, _ = env.reset(seed=0)
    assert isinstance(observation, np.ndarray)
    lanes = gym.make_vec("RepFusion-v0", num_envs=4, config=tiny)
    assert isinstance(lanes.unwrapped, RepFusionVectorEnv)
    assert lanes.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    observations, _ = lanes.reset(seed=0)
    assert isinstance(observations, torch.Tensor)
    assert observations.shape == lanes.observation_space.shape


def test_a_spec_survives_json(tiny):
    env = gym.make("RepFusion-v0", config=tiny, reward="student", env={"episode_length": 2})
    spec = EnvSpec.from_json(env.spec.to_json())
    again = gym.make(spec)
    assert again.unwrapped.lane.config == env.unwrapped.lane.config
    first, second = env.reset(seed=4)[0], again.reset(seed=4)[0]
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kind", ["single", "vector"])
def test_environments_pickle_by_their_arguments(tiny, kind):
    env = RepFusionEnv(tiny) if kind == "single" else RepFusionVectorEnv(2, tiny)
    env.reset(seed=1)
    env.step(1 if kind == "single" else [1, 2])
    again = pickle.loads(pickle.dumps(env))
    first, second = env.reset(seed=2)[0], again.reset(seed=2)[0]
    assert np.array_equal(np.asarray(first), np.asarray(second))
    with pytest.raises(TypeError, match="shared trainer cannot be pickled"):
        pickle.dumps(env.heldout_view())


@pytest.mark.slow
def test_make_needs_no_import_and_the_import_loads_nothing_heavy(tiny):
    program = (
        "import sys, gymnasium as gym\n"
        "import repfusion_env, repfusion_env.config_loading\n"
        "repfusion_env.load_config({'env.num_envs': 2})\n"
        "heavy = {'torch', 'diffusers', 'stable_baselines3', 'matplotlib', 'timm', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert _run(program) == "[]"
    program = (
        "import gymnasium as gym, warnings\n"
        "warnings.simplefilter('error', UserWarning)\n"
        f"env = gym.make('repfusion_env:RepFusion-v0', config={tiny!r}, reward='teacher_probe')\n"
        "env.reset(seed=0)\n"
        "print(type(env.step(1)[1]).__name__, env.unwrapped.lane.config.reward.kind)\n"
    )
    assert _run(program) == "float teacher_probe"


def _run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_misspelt_keyword_is_refused_with_the_right_one(tiny):
    with pytest.raises(ValueError, match=r"rewrd: there is no such key\. Did you mean 'reward'"):
        gym.make("RepFusion-v0", config=tiny, rewrd="student")


def test_public_names_are_there_and_others_are_not():
    for name in repfusion_env.__all__:
        assert getattr(repfusion_env, name) is not None
    assert set(repfusion_env.__all__) <= set(dir(repfusion_env))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        repfusion_env.nothing  # noqa: B018
