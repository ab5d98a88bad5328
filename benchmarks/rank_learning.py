"""Whether two ranks learn what one process learns: the same runs over seeds, both ways.

    python -m benchmarks.rank_learning --seeds 5 --json FILE           # digits; ten minutes
    python -m benchmarks.rank_learning --seeds 3 --run.decisions 6400

Options beside those of ``--help`` are the training command's, ``--key value``. Each seed is trained
by ``agents.train_reinforce`` in one process and by two ranks under torchrun. Rounding aside both
are the same computation; rounding grows, so what is compared is the learning curve: the mean reward
of training, in parts of the run, and what is measured at its end. An interval is that of the mean
difference over seeds (Student's t, 95 %); the curves agree where it holds 0 or the difference is
smaller than the seeds' own spread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import add_seeds, check_seeds
from repfusion_env.atomic import write_text

PARTS = 5


def run(folder: Path, seed: int, ranks: int, options: Sequence[str]) -> dict[str, Any]:
    """One run; its curve in :data:`PARTS` parts and its end.

    Args:
        folder: For run folders.
        seed: Of everything.
        ranks: 1: without torchrun.
        options: Of the training command.

    Raises:
        RuntimeError: The command failed; what it said is on stderr.
    """
    name = f"seed-{seed}-ranks-{ranks}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "agents.train_reinforce"]
    command += ["--seed", str(seed), "--run.folder", str(folder), "--run.name", name, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}")
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rewards = [row["reward/mean"] for row in map(json.loads, lines) if "reward/mean" in row]
    summary = json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))
    return {
        "curve": [float(part.mean()) for part in np.array_split(np.array(rewards), PARTS)],
        "reward": summary["reward"]["learned"],
        "accuracy": summary["student"]["linear_probe_accuracy"],
        "seconds": summary["seconds"],
    }


def compared(one: Sequence[float], two: Sequence[float]) -> dict[str, float]:
    """Means, the paired difference with its 95 % half-width, and the seeds' deviation."""
    from scipy import stats

    differences = [b - a for a, b in zip(one, two, strict=True)]
    factor = float(stats.t.ppf(0.975, len(differences) - 1))
    return {
        "one": statistics.mean(one),
        "two": statistics.mean(two),
        "difference": statistics.mean(differences),
        "half_width": factor * statistics.stdev(differences) / len(differences) ** 0.5,
        "deviation": statistics.stdev(one),
    }


def table(found: dict[str, dict[str, float]], seeds: int) -> str:
    """The result in Markdown."""
    rows = [
        "| | one process | two ranks | difference, 95 % interval | deviation over seeds |",
        "| --- " * 5 + "|",
    ]
    for name, row in found.items():
        low, high = (row["difference"] + sign * row["half_width"] for sign in (-1, 1))
        rows.append(
            f"| {name} | {row['one']:.4f} | {row['two']:.4f} | {row['difference']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}] | {row['deviation']:.4f} |"
        )
    return "\n".join([*rows, "", f"{seeds} seeds, each both ways."])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rank_learning", description=(__doc__ or "").split("\n")[0]
    )
    add_seeds(parser)
    chosen, options = parser.parse_known_args(argv)
    check_seeds(parser, chosen)
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(chosen.seeds):
            for ranks, done in runs.items():
                done.append(run(Path(folder), seed, ranks, options))
                print(f"seed {seed}, ranks {ranks}: {done[-1]['seconds']:.0f} s", file=sys.stderr)
    one, two = runs[1], runs[2]
    found = {
        f"reward of training, part {part + 1} of {PARTS}": compared(
            [each["curve"][part] for each in one], [each["curve"][part] for each in two]
        )
        for part in range(PARTS)
    }
    ends = {"reward": "held-out reward", "accuracy": "linear probe accuracy"}
    for key, title in ends.items():
        if one[0][key] is not None:
            found[title] = compared([each[key] for each in one], [each[key] for each in two])
    print(table(found, chosen.seeds))
    if chosen.json is not None:
        kept = {"compared": found, "one": one, "two": two}
        write_text(chosen.json, json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
