from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from agents.schedules import Annealed, Fixed, Uniform
from agents.train_bandit import build_policy, main
from repfusion_env.envs import RepFusionVectorEnv

LANES, STEPS = 8, 10
SHORT = {
    "env.num_envs": LANES,
    "run.decisions": LANES * STEPS,
    "run.log_every": 1,
    "run.checkpoint_every": 5,
}
TWO_LAYERS = {"teacher.layers": ["down_blocks.0.resnets.0", "mid_block.resnets.1.conv2"]}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "--algo tompson",
            "bandit.algo: there is no algorithm 'tompson'. Did you mean 'thompson'? "
            "Allowed: random, fixed, annealed, epsilon_greedy, ucb, thompson, linear",
        ),
        (
            "--algo fixed --timesteps.values [0,50]",
            "bandit.timestep: 'fixed' needs one; allowed: 0, 50",
        ),
        (
            "--algo fixed --bandit.timestep 330 --timesteps.values [0,300,400]",
            "bandit.timestep: 330 is not in the grid; the closest one is 300; allowed: 0, 300, 400",
        ),
        (
            "--algo annealed --bandit.start 961",
            "bandit.start: 961 lies outside the grid; the closest one is 960; allowed: 0 to 960",
        ),
        (
            "--algo annealed --bandit.end 3 --timesteps.values [10,20]",
            "bandit.end: 3 lies outside the grid; the closest one is 10; allowed: 10 to 20",
        ),
        (
            "--env.action timestep_set",
            "env.action: bandits choose one of a list, but 'timestep_set' is a MultiDiscrete "
            "space; allowed: discrete, layer",
        ),
        (
            "--algo annealed --env.action layer --timesteps.values 40",
            "bandit.algo: 'annealed' names timesteps, but under env.action 'layer' there is one",
        ),
    ],
)
def test_what_bandits_cannot_do_is_refused(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
):
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train_bandit: error: {sentence}")


def test_refusals_and_help_load_nothing_heavy():
    code = """
import sys
from agents.train_bandit import main
try:
    main(["--help"])
except SystemExit:
    pass
assert main(["--algo", "fixed"]) == 2
print({"torch", "diffusers", "matplotlib", "sklearn"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "--bandit.discount NUMBER" in done.stdout
    assert "--reinforce." not in done.stdout


def test_a_fixed_timestep_is_the_only_choice_and_random_and_annealed_are_what_they_say():
    observations, generator = torch.zeros(4000, 3), torch.Generator().manual_seed(0)
    assert set(Fixed(2).act(observations, 0.5, generator).tolist()) == {2}

    valid = torch.tensor([True, False, True, True])
    uniform = Uniform(valid, seed=7)
    shares = torch.bincount(uniform.act(observations, 0.0, generator), minlength=4) / 4000
    np.testing.assert_allclose(shares, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.03)
    before = generator.get_state()
    assert torch.equal(uniform.greedy(observations), uniform.greedy(observations))
    assert torch.equal(generator.get_state(), before)

    timesteps = torch.tensor([100, 0, 300, 200])  # in no order
    annealed = Annealed(timesteps, valid, start=300, end=0)
    path = [int(annealed.act(observations, x, generator)[0]) for x in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert timesteps[path].tolist() == [300, 200, 100, 100, 100]  # 0 is closed
    assert set(annealed.greedy(observations).tolist()) == {0}


@pytest.mark.parametrize(
    ("algo", "more"),
    [
        ("annealed", {}),
        ("linear", {"evaluation.every": 5, "timesteps.min_snr": 0.1}),
        ("ucb", {"env.action": "layer", "timesteps.values": [200], **TWO_LAYERS}),
    ],
)
def test_a_run_leaves_what_all_agents_leave_and_goes_on_exactly(
    algo: str,
    more: dict[str, Any],
    experiment: Callable[..., Path],
    logged: Callable[[Path], Any],
    undrawn: Callable[[], AbstractContextManager[None]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    config = str(experiment(**{**SHORT, **more, "bandit.algo": algo}))
    assert main(["--config", config, "--run.name", "whole"]) == 0
    assert "python -m agents.train_bandit --config" in capsys.readouterr().out
    whole, run = tmp_path / "whole", tmp_path / "again"
    summary = json.loads((whole / "summary.json").read_text(encoding="utf-8"))
    assert summary["agent"] == f"bandit-{algo}"
    assert summary["decisions"] == LANES * STEPS
    assert np.isfinite([summary["reward"]["learned"], summary["reward"]["random"]]).all()

    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    sorted((run / "checkpoints").iterdir())[-1].unlink()
    with undrawn():
        assert main(["--resume", str(run)]) == 0
    assert logged(run) == logged(whole)
    for weights in ("policy", "student"):
        ours, theirs = (load_file(path / f"{weights}.safetensors") for path in (run, whole))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key], value, err_msg=f"{weights}: {key}")
    if algo == "annealed":
        chosen = [row["timestep/mean"] for row in logged(whole) if "timestep/mean" in row]
        grid = np.array([0, 200, 400, 600, 800])
        line = 800 * (1 - np.arange(STEPS) / (STEPS - 1))
        assert chosen == [grid[np.abs(grid - wanted).argmin()] for wanted in line]
        assert summary["timestep"] == {"mean": 0.0, "deviation": 0.0}


def test_timesteps_that_masks_close_are_chosen_by_fixed_alone(tiny: dict[str, Any]):
    def chosen(**bandit: Any) -> set[int]:
        env = RepFusionVectorEnv(config=tiny, timesteps={"min_snr": 0.1}, bandit=bandit)
        observations, _ = env.reset(seed=0)
        policy = build_policy(env, 0)
        generator = torch.Generator().manual_seed(0)
        many = observations.repeat(50, 1)
        timesteps = torch.tensor(env.grid.timesteps)
        return set(timesteps[policy.act(many, 0.0, generator)].tolist())

    assert chosen(algo="random") == {0, 200, 400}  # SNR of 600 is 0.03
    assert chosen(algo="annealed") == {400}
    assert chosen(algo="thompson") == {0, 200, 400}
    assert chosen(algo="fixed", timestep=800) == {800}
