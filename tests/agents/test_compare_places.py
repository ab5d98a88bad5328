"""Where a comparison's runs take place: processes on GPUs, a cluster, one comparison at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents.comparison import places
from agents.comparison.places import Places, cluster_places, local_places, visible_gpus
from agents.comparison.workers import DONE, FAILED, STOPPED, run_jobs
from repfusion_env.config_loading import ConfigError

# Workers import this file, so what is heavy is imported where it is needed.

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def work(job: str) -> Any:
    """Runs in another process."""
    if job == "raise":
        raise ValueError("no such luck")
    if job == "die":
        os._exit(7)
    if job == "wait":
        import time

        for _ in range(600):  # Ray's interruption does not end a sleep that has begun
            time.sleep(0.1)
    # What the process was started with, whatever has been set since.
    words = Path("/proc/self/environ").read_bytes().split(b"\0")
    given = dict(word.decode().partition("=")[::2] for word in words if word)
    return os.getpid(), given.get("CUDA_VISIBLE_DEVICES")


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, of which nothing but their number is used."""
    monkeypatch.setattr(places, "visible_gpus", lambda: ("0", "1", "2", "3"))


@pytest.mark.parametrize(
    ("jobs", "per_gpu", "devices", "count", "gpus"),
    [
        (None, None, {"auto", "cpu"}, 4, "0123"),  # the policy on the CPU, the rest on the GPU
        (None, 3, {"cuda"}, 12, "0123"),
        (6, None, {"cuda"}, 6, "0123"),
        (6, 1, {"cuda"}, 4, "0123"),
        (2, 3, {"cuda"}, 2, "0123"),
        (None, None, {"cpu"}, CORES, ""),
        (3, None, {"cpu"}, 3, ""),
        (None, 2, {"cuda:1", "cpu"}, 2, ""),
        (None, None, {"cuda:1", "auto"}, 2, ""),
    ],
)
def test_processes_are_dealt_out_among_the_gpus(
    four_gpus: None, jobs: Any, per_gpu: Any, devices: set[str], count: int, gpus: str
) -> None:
    found = local_places(jobs, per_gpu, devices)
    assert (found.jobs, "".join(found.gpus)) == (count, gpus)
    wanted = [{"CUDA_VISIBLE_DEVICES": name} for name in gpus] or [{}]
    assert found.environments == wanted


