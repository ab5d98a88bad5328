from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import free_port, together
from safetensors.torch import load_file

from agents.train_reinforce import Reinforce
from agents.train_reinforce import main as train_reinforce
from repfusion_env.ranks import ALONE, Ranks
from repfusion_env.vector_env import RepFusionVectorEnv

LANES, STEPS = 8, 9
SHORT = {
    "env.num_envs": LANES,
    "run.decisions": LANES * STEPS,
    "run.log_every": 3,
    "run.checkpoint_every": 4,
    "optimizer": {"batch_size": 16, "name": "sgd", "learning_rate": 0.02},
    "evaluation": {"every": 6, "images": 8, "probe_images": 40},
    "teacher.standardize_images": 8,
}


def run_all(ranks: Ranks, *options: str) -> int:
    """The command as each rank runs it; it has met the others already."""
    return train_reinforce(list(options))


def assert_same_run(found: Path, expected: Path, logged: Callable[[Path], Any]) -> None:
    rows, wanted = logged(found), logged(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for tag, value in other.items():
            assert row[tag] == pytest.approx(value, abs=2e-3, rel=2e-3), tag
    for weights in ("student", "policy"):
        ours, theirs = (load_file(run / f"{weights}.safetensors") for run in (found, expected))
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("baseline", ["batch", "value", "group"])
def test_the_policy_learns_from_all_ranks_lanes(baseline: str, tiny: dict[str, Any]):
    settings = {
        **tiny,
        "reinforce": {"baseline": baseline},
        "env": {"num_envs": 8, "group_size": 2},
    }
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(3, 8, 32, generator=generator)
    rewards = torch.randn(3, 8, generator=generator)

    def work(ranks: Ranks) -> Any:
        env = RepFusionVectorEnv(config=settings, ranks=ranks)
        agent = Reinforce(env, 0)
        own = [
            ranks.share(part.transpose(0, 1)).transpose(0, 1) for part in (observations, rewards)
        ]
        actions = [agent.policy.sample(seen, agent.generator, ranks) for seen in own[0]]
        figures = agent.update(own[0], torch.stack(actions), own[1], 0.5)
        ranks.mean_(list(figures.values()))
        gradients = [p.grad for p in agent.parameters]
        drawn = torch.stack([ranks.all(action) for action in actions])
        return [gradients, figures, drawn, agent.generator.get_state()]

    env = RepFusionVectorEnv(config=settings)
    shape = env.single_observation_space.shape
    assert shape is not None
    observations = observations[..., : shape[0]]
    expected = work(ALONE)
    for found in together(work, 2):
        torch.testing.assert_close(found, expected)


def test_choices_are_drawn_as_torch_draws_them(tiny: dict[str, Any]):
    env = RepFusionVectorEnv(config=tiny)
    agent = Reinforce(env, 0)
    observations = torch.randn(300, *(env.single_observation_space.shape or ()))
    same = torch.Generator().manual_seed(1)
    expected = torch.multinomial(agent.policy(observations).exp(), 1, generator=same)[:, 0]
    other = torch.Generator().manual_seed(1)
    assert torch.equal(agent.policy.sample(observations, other), expected)
    assert torch.equal(other.get_state(), same.get_state())


def test_two_ranks_leave_the_run_of_one_process(
    experiment: Callable[..., Path], logged: Callable[[Path], Any], tmp_path: Path
):
    config = str(experiment(**SHORT))
    assert train_reinforce(["--config", config, "--run.name", "one"]) == 0
    assert together(run_all, 2, "--config", config, "--run.name", "two") == [0, 0]
    assert_same_run(tmp_path / "two", tmp_path / "one", logged)
    one, two = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two"))
    assert two["decisions"] == one["decisions"] == LANES * STEPS
    assert two["reward"]["learned"] == pytest.approx(one["reward"]["learned"], abs=5e-3)
    # What one process began, two ranks end.
    run = tmp_path / "one"
    for end in ("summary.json", f"checkpoints/step-{STEPS:09d}.ckpt"):
        (run / end).unlink()
    assert together(run_all, 2, "--resume", str(run)) == [0, 0]
    assert_same_run(run, tmp_path / "two", logged)
    assert together(run_all, 2, "--resume", str(tmp_path / "one")) == [0, 0]  # is complete


def test_what_is_refused_is_said_once_and_leaves_no_run(
    experiment: Callable[..., Path], capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    config = str(experiment(**SHORT))
    cases = {
        "env.num_envs: 7 lanes cannot be shared by 2 ranks": ("--env.num_envs", "7"),
        "there is no run folder": ("--resume", str(tmp_path / "nowhere")),
        "device: 'cuda:0' names one GPU": ("--device", "cuda:0"),
    }
    for sentence, options in cases.items():
        given = options if "--resume" in options else ("--config", config, *options)
        assert together(run_all, 2, *given) == [2, 2]
        said = capfd.readouterr().err
        assert said.count(sentence) == 1, said
        assert "Traceback" not in said
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def interrupted(ranks: Ranks, folder: str, *options: str) -> int:
    """As :func:`run_all`, but rank 1 alone is told to stop once there is a checkpoint."""
    if ranks.index == 1:
        import threading

        def stop() -> None:
            while not list(Path(folder).glob("checkpoints/*.ckpt")):
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop, daemon=True).start()
    return train_reinforce(list(options))


def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_step(
    experiment: Callable[..., Path],
    logged: Callable[[Path], Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    config = str(experiment(**{**SHORT, "run.decisions": LANES * 400, "evaluation.every": 0}))
    folder = tmp_path / "stopped"
    options = ("--config", config, "--run.name", "stopped")
    assert together(interrupted, 2, str(folder), *options) == [130, 130]
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("go on with: torchrun --nproc_per_node 2 -m agents.train_reinforce")
    steps = sorted(path.stem for path in (folder / "checkpoints").glob("*.ckpt"))
    assert 4 <= int(steps[-1].removeprefix("step-")) < 400
    assert not (folder / "summary.json").exists()


@pytest.mark.slow
def test_torchrun_starts_it(experiment: Callable[..., Path], tmp_path: Path):
    config = str(experiment(**{**SHORT, "run.decisions": LANES * 4, "evaluation.every": 0}))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_port", str(free_port()), "-m", "agents.train_reinforce"),
        *("--config", config, "--run.name", "run"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["decisions"] == LANES * 4
    assert done.stderr.count("evaluating on held-out images") == 1
