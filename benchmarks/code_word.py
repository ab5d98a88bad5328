"""Can a choice be a code word for the label? A student under a code, and under its shuffled form.

    python -m benchmarks.code_word --seeds 5 --timesteps.values '[80, 120]'

Options beside those of ``--help`` are the training command's, ``--key value``.

The code always does arm ``label mod A``, of the A fixed actions of ``env.action``. The other
student gets the same actions, dealt out anew among the images of each step, with the same initial
weights, images and noise. Whatever the first one has more comes from the label through the choice,
for the code asks nothing of the image beside it. Another code may be worth more or less.

Shape letters: N lanes, M held-out images, A arms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agents.command_line import guarded, parse
from benchmarks.arguments import add_seeds, check_seeds
from benchmarks.learning import gain_over, probe
from repfusion_env.atomic import write_text
from repfusion_env.config import ExperimentConfig

if TYPE_CHECKING:
    from repfusion_env.vector_env import RepFusionVectorEnv

PROG = "python -m benchmarks.code_word"


def run_seed(env: RepFusionVectorEnv, seed: int, *, shuffled: bool) -> dict[str, float]:
    """Distil one student.

    Args:
        env: Whose trainer starts over.
        seed: Of student, images and noise.
        shuffled: Deal the code's actions out anew among the images of each step.

    Returns:
        ``held-out reward`` under the very choices that it was distilled with, ``held-out reward,
        best fixed``, and the accuracy of the linear probe by number of labels.
    """
    import torch

    from agents.evaluation import judge_choice, reward_table
    from repfusion_env.actions import arm_actions
    from repfusion_env.stream import ImageStream

    trainer, parts, lanes = env.trainer, env.trainer.parts, env.num_envs
    arms = arm_actions(env.actions, env.device)
    generator = torch.Generator().manual_seed(seed)

    def actions(labels: torch.Tensor) -> torch.Tensor:
        chosen = arms[labels % len(arms)]
        if shuffled:
            chosen = chosen[torch.randperm(len(labels), generator=generator).to(env.device)]
        return chosen

    trainer.reset(seed)
    stream = ImageStream(len(parts.train), env.device, shuffle=True)
    stream.reset(seed)
    for step in range(env.config.total_steps):
        ids = stream.take(lanes)
        visits = torch.arange(step * lanes, (step + 1) * lanes, device=env.device)
        trainer.step(ids, env.actions.choice(actions(parts.train.labels[ids])), visits)

    bank = parts.heldout
    everything = torch.arange(len(bank), device=env.device)
    coded = judge_choice(trainer, bank, everything, env.actions.choice(actions(bank.labels)))
    fixed = reward_table(trainer, bank, len(bank)).mean(axis=0)
    found = {"held-out reward": float(coded.mean()), "held-out reward, best fixed": fixed.max()}
    for labels, accuracy in probe(env).items():
        found[f"linear probe accuracy, {labels} labels"] = accuracy
    return {name: float(value) for name, value in found.items()}


def measure(experiment: ExperimentConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Both students of every seed.

    Returns:
        JSON-able: ``arms``, and by quantity ``code`` and ``shuffled`` (one number per seed) and
        ``gain`` as :func:`benchmarks.learning.gain_over` gives it.
    """
    from repfusion_env.vector_env import RepFusionVectorEnv

    env = RepFusionVectorEnv(config=experiment)
    runs = [
        [run_seed(env, seed, shuffled=shuffled) for shuffled in (False, True)] for seed in seeds
    ]
    quantities = {}
    for name in runs[0][0]:
        code, shuffled = ([pair[which][name] for pair in runs] for which in (0, 1))
        quantities[name] = {"code": code, "shuffled": shuffled, "gain": gain_over(code, shuffled)}
    return {"arms": [arm.label for arm in env.actions.arms], "quantities": quantities}


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    rows = ["| mean over seeds | code | shuffled | code - shuffled [95 %] |", "| --- " * 4 + "|"]
    for name, found in result["quantities"].items():
        means = [sum(found[kind]) / len(found[kind]) for kind in ("code", "shuffled")]
        gain = found["gain"]
        rows.append(
            f"| {name} | {means[0]:.4f} | {means[1]:.4f} | "
            f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}] |"
        )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=(__doc__ or "").split("\n")[0],
        epilog="Further options are those of agents.train_reinforce: --key value.",
        allow_abbrev=False,
    )
    add_seeds(parser)
    parser.add_argument("--config", default="digits", metavar="FILE", help="default: digits")
    chosen, others = parser.parse_known_args(argv)
    check_seeds(parser, chosen)

    def run() -> int:
        command = parse(["--config", chosen.config, *others], prog=PROG, description="")
        assert command.config is not None
        result = measure(command.config, range(chosen.seeds))
        print(table(result))
        if chosen.json is not None:
            write_text(chosen.json, json.dumps(result, indent=1) + "\n")
        return 0

    return guarded(run, PROG)


if __name__ == "__main__":
    sys.exit(main())
