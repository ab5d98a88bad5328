"""Does the look-ahead reward rank timesteps well under every distillation loss?

    python -m benchmarks.lookahead --seeds 3 --losses hint crd

For each loss a student is distilled at random timesteps; then every (held-out image, timestep) pair
is judged by the look-ahead reward under each move. Reported per loss and move: Spearman's rank
correlation over the grid between the mean reward and the linear-probe accuracy of the teacher's
feature at that timestep, and the timestep that the mean reward puts first. The probe knows nothing
of the student, so the correlation is an outside check of the reward.

Shape letters: K grid length.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from agents.evaluation import reward_table
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.features import chunks

SUMMARY = "Does the look-ahead reward rank timesteps well under every distillation loss?"

LOSSES: dict[str, dict[str, Any]] = {
    "hint": {"losses": {"hint": 1.0}},
    "hint (dense)": {"losses": {"hint": 1.0}, "dense": True},
    "l1": {"losses": {"l1": 1.0}},
    "normalized_l2": {"losses": {"normalized_l2": 1.0}},
    "cosine": {"losses": {"cosine": 1.0}},
    "attention (dense)": {"losses": {"attention": 1000.0}, "dense": True},
    "rkd_distance": {"losses": {"rkd_distance": 25.0}},
    "rkd_angle": {"losses": {"rkd_angle": 50.0}},
    "rkd (dense)": {"losses": {"rkd_distance": 25.0, "rkd_angle": 50.0}, "dense": True},
    "hint + cosine": {"losses": {"hint": 1.0, "cosine": 1.0}},
    "similarity_preserving": {"losses": {"similarity_preserving": 3000.0}},
    "pkt": {"losses": {"pkt": 30000.0}},
    "correlation_congruence": {"losses": {"correlation_congruence": 0.02}},
    "dist": {"losses": {"dist": 1.0}},
    "vid": {"losses": {"vid": 1.0}},
    "factor_transfer": {"losses": {"factor_transfer": 200.0}},
    "infonce": {"losses": {"infonce": 1.0}},
    "crd": {"losses": {"crd": 0.8}},
    "hint, pyramid": {"losses": {"hint": 1.0}, "projection": "pyramid"},
    "hint, pyramid (dense)": {
        "losses": {"hint": 1.0},
        "projection": "pyramid",
        "dense": True,
    },
    "DreamTeacher (dense)": {
        "losses": {"hint": 1.0, "attention": 10.0},
        "projection": "pyramid",
        "dense": True,
    },
}
MOVES: dict[str, dict[str, Any]] = {
    "gauss_newton": {"lookahead": "gauss_newton"},
    "gradient 0.5": {"lookahead": "gradient", "eta": 0.5},
    "gradient 0.05": {"lookahead": "gradient", "eta": 0.05},
}


def probe_accuracy(env: RepFusionVectorEnv) -> np.ndarray:
    """Held-out accuracy of a logistic regression on each timestep's feature, (K,)."""
    from sklearn.linear_model import LogisticRegression

    parts = env.trainer.parts

    def features(bank: Any, timestep: int) -> np.ndarray:
        ids = torch.arange(len(bank), device=env.device)
        pieces = []
        for part in chunks(ids):
            at = torch.full_like(part, timestep)
            layers = parts.features(bank, part, at, torch.zeros_like(part), 7)
            pieces.append(torch.cat([z.mean((2, 3)) if z.ndim == 4 else z for z in layers], dim=1))
        return torch.cat(pieces).cpu().numpy()

    accuracies = []
    for timestep in env.grid.timesteps:
        probe = LogisticRegression(max_iter=300)
        probe.fit(features(parts.train, timestep), parts.train.labels.cpu().numpy())
        score = probe.score(features(parts.heldout, timestep), parts.heldout.labels.cpu().numpy())
        accuracies.append(score)
    return np.array(accuracies)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors (K,)."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.lookahead", description=SUMMARY)
    parser.add_argument("--seeds", type=int, default=3, help="students per loss (default: 3)")
    parser.add_argument("--steps", type=int, default=400, help="steps of 64 lanes (default: 400)")
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help="which"
    )
    arguments = parser.parse_args()
    print("| loss | move | rank correlation with the probe | first timestep |")
    print("| --- | --- | --- | --- |")
    reference: np.ndarray | None = None
    for name in arguments.losses:
        distillation = LOSSES[name]
        found: dict[str, list[tuple[float, int]]] = {move: [] for move in MOVES}
        for seed in range(arguments.seeds):
            env = RepFusionVectorEnv(config="digits", seed=seed, distillation=distillation)
            if reference is None:
                reference = probe_accuracy(env)
            env.reset(seed=seed)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(arguments.steps):
                env.step(torch.randint(len(env.grid), (env.num_envs,), generator=generator))
            for move, settings in MOVES.items():
                table = judged(env, settings)
                first = env.grid.timesteps[int(table.argmax())]
                found[move].append((rank_correlation(table, reference), first))
        for move, values in found.items():
            correlations = np.array([value for value, _ in values])
            spread = (
                f"{correlations.mean():.2f} [{correlations.min():.2f}, {correlations.max():.2f}]"
            )
            print(f"| {name} | {move} | {spread} | {[first for _, first in values]} |", flush=True)


def judged(env: RepFusionVectorEnv, settings: dict[str, Any]) -> np.ndarray:
    """Mean held-out reward of each timestep under one move, (K,)."""
    from dataclasses import replace

    trainer = env.trainer
    before = trainer.config
    trainer.config = replace(before, reward=replace(before.reward, **settings))
    try:
        return reward_table(trainer, trainer.parts.heldout, len(trainer.parts.heldout)).mean(0)
    finally:
        trainer.config = before


if __name__ == "__main__":
    main()
