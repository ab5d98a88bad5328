"""A built wheel does the main job in another environment, outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[1]
TEACHER = "repfusion_env/teachers/digits"
SECONDS = 100

# The environment as a script makes it, and then the training command: loading the libraries twice
# would take longer than both.
USE = """
import json
import runpy
import sys
from pathlib import Path

import gymnasium as gym

env = gym.make("repfusion_env:RepFusion-v0")
observation, _ = env.reset(seed=0)
_, reward, terminated, truncated, info = env.step(env.action_space.sample())
import agents
import repfusion_env
import students

modules = (agents, repfusion_env, students)
Path("said.json").write_text(json.dumps({
    "files": [module.__file__ for module in modules],
    "path": sys.path,
    "inside": env.observation_space.contains(observation),
    "reward": reward,
    "terminated": terminated,
    "timestep": info["timestep"],
}))
sys.argv = ["agents.train_reinforce", "--config", "debug", "--run.name", "installed"]
runpy.run_module("agents.train_reinforce", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    _call([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], CHECKOUT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def used(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder, empty before, where that environment's python used it; the environment's."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = ["-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index", wheel]
    _call([sys.executable, *install], CHECKOUT)
    (packages,) = environment.rglob("site-packages")
    # Dependencies come from the environment that runs the tests: a path in a .pth file is searched,
    # but .pth files that lie there, such as an editable installation's, are not read.
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here), encoding="utf-8")
    empty = tmp_path_factory.mktemp("elsewhere")
    _call([python, "-c", USE], empty)
    return empty, environment


def test_wheel_holds_the_packages_the_configs_and_the_teacher(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {
        path.relative_to(CHECKOUT).as_posix()
        for package in ("agents", "repfusion_env", "students")
        for path in (CHECKOUT / package).rglob("*.py")
    }
    configs = {f"repfusion_env/configs/{path.name}" for path in CHECKOUT.glob("configs/*.yaml")}
    teacher = {
        f"{TEACHER}/{name}"
        for name in ("config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors")
    }
    assert "repfusion_env/configs/digits.yaml" in configs
    assert modules | configs | teacher <= names
    outside = {name for name in names if name.split("/")[0] in ("tests", "benchmarks", "docs")}
    assert not outside


def test_script_makes_the_environment_from_the_installed_package(used: tuple[Path, Path]) -> None:
    folder, environment = used
    said = json.loads((folder / "said.json").read_text(encoding="utf-8"))
    assert all(Path(file).is_relative_to(environment) for file in said["files"])
    assert str(CHECKOUT) not in said["path"]
    assert said["inside"]
    assert said["terminated"] is True
    assert isinstance(said["reward"], float) and said["reward"] < 0
    assert 0 <= said["timestep"] < 1000


def test_training_command_leaves_summary_and_figure(used: tuple[Path, Path]) -> None:
    folder = used[0] / "runs" / "installed"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rewards = [summary["reward"]["learned"], *summary["reward"]["fixed"].values()]
    assert all(-20 < reward < 0 for reward in rewards)
    assert 0.1 < summary["student"]["linear_probe_accuracy"] <= 1
    assert summary["decisions"] > 0
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")


def _call(command: list[object], folder: Path) -> None:
    """Run a command; what it said is in the assertion's message where it fails."""
    scrubbed = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=scrubbed | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
