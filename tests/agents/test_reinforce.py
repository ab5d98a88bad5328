from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.train_reinforce import Reinforce, main
from repfusion_env.config_loading import ConfigError
from repfusion_env.envs import RepFusionVectorEnv


@pytest.fixture
def agent_of(tiny: dict[str, Any]) -> Callable[..., tuple[RepFusionVectorEnv, Reinforce]]:
    def make(seed: int = 0, **overrides: Any) -> tuple[RepFusionVectorEnv, Reinforce]:
        env = RepFusionVectorEnv(config=tiny, **overrides)
        return env, Reinforce(env, seed)

    return make


TWO_LAYERS = {"teacher.layers": ["down_blocks.0.resnets.0", "mid_block.resnets.1.conv2"]}
REWARDS = [[1.0, 2.0, 6.0, 3.0], [0.0, -1.0, 2.0, 5.0]]
VALUES = [[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 4.0]]


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("none", REWARDS),
        ("batch", [[-2.0, -1.0, 3.0, 0.0], [-1.5, -2.5, 0.5, 3.5]]),
        ("group", [[-0.5, 0.5, 1.5, -1.5], [0.5, -0.5, -1.5, 1.5]]),
        ("value", [[0.0, 1.0, 5.0, 2.0], [-2.0, -1.0, 2.0, 1.0]]),
    ],
)
def test_advantages_are_those_worked_out_by_hand(agent_of: Any, baseline: str, expected: Any):
    settings = {"baseline": baseline, "normalize_advantage": False}
    _, agent = agent_of(env={"group_size": 2}, reinforce=settings)
    values = torch.tensor(VALUES) if baseline == "value" else None
    found = agent.advantages(torch.tensor(REWARDS), values)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_normalised_advantages_have_deviation_1_and_equal_rewards_give_0(agent_of: Any):
    _, agent = agent_of()
    expected = np.array([[-2.0, -1.0, 3.0, 0.0], [-1.5, -2.5, 0.5, 3.5]])
    found = agent.advantages(torch.tensor(REWARDS), None)
    np.testing.assert_allclose(found.numpy(), expected / expected.std(), rtol=1e-5)
    assert (agent.advantages(torch.full((1, 4), -2.3), None) == 0).all()


