"""REINFORCE on the timestep environment.

    python agents/train_reinforce.py                              # configs/digits.yaml, a minute
    python agents/train_reinforce.py --config configs/cifar10.yaml --data.path FOLDER
    python agents/train_reinforce.py --resume runs/NAME           # after Ctrl-C or a kill
    torchrun --nproc_per_node 4 agents/train_reinforce.py         # docs/distributed.md

Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
learning", Machine Learning 8, 1992.

Shape letters: N lanes, L steps of a rollout (the episode's length), G lanes of a group,
D embedding, A choices, m components of an action.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agents.command_line import guarded, parse
from agents.sb3_algorithms import fitting
from repfusion_env.actions import action_kind, names_of_kinds
from repfusion_env.config_loading import ConfigError
from repfusion_env.ranks import connect

if TYPE_CHECKING:
    from torch import Tensor

    from agents.session import Session
    from repfusion_env.config import ExperimentConfig, ReinforceConfig
    from repfusion_env.envs import RepFusionVectorEnv

PROG = "train_reinforce"
DESCRIPTION = (
    "Train a REINFORCE policy that chooses the diffusion timestep for each image while the student "
    "is distilled. Without arguments: handwritten digits with the shipped teacher, about a minute "
    "on a CPU."
)


def conflicts(config: ExperimentConfig) -> list[str]:
    """What REINFORCE cannot do, one sentence each."""
    found = []
    drawn = ("Discrete", "MultiDiscrete")
    kind = action_kind(config.env.action)
    if kind not in drawn:
        found.append(
            f"env.action: REINFORCE draws from categories, but '{config.env.action}' is a {kind} "
            f"space; it needs one of {', '.join(names_of_kinds(drawn))}; for this one use "
            f"train_sb3 --algo {' or '.join(fitting(kind))}"
        )
    if config.reinforce.baseline == "batch" and config.env.num_envs == 1:
        found.append(
            "reinforce.baseline: 'batch' compares the lanes of a step, so env.num_envs must be 2 "
            "or more; with one lane use 'value' or 'none'"
        )
    source = config.observation.source
    embeds = source in ("teacher", "student") or "/" in source
    if config.reinforce.network == "cnn" and embeds:
        found.append(
            "reinforce.network: 'cnn' needs images, so observation.source must be 'pixels'; "
            "allowed on embeddings: auto, mlp"
        )
    return found


class Reinforce:
    """Policy, optional value network, their optimizer, and the update.

    Args:
        env: Whose observations and actions they fit.
        seed: Seed of initial weights and of the choices.
    """

    def __init__(self, env: RepFusionVectorEnv, seed: int) -> None:
        import torch

        from agents.policies import CategoricalPolicy, make_network
        from repfusion_env.noise import derive_seed, own_randomness

        if problems := conflicts(env.config):
            raise ConfigError(problems)
        self.config: ReinforceConfig = env.config.reinforce
        self.ranks = env.ranks
        shape = env.single_observation_space.shape
        assert shape is not None
        with own_randomness(derive_seed(seed, "policy")):
            valid = torch.from_numpy(env.action_masks()[0])
            space = env.single_action_space
            nvec = getattr(space, "nvec", None)  # of MultiDiscrete
            choices = len(valid) if nvec is None else nvec.tolist()
            self.policy = CategoricalPolicy(shape, choices, self.config, valid).to(env.device)
            self.value = (
                make_network(shape, 1, self.config).to(env.device)
                if self.config.baseline == "value"
                else None
            )
        networks = [self.policy.network, *([] if self.value is None else [self.value])]
        # What is good for all images is in the output biases, and every lane tells of it. What
        # differs from image to image is a faint signal: learned fast, it would be learned noise.
        biases = [network[-1].bias for network in networks]
        self.parameters = [p for network in networks for p in network.parameters()]
        others = [p for p in self.parameters if all(p is not bias for bias in biases)]
        groups: list[dict[str, Any]] = [
            {"params": others, "lr": self.config.learning_rate},
            {"params": biases, "lr": self.config.bias_learning_rate},
        ]
        # On a CPU the fused form rounds differently, and these networks are small.
        self.optimizer = torch.optim.Adam(groups, fused=True if env.device.type == "cuda" else None)
        self.generator = torch.Generator(env.device).manual_seed(derive_seed(seed, "choices"))
        self.group_size = env.config.env.group_size

    def entropy_weight(self, progress: float) -> float:
        """Weight of the entropy bonus at ``progress`` in [0, 1]: linear from start to end."""
        done = min(1.0, progress / self.config.entropy_decay) if self.config.entropy_decay else 1.0
        start, end = self.config.entropy_start, self.config.entropy_end
        return start + (end - start) * done

    def advantages(self, rewards: Tensor, values: Tensor | None) -> Tensor:
        """Rewards against the configured baseline.

        Args:
            rewards: (L, N) rewards to go.
            values: (L, N) predicted rewards, for ``baseline: value``; N as in ``rewards``.
        """
        if self.config.baseline == "batch":
            advantages = rewards - rewards.mean(dim=1, keepdim=True)
        elif self.config.baseline == "group":
            grouped = rewards.unflatten(1, (-1, self.group_size))  # (L, N/G, G)
            advantages = (grouped - grouped.mean(dim=2, keepdim=True)).flatten(1)
        elif values is not None:
            advantages = rewards - values.detach()
        else:
            advantages = rewards
        if self.config.normalize_advantage:
            advantages = advantages / (advantages.std(unbiased=False) + 1e-8)
        return advantages

    def update(
        self, observations: Tensor, actions: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, Tensor]:
        """One gradient step on one rollout.

        Args:
            observations: (L, N, ...).
            actions: (L, N) int64, or (L, N, m).
            rewards: (L, N).
            progress: Part of the run that is done.

        Returns:
            Device-side figures for the log, each a scalar tensor.
        """
        import torch

        # What later steps of the episode earn is this step's doing too; L = 1 leaves the reward.
        to_go = rewards.flip(0).cumsum(0).flip(0)
        flat = observations.flatten(0, 1)
        values = None if self.value is None else self.value(flat)[:, 0].view_as(to_go)
        # A baseline and a deviation over the lanes are those of all ranks' lanes.
        everyone = [to_go] if values is None else [to_go, values.detach()]
        everyone = [self.ranks.all(part.T).T for part in everyone]
        advantages = self.advantages(everyone[0], None if values is None else everyone[1])
        advantages = self.ranks.share(advantages.T).T
        log_probabilities = self.policy(flat)  # (L*N, A)
        chosen = self.policy.log_probability(log_probabilities, actions.flatten(0, 1))
        chosen = chosen.view_as(to_go)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(1).mean()
        policy_loss = -(chosen * advantages).mean()
        loss = policy_loss - self.entropy_weight(progress) * entropy
        if values is not None:
            loss = loss + (values - to_go).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.ranks.mean_([p.grad for p in self.parameters if p.grad is not None])
        if self.config.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        self.optimizer.step()
        return {"policy/entropy": entropy.detach(), "policy/loss": policy_loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizer and random state."""
        return {
            "policy": self.policy.state_dict(),
            "value": None if self.value is None else self.value.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.policy.load_state_dict(state["policy"])
        if self.value is not None:
            self.value.load_state_dict(state["value"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())


def train(session: Session) -> None:
    """Train from where the session stands to the end of its decisions, in whole episodes."""
    import torch

    env, config = session.env, session.config
    agent = Reinforce(env, config.seed)
    step = 0
    if session.restored is not None:
        step, state = session.restored
        agent.load_state_dict(state["agent"])
        observation = env.load_state_dict(state["env"])
    else:
        observation, _ = env.reset(seed=config.seed)
    length = config.env.episode_length

    with session.progress(step) as progress:
        while step < config.total_steps:
            # ROLLOUT: one episode of every lane
            observations, actions, rewards = [], [], []
            for _ in range(length):
                action = agent.policy.sample(observation, agent.generator, env.ranks)
                observations.append(observation)
                actions.append(action)
                observation, reward, _, _, _ = env.step(action)
                rewards.append(reward)
            # LEARN
            figures = agent.update(
                torch.stack(observations),
                torch.stack(actions),
                torch.stack(rewards),
                step / config.total_steps,
            )
            step += length
            # LOG AND SAVE
            if session.due(step, length, config.run.log_every) or step >= config.total_steps:
                weight = agent.entropy_weight(step / config.total_steps)
                env.ranks.mean_(list(figures.values()))
                session.log(
                    step,
                    progress,
                    {name: float(value) for name, value in figures.items()}
                    | {"policy/entropy_weight": weight},
                )
            if config.evaluation.every and session.due(step, length, config.evaluation.every):
                session.evaluate(step, agent.policy.greedy)
            if (
                session.due(step, length, config.run.checkpoint_every)
                or session.asked_to_stop()
                or step >= config.total_steps
            ):
                session.save(step, {"env": env.state_dict(), "agent": agent.state_dict()})
    session.finish(step, agent.policy.greedy, agent.policy)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def run() -> int:
        command = parse(
            argv,
            prog=PROG,
            description=DESCRIPTION,
            conflicts=conflicts,
            hidden=("sb3", "bandit"),
            several=True,
        )
        from agents.session import run_session

        return run_session(command, agent="reinforce", train=train, ranks=connect())

    return guarded(run, PROG)


if __name__ == "__main__":
    sys.exit(main())
