from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm_processes import WarmProcess

from agents.train_reinforce import main as train_reinforce
from agents.train_sb3 import main as train_sb3
from repfusion_env.runs import Run

pytestmark = pytest.mark.slow

LANES, STEPS = 8, 70
SHORT = {
    "env.num_envs": LANES,
    "run.decisions": LANES * STEPS,
    "run.log_every": 7,
    "run.checkpoint_every": 10,
    "evaluation.every": 35,
    "optimizer.batch_size": 12,
    "student.ema": 0.9,
    "reinforce.baseline": "value",
}
SB3 = {
    "ppo": {"n_steps": 4, "batch_size": 16, "n_epochs": 2},
    "dqn": {"learning_starts": 64, "batch_size": 32, "buffer_size": 400, "train_freq": 1},
}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a training command as a process of its own."""
    processes = []

    def start(script: str, *options: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", f"agents.{script}", *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def newest_step(run: Path) -> int:
    names = [path.stem for path in (run / "checkpoints").glob("step-*.ckpt")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[Callable[..., WarmProcess]]:
    """Starts a training command where everything is imported already."""
    processes = []

    def start(script: str, *options: str) -> WarmProcess:
        said = tmp_path / f"said-{len(processes)}"
        processes.append(WarmProcess(f"agents.{script}", list(options), said))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while newest_step(run) < step:
        assert process.poll() is None, f"it ended before step {step}: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def assert_same_end(found: Path, expected: Path, logged: Callable[[Path], Any]) -> None:
    assert logged(found) == logged(expected)
    for weights in ("student", "policy"):
        ours = load_file(found / f"{weights}.safetensors")
        theirs = load_file(expected / f"{weights}.safetensors")
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=f"{weights}: {name}")


def assert_no_duplicates(run: Path, logged: Callable[[Path], Any]) -> None:
    rows = [row for row in logged(run) if "reward/mean" in row]
    decisions = [row["decisions"] for row in rows]
    assert decisions == sorted(set(decisions))
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars
    assert [event.step for event in events("reward/mean")] == decisions
    values = [row["reward/mean"] for row in rows]
    assert [event.value for event in events("reward/mean")] == pytest.approx(values)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


def uninterrupted(experiment: Callable[..., Path], once: Path) -> Path:
    """A REINFORCE run that nothing has disturbed; trained once, only to be read."""
    if not (once / "whole").exists():
        config = experiment("whole", **{**SHORT, "run.folder": str(once)})
        assert train_reinforce(["--config", str(config), "--run.name", "whole"]) == 0
    return once / "whole"


@pytest.fixture
def finished(experiment: Callable[..., Path], tmp_path: Path, once: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(uninterrupted(experiment, once), tmp_path / "whole"))


@pytest.mark.parametrize("agent", ["reinforce", "ppo", "dqn"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    agent: str,
    experiment: Callable[..., Path],
    warm: Callable[..., WarmProcess],
    once: Path,
    logged: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    script, more = "train_reinforce", {}
    if agent in SB3:
        script, more = "train_sb3", {"sb3.algo": agent, "sb3.arguments": SB3[agent]}
    config = str(experiment(**{**SHORT, **more}))

    process = warm(script, "--config", config, "--run.name", "killed")
    run = tmp_path / "killed"
    target = chance.randint(1, STEPS - 30)
    process.wait_until(lambda: newest_step(run) >= target)
    time.sleep(chance.uniform(0.0, 0.03))
    process.signal(signal.SIGKILL)
    assert process.code() == -signal.SIGKILL
    at = newest_step(run)
    process = warm(script, "--resume", str(run))
    if agent in SB3:
        assert train_sb3(["--config", config, "--run.name", "whole"]) == 0
        whole = tmp_path / "whole"
    else:
        whole = uninterrupted(experiment, once)
    assert process.code() == 0, process.said()

    where = f"killed after checkpoint {at} (seed {seed})"
    assert 0 < at < STEPS, where
    try:
        assert_same_end(run, whole, logged)
        assert_no_duplicates(run, logged)
    except AssertionError as error:
        error.add_note(where)
        raise


def test_ctrl_c_saves_and_says_how_to_go_on(
    experiment: Callable[..., Path],
    start: Callable[..., subprocess.Popen[str]],
    once: Path,
    logged: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    config = str(experiment(**{**SHORT, "run.checkpoint_every": 30}))
    process = start("train_reinforce", "--config", config, "--run.name", "stopped")
    run = tmp_path / "stopped"
    wait_for_step(process, run, 30)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate()
    assert process.returncode == 130, said
    assert newest_step(run) not in (30, 60, STEPS), (
        "what was done since the last checkpoint is lost"
    )
    assert said.splitlines()[-1] == f"go on with: python -m agents.train_reinforce --resume {run}"
    assert out == ""
    assert "Traceback" not in said
    assert train_reinforce(said.split("train_reinforce ")[-1].split()) == 0
    assert_same_end(run, uninterrupted(experiment, once), logged)
    assert_no_duplicates(run, logged)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    finished: Path,
    tmp_path: Path,
    logged: Callable[[Path], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(finished, run)
    for end in ("summary.json", "summary.png", "student.safetensors", "policy.safetensors"):
        (run / end).unlink()
    newest = run / "checkpoints" / f"step-{STEPS:09d}.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()

    assert train_reinforce(["--resume", str(run)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        f"warning: checkpoint '{newest}' is damaged (its checksum is wrong); "
        f"using 'step-{STEPS - 10:09d}.ckpt' (step {STEPS - 10}) instead"
    )
    assert_same_end(run, finished, logged)
    assert_no_duplicates(run, logged)


def test_a_finished_run_is_left_as_it_is(
    finished: Path, logged: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train_reinforce(["--resume", str(finished)]) == 0
    said = capsys.readouterr()
    assert said.err == f"the run is complete; see {finished / 'summary.json'}\n"
    assert said.out == ""
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert after.pop(finished / ".lock") and before.pop(finished / ".lock")
    assert after == before


def test_a_run_killed_during_its_final_evaluation_ends_the_same(
    finished: Path, tmp_path: Path, logged: Callable[[Path], Any]
) -> None:
    run = tmp_path / "nearly"
    shutil.copytree(finished, run)
    for end in ("summary.json", "summary.png", "policy.safetensors"):
        (run / end).unlink()
    assert train_reinforce(["--resume", str(run)]) == 0
    assert_same_end(run, finished, logged)
    assert_no_duplicates(run, logged)
    assert (run / "summary.png").stat().st_size > 0


def test_what_cannot_be_resumed_is_refused_in_one_sentence(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "summary.json").unlink()
    (tmp_path / "empty").mkdir()

    def refusal(*options: str) -> str:
        capsys.readouterr()
        assert train_reinforce(["--resume", *options]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        return said.err

    said = refusal(str(tmp_path / "hole"))
    assert f"there is no run folder '{tmp_path / 'hole'}'. Did you mean 'whole'?" in said
    assert f"'{tmp_path / 'empty'}' is no run folder: it has no run.json" in refusal(
        str(tmp_path / "empty")
    )
    said = refusal(str(finished), "--seed", "3")
    assert "a run goes on with its own configuration; give no other options" in said
    with Run.resume(finished):
        said = refusal(str(finished))
        assert f"run '{finished}' is being written by process {os.getpid()} on" in said
    for checkpoint in (finished / "checkpoints").iterdir():
        checkpoint.write_bytes(b"not ours")
    said = refusal(str(finished))
    assert f"no checkpoint in '{finished / 'checkpoints'}' can be used: " in said
    Run.resume(finished).close()  # nobody holds it any longer

    capsys.readouterr()
    assert train_sb3(["--resume", str(finished)]) == 2
    said = capsys.readouterr().err
    assert f"'{finished}' was trained by reinforce; use python -m agents.train_reinforce" in said


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    finished: Path,
    tmp_path: Path,
    logged: Callable[[Path], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "early"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints")
    assert train_reinforce(["--resume", str(run)]) == 0
    assert "no checkpoint yet: starting from the beginning" in capsys.readouterr().err
    assert_same_end(run, finished, logged)
    assert_no_duplicates(run, logged)
