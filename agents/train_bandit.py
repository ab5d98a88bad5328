"""Bandits, and policies that do not learn, on the timestep environment.

    python agents/train_bandit.py --algo ucb
    python agents/train_bandit.py --algo fixed --bandit.timestep 160
    python agents/train_bandit.py --resume runs/NAME              # after Ctrl-C or a kill

Same configuration, TensorBoard tags and summary as ``train_reinforce``.

Shape letters: A arms.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from agents.command_line import guarded, parse
from repfusion_env.actions import action_kind, names_of_kinds
from repfusion_env.registry import did_you_mean

if TYPE_CHECKING:
    from agents.bandits import Policy
    from agents.session import Session
    from repfusion_env.config import ExperimentConfig
    from repfusion_env.envs import RepFusionVectorEnv

PROG = "train_bandit"
ALGORITHMS: dict[str, str] = {
    "random": "any timestep of the grid",
    "fixed": "always bandit.timestep",
    "annealed": "from bandit.start to bandit.end over the run",
    "epsilon_greedy": "the best timestep so far, now and then any",
    "ucb": "discounted UCB1",
    "thompson": "Thompson sampling, a Gaussian for each timestep",
    "linear": "contextual Thompson sampling, a ridge regression for each timestep",
}
DESCRIPTION = (
    "Choose the diffusion timestep for each image by a bandit or without learning, while the "
    f"student is distilled: {', '.join(ALGORITHMS)}."
)
SCHEDULED = ("fixed", "annealed")


def conflicts(config: ExperimentConfig) -> list[str]:
    """What cannot be run, one sentence each."""
    bandit, found = config.bandit, []
    if bandit.algo not in ALGORITHMS:
        found.append(
            f"bandit.algo: there is no algorithm '{bandit.algo}'."
            f"{did_you_mean(bandit.algo, ALGORITHMS)} Allowed: {', '.join(ALGORITHMS)}"
        )
    kind = action_kind(config.env.action)
    if kind != "Discrete":
        found.append(
            f"env.action: bandits choose one of a list, but '{config.env.action}' is a {kind} "
            f"space; allowed: {', '.join(names_of_kinds(('Discrete',)))}"
        )
    elif bandit.algo in SCHEDULED and config.env.action == "layer":
        found.append(
            f"bandit.algo: '{bandit.algo}' names timesteps, but under env.action 'layer' there is "
            "one and the teacher's layer is chosen; name the layer in teacher.layers instead, with "
            "env.action discrete"
        )
    return found + _grid_conflicts(config)


def _grid_conflicts(config: ExperimentConfig) -> list[str]:
    bandit, grid, found = config.bandit, config.timesteps.grid(), []
    allowed = ", ".join(map(str, grid))
    if bandit.algo == "fixed" and bandit.timestep is None:
        found.append(f"bandit.timestep: 'fixed' needs one; allowed: {allowed}")
    if bandit.algo == "fixed" and bandit.timestep is not None and bandit.timestep not in grid:
        wanted = bandit.timestep
        closest = min(grid, key=lambda timestep: abs(timestep - wanted))
        found.append(
            f"bandit.timestep: {wanted} is not in the grid; the closest one is {closest}; "
            f"allowed: {allowed}"
        )
    if bandit.algo == "annealed":
        low, high = min(grid), max(grid)
        for name, given in (("start", bandit.start), ("end", bandit.end)):
            if given is not None and not low <= given <= high:
                found.append(
                    f"bandit.{name}: {given} lies outside the grid; the closest one is "
                    f"{low if given < low else high}; allowed: {low} to {high}"
                )
    return found


def build_policy(env: RepFusionVectorEnv, seed: int) -> Policy:
    """The configured policy over the arms of ``env``.

    Raises:
        ConfigError: It does not fit, one sentence each.
    """
    import torch

    from agents import bandits, schedules
    from repfusion_env.config_loading import ConfigError
    from repfusion_env.noise import derive_seed

    if problems := conflicts(env.config):
        raise ConfigError(problems)
    config, device = env.config.bandit, env.device
    valid = torch.from_numpy(env.action_masks()[0]).to(device)  # (A,)
    arms = torch.arange(len(valid), device=device)
    kinds: dict[str, type[bandits.ArmBandit]] = {
        "epsilon_greedy": bandits.EpsilonGreedy,
        "ucb": bandits.UpperConfidence,
        "thompson": bandits.Thompson,
    }
    policy: Any
    if config.algo in kinds:
        policy = kinds[config.algo](valid, config)
    elif config.algo == "linear":
        generator = torch.Generator(device).manual_seed(derive_seed(seed, "projection"))
        width = prod(env.single_observation_space.shape or ())
        policy = bandits.LinearThompson(valid, config, width, generator)
    elif config.algo == "random":
        policy = schedules.Uniform(valid, derive_seed(seed, "judged choices"))
    else:
        timesteps = env.actions.choice(arms).timesteps[:, 0]
        if config.algo == "fixed":
            found = timesteps.tolist()
            if config.timestep not in found:  # of an action space of the user's own
                raise ConfigError(
                    [
                        f"bandit.timestep: no arm of env.action '{env.config.env.action}' is "
                        f"{config.timestep}; allowed: {', '.join(map(str, sorted(set(found))))}"
                    ]
                )
            policy = schedules.Fixed(found.index(config.timestep))
        else:
            grid = env.grid.timesteps
            start = max(grid) if config.start is None else config.start
            end = min(grid) if config.end is None else config.end
            policy = schedules.Annealed(timesteps, valid, start, end)
    return policy.to(device)


def train(session: Session) -> None:
    """Train from where the session stands to the end of its decisions."""
    import torch

    from repfusion_env.noise import derive_seed

    env, config = session.env, session.config
    policy: Any = build_policy(env, config.seed)
    generator = torch.Generator(env.device).manual_seed(derive_seed(config.seed, "choices"))
    step = 0
    if session.restored is not None:
        step, state = session.restored
        policy.load_state_dict(state["agent"]["policy"])
        generator.set_state(state["agent"]["generator"].cpu())
        observation = env.load_state_dict(state["env"])
    else:
        observation, _ = env.reset(seed=config.seed)

    last = config.total_steps
    with session.progress(step) as progress:
        while step < last:
            action = policy.act(observation, step / max(last - 1, 1), generator)
            seen = observation
            observation, reward, _, _, _ = env.step(action)
            figures = policy.learn(seen, action, reward)
            step += 1
            if session.due(step, 1, config.run.log_every) or step >= last:
                session.log(step, progress, {name: float(x) for name, x in figures.items()})
            if config.evaluation.every and session.due(step, 1, config.evaluation.every):
                session.evaluate(step, policy.greedy)
            due = session.due(step, 1, config.run.checkpoint_every)
            if due or session.interrupted or step >= last:
                agent = {"policy": policy.state_dict(), "generator": generator.get_state()}
                session.save(step, {"env": env.state_dict(), "agent": agent})
    session.finish(step, policy.greedy, policy)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def run() -> int:
        command = parse(
            argv,
            prog=PROG,
            description=DESCRIPTION,
            aliases={"algo": "bandit.algo"},
            conflicts=conflicts,
            hidden=("reinforce", "sb3"),
        )
        name = "bandit" if command.config is None else f"bandit-{command.config.bandit.algo}"
        from agents.session import run_session

        return run_session(command, agent=name, train=train)

    return guarded(run, PROG)


if __name__ == "__main__":
    sys.exit(main())