@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_the_entropy_bonus_falls_linearly_and_then_stays(agent_of: Any, decay: float):
    settings = {"entropy_start": 0.3, "entropy_end": 0.1, "entropy_decay": decay}
    _, agent = agent_of(reinforce=settings)
    weights = [agent.entropy_weight(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert weights == pytest.approx([0.3, 0.2, 0.1, 0.1] if decay else [0.1] * 4)


def logits_gradient(agent: Reinforce, *rollout: torch.Tensor, progress: float) -> np.ndarray:
    """Gradient of the update's loss with respect to the last layer's bias, that is, the logits."""
    agent.optimizer.step = lambda: None  # type: ignore[method-assign,assignment]
    agent.update(*rollout, progress)
    return agent.policy.network[-1].bias.grad.double().numpy()


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_the_update_follows_the_policy_gradient_and_the_entropys(agent_of: Any, progress: float):
    settings = {"baseline": "none", "normalize_advantage": False, "gradient_clip": 0.0}
    env, agent = agent_of(env={"episode_length": 3}, reinforce=settings | {"entropy_start": 0.7})
    torch.nn.init.normal_(agent.policy.network[-1].weight)
    generator = torch.Generator().manual_seed(4)
    observation = torch.randn(env.single_observation_space.shape, generator=generator)
    observations = observation.expand(3, 4, -1)  # one image, three steps, four lanes
    actions = torch.randint(5, (3, 4), generator=generator)
    rewards = torch.randn(3, 4, generator=generator)
    logits = agent.policy.network(observation[None])[0].detach().double().numpy()

    def objective(logits: np.ndarray) -> float:
        log_p = logits - np.log(np.exp(logits).sum())
        found = 0.0
        for lane in range(4):
            for step in range(3):  # what later steps earn is this step's doing
                to_go = sum(float(rewards[later, lane]) for later in range(step, 3))
                found += to_go * log_p[int(actions[step, lane])] / 12
        entropy = -(np.exp(log_p) * log_p).sum()
        return found + (0.7 if progress == 0.0 else 0.0) * entropy

    steps = 1e-5 * np.eye(5)
    numeric = [(objective(logits + d) - objective(logits - d)) / 2e-5 for d in steps]
    found = logits_gradient(agent, observations, actions, rewards, progress=progress)
    np.testing.assert_allclose(found, -np.array(numeric), atol=1e-5)
    assert np.abs(found).max() > 0.01


def test_the_update_of_pairs_follows_the_gradient_of_their_joint_probability(agent_of: Any):
    settings = {"baseline": "none", "normalize_advantage": False, "gradient_clip": 0.0}
    more = {"env.action": "timestep_and_layer", "reinforce": settings | {"entropy_start": 0.7}}
    env, agent = agent_of(**TWO_LAYERS, **more)
    torch.nn.init.normal_(agent.policy.network[-1].weight)
    generator = torch.Generator().manual_seed(4)
    observation = torch.randn(env.single_observation_space.shape, generator=generator)
    actions = torch.tensor([[[0, 1], [4, 0], [2, 1], [2, 1]]])
    rewards = torch.randn(1, 4, generator=generator)
    logits = agent.policy.network(observation[None])[0].detach().double().numpy()

    def objective(logits: np.ndarray) -> float:
        joint = np.outer(np.exp(logits[:5]), np.exp(logits[5:]))
        joint = joint / joint.sum()  # (5, 2)
        found = sum(
            float(rewards[0, n]) * np.log(joint[tuple(actions[0, n].tolist())]) for n in range(4)
        )
        return found / 4 - 0.7 * (joint * np.log(joint)).sum()

    steps = 1e-5 * np.eye(7)
    numeric = [(objective(logits + d) - objective(logits - d)) / 2e-5 for d in steps]
    lanes = observation.expand(1, 4, -1)
    found = logits_gradient(agent, lanes, actions, rewards, progress=0.0)
    np.testing.assert_allclose(found, -np.array(numeric), atol=1e-5)
    assert np.abs(found).max() > 0.01


def test_a_bandit_with_one_image_is_solved(agent_of: Any):
    env, agent = agent_of(reinforce={"learning_rate": 0.01, "baseline": "batch"})
    observation = torch.ones(1, 32, *env.single_observation_space.shape)
    worth = torch.tensor([-1.0, -3.0, -0.5, -2.0, -4.0])
    for step in range(150):
        actions = agent.policy.sample(observation[0], agent.generator)
        agent.update(observation, actions[None], worth[actions][None], step / 150)
    assert agent.policy(observation[0])[0].exp()[2] > 0.9


def test_what_all_images_share_is_learned_at_a_step_size_of_its_own(agent_of: Any):
    settings = {"learning_rate": 0.001, "bias_learning_rate": 0.05, "baseline": "value"}
    env, agent = agent_of(reinforce=settings)
    assert agent.value is not None
    networks = {"policy": agent.policy.network, "value": agent.value}
    before = {
        (which, name): parameter.detach().clone()
        for which, network in networks.items()
        for name, parameter in network.named_parameters()
    }
    observations = torch.randn(1, 16, *env.single_observation_space.shape)
    rewards = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    agent.update(observations, torch.arange(16)[None] % 5, rewards, 0.0)
    assert len(before) == 8
    for which, network in networks.items():
        for name, parameter in network.named_parameters():
            # Adam's first step is the step size, wherever there is a gradient at all.
            moved = float((parameter - before[which, name]).detach().abs().max())
            assert moved == pytest.approx(0.05 if name == "3.bias" else 0.001, rel=0.01), name


def test_noisy_rewards_that_know_no_image_teach_the_common_choice_and_little_else(agent_of: Any):
    def after_40_steps(**rates: float) -> torch.Tensor:
        """Probabilities (64, 5) after rewards that are the same for all images, but for noise."""
        env, agent = agent_of(reinforce=rates)
        generator = torch.Generator().manual_seed(5)
        worth = torch.tensor([-3.0, -1.0, -0.5, -2.0, -4.0])
        observations = torch.randn(64, *env.single_observation_space.shape, generator=generator)
        for step in range(40):
            actions = agent.policy.sample(observations, agent.generator)
            noise = torch.randn(64, generator=generator)
            rollout = observations[None], actions[None], (worth[actions] + noise)[None]
            agent.update(*rollout, step / 40)
        return agent.policy(observations).exp().detach()

    own = after_40_steps(learning_rate=1e-3, bias_learning_rate=0.03)
    same = after_40_steps(learning_rate=3e-3, bias_learning_rate=3e-3)
    assert own.mean(0).argmax() == 2
    # The deviation over images is what noise has taught.
    assert own.std(0).max() < 0.5 * same.std(0).max()


def test_the_value_network_learns_what_is_to_come(agent_of: Any):
    settings = {"baseline": "value", "learning_rate": 0.03, "gradient_clip": 0.0}
    env, agent = agent_of(env={"episode_length": 2}, reinforce=settings)
    shape = env.single_observation_space.shape
    observations = torch.stack((torch.ones(4, *shape), -torch.ones(4, *shape)))
    rewards = torch.tensor([[1.0] * 4, [2.0] * 4])
    for _ in range(200):
        agent.update(observations, torch.zeros(2, 4, dtype=torch.int64), rewards, 1.0)
    assert agent.value is not None
    found = agent.value(observations.flatten(0, 1))[[0, 4], 0]
    torch.testing.assert_close(found, torch.tensor([3.0, 2.0]), atol=0.05, rtol=0)


def test_the_gradient_is_clipped_to_its_norm(agent_of: Any):
    env, agent = agent_of(reinforce={"gradient_clip": 0.01, "normalize_advantage": False})
    observations = torch.randn(1, 4, *env.single_observation_space.shape)
    rewards = torch.tensor([[100.0, 0.0, 0.0, -100.0]])
    agent.optimizer.step = lambda: None  # type: ignore[method-assign,assignment]
    agent.update(observations, torch.arange(4)[None], rewards, 0.0)
    squares = sum(float(value.grad.square().sum()) for value in agent.parameters)
    assert squares**0.5 == pytest.approx(0.01, rel=1e-3)


def test_weights_and_choices_depend_on_the_seed_alone(agent_of: Any):
    state = torch.get_rng_state()
    env, one = agent_of(3)
    same, other = Reinforce(env, 3), Reinforce(env, 4)
    assert torch.equal(torch.get_rng_state(), state)
    observations = torch.randn(64, *env.single_observation_space.shape)
    for found, equal in ((same, True), (other, False)):
        assert torch.equal(found.policy(observations), one.policy(observations)) is equal
    torch.manual_seed(0)
    first = one.policy.sample(observations, one.generator)
    torch.manual_seed(1)
    assert torch.equal(same.policy.sample(observations, same.generator), first)


def test_masked_timesteps_are_never_chosen(agent_of: Any):
    env, agent = agent_of(timesteps={"count": 5, "first": 0, "last": 800, "min_snr": 0.1})
    valid = env.action_masks()[0]
    assert 0 < valid.sum() < 5
    observations = torch.randn(500, *env.single_observation_space.shape)
    actions = agent.policy.sample(observations, agent.generator)
    assert set(actions.tolist()) == set(np.flatnonzero(valid).tolist())


def test_continuous_actions_are_refused(tiny: dict[str, Any]):
    env = RepFusionVectorEnv(config=tiny, **{"env.action": "continuous"})
    with pytest.raises(ConfigError, match=r"draws from categories, but 'continuous' is a Box") as e:
        Reinforce(env, 0)
    assert str(e.value).endswith(
        "for this one use train_sb3 --algo ppo or a2c or trpo or recurrent_ppo or ars or sac or "
        "td3 or ddpg or tqc or crossq"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {"observation.source": "pixels", "env.episode_length": 3, "run.decisions": 40},
        {"env.group_size": 2, "reinforce.baseline": "group", "reward.kind": "student_gain"},
        {"run.decisions": 41, "distillation.dense": True, "reward.kind": "teacher_probe"},
        {
            "teacher.layers": ["down_blocks.0.resnets.0", "mid_block.resnets.1.conv2"],
            "distillation.losses": {"hint": 1, "cosine": 0.5},
            "reward.kind": "student",
            "student.name": "mobilenetv2",
            "evaluation.every": 4,
        },
        {
            "env.action": "timestep_set",
            "env.episode_length": 2,
            "timesteps.min_snr": 0.1,
        },
    ],
    ids=["pixels-long", "group-gain", "dense-probe", "layers-losses", "set"],
)
def test_whatever_the_settings_a_run_is_made_to_its_end(
    overrides: dict[str, Any],
    experiment: Callable[..., Path],
    logged: Callable[[Path], Any],
    tmp_path: Path,
):
    config = experiment(**{"run.decisions": 40, "run.log_every": 4, **overrides})
    assert main(["--config", str(config), "--run.name", "run"]) == 0
    rows = logged(tmp_path / "run")
    length = overrides.get("env.episode_length", 1)
    steps = -(-overrides.get("run.decisions", 40) // 4)
    steps = -(-steps // length) * length  # whole steps, and whole episodes
    assert rows[-1]["step"] == steps and rows[-1]["decisions"] == 4 * steps
    chosen = 3 if overrides.get("env.action") == "timestep_set" else 1
    assert sum(sum(row.get("timestep/counts", [])) for row in rows) == 4 * steps * chosen
    evaluated = [row["step"] for row in rows if "evaluation/learned_reward" in row]
    assert evaluated == ([4, 8, 10] if "evaluation.every" in overrides else [steps])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["decisions"] == 4 * steps
    assert np.isfinite([summary["reward"]["learned"], summary["reward"]["random"]]).all()


@pytest.mark.slow
def test_the_learned_policy_beats_random_on_real_digits(
    tmp_path: Path, undrawn: Callable[[], AbstractContextManager[None]]
):
    """The cheap form of the claim; ``benchmarks/learning.py`` measures the full one."""
    gains = []
    for seed in range(3):
        options = {
            "seed": seed,
            "device": "cpu",
            "timesteps.count": 5,
            "teacher.standardize_images": 16,
            "data.train_limit": 500,
            "data.heldout_limit": 128,
            "evaluation.images": 128,
            "evaluation.probe_images": 100,
            "run.decisions": 30 * 64,
            "run.folder": tmp_path,
            "run.name": f"seed-{seed}",
        }
        with undrawn():
            assert main([f"--{key}={value}" for key, value in options.items()]) == 0
        reward = json.loads((tmp_path / f"seed-{seed}" / "summary.json").read_text())["reward"]
        gains.append(reward["learned"] - reward["random"])
    # Student's t at 2 degrees of freedom, 97.5 %.
    margin = 4.303 * np.std(gains, ddof=1) / 3**0.5
    assert np.mean(gains) - margin > 0, gains
