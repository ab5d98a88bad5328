"""Stable-Baselines3's algorithms on the timestep environment.

    python agents/train_sb3.py --algo ppo
    python agents/train_sb3.py --algo sac --env.action continuous
    python agents/train_sb3.py --resume runs/NAME                 # after Ctrl-C or a kill

Same configuration, TensorBoard tags and summary as ``train_reinforce``; SB3's own tags stay.
"""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agents.command_line import guarded, parse

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from torch import Tensor

    from agents.sb3_callback import SessionCallback
    from agents.session import Session
    from repfusion_env.config import ExperimentConfig
    from repfusion_env.sb3 import RepFusionVecEnv

PROG = "train_sb3"
DESCRIPTION = (
    "Train a Stable-Baselines3 policy that chooses the diffusion timestep for each image while the "
    "student is distilled: ppo, a2c, dqn, qrdqn, trpo, recurrent_ppo, maskable_ppo, ars; with "
    "--env.action continuous or continuous_timestep also sac, td3, ddpg, tqc, crossq."
)


def build_model(session: Session, env: RepFusionVecEnv) -> BaseAlgorithm:
    """The configured algorithm on ``env``, seeded.

    Raises:
        ValueError: ``sb3.arguments`` or ``sb3.policy`` do not fit the algorithm.
    """
    from agents.sb3_algorithms import check_arguments

    config = session.config
    algorithm = check_arguments(config)
    arguments: dict[str, Any] = {**algorithm.arguments, **config.sb3.arguments}
    sizes = {"n_steps", "batch_size"}
    if sizes <= algorithm.arguments.keys() and not sizes & config.sb3.arguments.keys():
        # Our mini-batch is one for 64 lanes; a rollout of a few holds less.
        rollout = arguments["n_steps"] * env.num_envs
        arguments["batch_size"] = min(arguments["batch_size"], rollout)
    policy = algorithm.policy if config.sb3.policy == "auto" else config.sb3.policy
    if len(env.observation_space.shape or ()) == 3 and "policy_kwargs" not in arguments:
        from agents.sb3_pixels import PixelFeatures

        arguments["policy_kwargs"] = {
            "features_extractor_class": PixelFeatures,
            "normalize_images": False,
        }
    kind = algorithm.load()
    if "stats_window_size" in inspect.signature(kind).parameters:
        # SB3 averages over 100 episodes, which is less than two steps of 64 one-step lanes.
        arguments.setdefault("stats_window_size", env.num_envs * min(config.total_steps, 16))
    try:
        return kind(policy, env, seed=config.seed, device=config.sb3.device, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"sb3: {config.sb3.algo} with policy '{policy}' and arguments "
            f"{dict(config.sb3.arguments)} was refused: {error}"
        ) from error


def train(session: Session) -> None:
    """Train from where the session stands to the end of its decisions."""
    from stable_baselines3.common.logger import Logger

    from agents.sb3_callback import LatestValues, SessionCallback
    from agents.sb3_state import capture, restore
    from repfusion_env.atomic import atomic_file
    from repfusion_env.runs import writing
    from repfusion_env.sb3 import RepFusionVecEnv

    env = RepFusionVecEnv(session.env)
    model = build_model(session, env)
    values = LatestValues()
    model.set_logger(Logger(folder=None, output_formats=[values]))
    step = 0
    if session.restored is not None:
        step, saved = session.restored
        restore(model, saved["agent"])
        session.env.load_state_dict(saved["env"])
        env.load_state_dict(saved["adapter"])
        values.values = dict(saved["latest"])

    def state() -> dict[str, Any]:
        return {
            "env": session.env.state_dict(),
            "adapter": env.state_dict(),
            "agent": capture(model),
            "latest": dict(values.values),
        }

    def greedy(observations: Tensor) -> Tensor:
        import torch

        keywords: dict[str, Any] = {}
        if session.config.sb3.algo == "maskable_ppo":
            keywords["action_masks"] = session.env.action_masks()[:1].repeat(len(observations), 0)
        actions, _ = model.predict(observations.cpu().numpy(), deterministic=True, **keywords)
        return torch.as_tensor(actions, device=session.env.device)

    remaining = session.decisions(session.config.total_steps) - session.decisions(step)
    with session.progress(step) as progress:
        callback = SessionCallback(session, progress, values, state, greedy, step)
        if session.config.sb3.algo == "ars":
            _fit_ars(model, callback)
        if remaining > 0:
            model.learn(
                remaining,
                callback=callback,
                log_interval=_log_interval(model, session.config),
                reset_num_timesteps=step == 0,
            )
        _undo_fit(model)
        session.save(callback.steps, state())
    archive = io.BytesIO()
    model.save(archive)
    with writing(session.run.folder), atomic_file(session.run.folder / "model.zip") as file:
        file.write(archive.getvalue())
    session.finish(callback.steps, greedy, model.policy)


def _log_interval(model: BaseAlgorithm, config: ExperimentConfig) -> int:
    """When SB3 hands over its own figures: at each rollout; off policy about at each logged row.

    Off policy it counts episodes, and by default hands over several times within one step.
    """
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

    episodes = config.env.num_envs * config.run.log_every // config.env.episode_length
    return max(1, episodes) if isinstance(model, OffPolicyAlgorithm) else 1


def _fit_ars(model: Any, callback: SessionCallback) -> None:
    """Make ARS count and save as the other algorithms do.

    It reports each lane of a step as a step of all lanes, which would end the run too early,
    and a rollout when its noise is drawn already; a run can only go on from between two updates.
    """
    update, env = model._do_one_update, callback.session.env

    def count(_locals: Any, _globals: Any, callback: SessionCallback, n_envs: int) -> None:
        if callback.steps < env.steps:
            model.num_timesteps += n_envs
            callback.on_step()

    def update_after_saving(*arguments: Any) -> None:
        callback.save_if_due()
        update(*arguments)

    callback.saves_at_rollouts = False
    model._trigger_callback = count
    model._do_one_update = update_after_saving


def _undo_fit(model: Any) -> None:
    """Leave a model that SB3 can save."""
    for name in ("_trigger_callback", "_do_one_update"):
        vars(model).pop(name, None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def run() -> int:
        from agents.sb3_algorithms import check_arguments, conflicts

        command = parse(
            argv,
            prog=PROG,
            description=DESCRIPTION,
            aliases={"algo": "sb3.algo"},
            conflicts=conflicts,
            hidden=("reinforce", "bandit"),
        )
        name = "sb3"
        if command.config is not None:
            check_arguments(command.config)
            name = f"sb3-{command.config.sb3.algo}"
        from agents.session import run_session

        return run_session(command, agent=name, train=train)

    return guarded(run, PROG)


if __name__ == "__main__":
    sys.exit(main())