@pytest.mark.parametrize(
    ("given", "count", "names"),
    [
        (None, 2, ("0", "1")),
        ("3, 5", 2, ("3", "5")),
        ("GPU-a1,GPU-b2", 1, ("GPU-a1",)),
        ("", 0, ()),
    ],
)
def test_gpus_are_called_as_this_process_was_given_them(
    monkeypatch: pytest.MonkeyPatch, given: str | None, count: int, names: tuple[str, ...]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == names


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_worker_is_started_with_its_gpu_and_so_is_the_one_in_a_dead_ones_place() -> None:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    environments = Places(gpus=("3", "5")).environments
    jobs = ["first", "second", "die", "third", "fourth"]
    found = list(run_jobs(work, jobs, 2, environments=environments))
    done = [outcome.value for outcome in found if outcome.state == DONE]
    assert {gpu for _, gpu in done} == {"3", "5"} and len(done) == 4
    died = list(run_jobs(work, ["die", "next"], 1, environments=environments))
    assert [outcome.state for outcome in died] == [FAILED, DONE]
    assert died[1].value[1] == "3"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--engine", "rai"], "--engine: 'rai' given; allowed: processes or ray. Did you mean"),
        (["--address", "here:1"], "--address: 'here:1' given, but it is a cluster's; add --engine"),
        (["--jobs", "0"], "--jobs: '0' given; it must be a whole number from 1"),
        (["--jobs-per-gpu", "2", "--device", "cpu"], "all runs are on the cpu; --jobs says how"),
        (["--device", "cuda:99"], "device: 'cuda:99' given, but this machine has"),
        (["--engine", "ray", "--device", "cuda:1"], "so write cuda or auto"),
    ],
)
def test_a_place_that_is_not_there_is_refused(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from agents import compare

    out = tmp_path / "out"
    given = ["--config", "debug", "--arms", "random", "--out", str(out), *arguments]
    assert compare.main(given) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()


def test_without_ray_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else find(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'repfusion-env\[ray\]'"):
        cluster_places(None, None, {"cpu"}, None)


def test_a_comparison_is_run_by_one_process_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from agents import compare
    from agents.comparison.arms import shipped_arms
    from agents.comparison.plan import Plan, held, load_plan, save_plan
    from repfusion_env.config_loading import load_config

    config = load_config("debug")
    known = shipped_arms(config)

    def plan(*arms: str) -> Plan:
        chosen = {name: known[name] for name in arms}
        return Plan(tmp_path, "debug", config, chosen, 1, ("10%",), 1, None)

    save_plan(plan("random"))
    with held(tmp_path):
        assert compare.main(["--out", str(tmp_path)]) == 2
        holder = f"comparison '{tmp_path}' is being run by process {os.getpid()} on"
        assert holder in capsys.readouterr().err

    # One that ended between the reading of the command line and the lock has left further arms.
    for arm in ("random", "ucb"):
        plan("random", "ucb").result_path(arm, 0).write_text(
            json.dumps({"machine": {}, "reward": None, "accuracy": {}, "seconds": {}})
        )
    late = plan("random")
    save_plan(plan("random", "ucb"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_report", lambda plan: None)
        assert compare._run(late, Places()) == 0
    kept = load_plan(tmp_path)
    assert kept is not None and list(kept.arms) == ["random", "ucb"]


def test_under_a_launcher_a_comparison_that_is_there_is_refused_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agents import compare
    from agents.comparison.arms import shipped_arms
    from agents.comparison.plan import Plan, save_plan
    from repfusion_env.config_loading import load_config

    config = load_config("debug")
    arms = {"random": shipped_arms(config)["random"]}
    save_plan(Plan(tmp_path, "debug", config, arms, 1, ("10%",), 1, None))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host"}.items():
        monkeypatch.setenv(name, value)
    assert compare.main(["--out", str(tmp_path)]) == 2
    assert "compare runs in one process, but 2 were started" in capsys.readouterr().err


def test_a_second_interruption_tells_how_to_go_on_as_the_first_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agents import compare
    from agents.comparison import progress

    def twice(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "run_on", lambda *_, **__: iter(twice, None))
    out = tmp_path / "out"
    given = ["--config", "debug", "--arms", "random", "--seeds", "1", "--out", str(out)]
    assert compare.main(given) == 130
    said = capsys.readouterr().err
    assert f"go on with: python -m agents.compare --out {out}" in said


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """A Ray of this machine with two cores; skipped where Ray is not installed."""
    ray = pytest.importorskip("ray", reason="Ray, the extra 'ray', is not installed")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests are not installed
    yield ray
    ray.shutdown()


def on_ray(folder: Path, jobs: list[str], started: Any = lambda job: None, limit: int = 1) -> Any:
    """Outcomes of jobs on the Ray that is running."""
    from agents.comparison.engines import run_on

    there = Places(engine="ray", jobs=limit)
    return list(run_on(work, jobs, there, folder, started=started))


@pytest.mark.slow
def test_on_ray_a_failure_or_death_costs_one_job_alone(ray_here: Any, tmp_path: Path) -> None:
    jobs = ["first", "raise", "die", "second"]
    found = {outcome.job: outcome for outcome in on_ray(tmp_path, jobs)}
    assert [found[job].state for job in jobs] == [DONE, FAILED, FAILED, DONE]
    assert found["first"].value[0] != os.getpid()
    assert found["raise"].value == "ValueError: no such luck"
    assert "its process ended (WorkerCrashedError" in found["die"].value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_interruption_stops_what_runs_on_ray_and_starts_no_others(
    ray_here: Any, tmp_path: Path
) -> None:
    def interrupt(job: str) -> None:
        if job == "wait":
            signal.raise_signal(signal.SIGINT)

    outcomes = on_ray(tmp_path, ["first", "wait", "never"], interrupt)
    assert [(outcome.job, outcome.state) for outcome in outcomes] == [
        ("first", DONE),
        ("wait", STOPPED),
    ]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_machine_with_another_folder_of_that_name_ends_the_comparison(
    ray_here: Any, tmp_path: Path
) -> None:
    def another(job: str) -> None:
        (tmp_path / ".cluster").write_text("of somebody else")

    with pytest.raises(ConfigError, match="must be on a file system that all machines share"):
        on_ray(tmp_path, ["first", "second"], another)


@pytest.mark.slow
def test_gpus_of_a_cluster_are_asked_for_in_shares(ray_here: Any) -> None:
    from agents.comparison.ray_engine import _room, _share

    assert _share(Places("ray", None, per_gpu=4, device="auto")) == 0  # there is none
    assert _share(Places("ray", None, per_gpu=4, device="cuda")) == 0.25
    assert _room(0) == 2
    assert _room(0.25) == 1  # one waits for a GPU
