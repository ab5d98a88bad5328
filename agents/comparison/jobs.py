"""One run of the comparison: an arm under a seed, from training to what its student is worth.

Runs in a worker process; nothing heavy is imported before the first job.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from agents.command_line import INTERRUPTED
from agents.comparison.arms import COMMANDS, PIXEL_PROBE, Arm
from agents.comparison.workers import Stop
from repfusion_env.atomic import write_text
from repfusion_env.config_loading import load_config


class RunFailed(RuntimeError):
    """A training command ended with an error; the message holds what it said last."""


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Train a student, probe and fine-tune it, and write the result.

    What is there already is kept: a finished run is not trained again, an interrupted one goes on,
    and what has been measured stands.

    Args:
        job: As :meth:`agents.comparison.plan.Plan.jobs` gives them.

    Returns:
        The result as written.

    Raises:
        RunFailed: Training failed.
        Stop: It was interrupted and has been saved.
    """
    import torch

    torch.set_num_threads(1)
    arm, seed, out = Arm.from_dict(job["arm"]), int(job["seed"]), Path(job["folder"])
    name = f"{arm.name}--seed-{seed}"
    log = out / "logs" / f"{name}.log"
    run = out / "runs" / arm.name / f"seed-{seed}"
    seconds: dict[str, float] = {}
    with log.open("a", encoding="utf-8") as said, redirect_stdout(said), redirect_stderr(said):
        print(f"--- {_where()}", flush=True)
        started = time.monotonic()
        summary = _train(arm, seed, out, run, log) if COMMANDS[arm.command] else _born(run)
        training = float(summary["seconds"])
        # Of a run that was complete before, only what its summary says is known.
        seconds["around"] = max(0.0, time.monotonic() - started - training)
        seconds["training"] = training
        measured = _stage_two(job, run, out / "configs" / f"{arm.name}.yaml")
    result = {
        "arm": arm.name,
        "seed": seed,
        **_rewards(summary),
        "decisions": summary["decisions"],
        "teacher_evaluations": _evaluations(summary, measured),
        measured["metric"]["name"]: measured[measured["metric"]["name"]],
        "metric": measured["metric"],
        "metrics": measured["metrics"],
        "chosen": measured["chosen"],
        "seconds": seconds | measured["seconds"],
        "machine": machine(),
    }
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_text(out / "results" / f"{name}.json", text)
    # A finished run needs no checkpoints, and those of a hundred runs fill disks.
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return result


def _train(arm: Arm, seed: int, out: Path, run: Path, log: Path) -> dict[str, Any]:
    """The run's summary, after training where there is none."""
    summary = run / "summary.json"
    if not summary.is_file():
        if run.exists() and not (run / "run.json").is_file():
            shutil.rmtree(run)  # killed before it was a run
        if run.exists():
            arguments = ["--resume", str(run)]
        else:
            config = out / "configs" / f"{arm.name}.yaml"
            arguments = ["--config", str(config), *arm.arguments]
            arguments += ["--seed", str(seed), "--run.name", run.name]
        main: Callable[[list[str]], int] = importlib.import_module(COMMANDS[arm.command]).main
        _own_rich()
        code = main(arguments)
        if code == INTERRUPTED:
            raise Stop
        if code:
            raise RunFailed(f"training ended with {code}: {_last_words(log)} ({log})")
    return dict(json.loads(summary.read_text(encoding="utf-8")))


def _born(run: Path) -> dict[str, Any]:
    """The summary of a student that is not trained."""
    run.mkdir(parents=True, exist_ok=True)
    nothing = {"setup": 0, "training": 0}
    return {"seconds": 0.0, "decisions": 0, "reward": None, "teacher_evaluations": nothing}


def _stage_two(job: dict[str, Any], run: Path, config_path: Path) -> dict[str, Any]:
    from agents.comparison.stage_two import (
        initial_backbone,
        measure,
        measure_pixels,
        saved_backbone,
    )

    config, seed = load_config(config_path), int(job["seed"])
    if job["arm"]["command"] == PIXEL_PROBE:
        return measure_pixels(config, labels=job["labels"], seed=seed, run=run)
    born = not COMMANDS[job["arm"]["command"]]
    backbone = initial_backbone(config, seed) if born else saved_backbone(run, config)
    return measure(
        backbone,
        config,
        labels=job["labels"],
        draws=int(job["draws"]),
        finetune=job["finetune"],
        seed=seed,
        kept=run / "stage-2.json",
    )


def _rewards(summary: dict[str, Any]) -> dict[str, Any]:
    """Held-out reward, and beside it what the landscape of this student offers."""
    reward = summary.get("reward")
    if reward is None:
        return {"reward": None}
    return {
        "reward": reward["learned"],
        "reward_of": {key: value for key, value in reward.items() if key != "learned"},
        "timestep": summary.get("timestep"),
    }


def _evaluations(summary: dict[str, Any], measured: dict[str, Any]) -> dict[str, int]:
    """Images through the teacher; with a cache, what came from it beside them.

    Arms share a cache, and the first one to ask for a feature computes it for all others: what one
    of them costs alone is the sum.
    """
    counts = dict(measured.get("teacher_evaluations", summary["teacher_evaluations"]))
    cache = summary.get("cache")
    if cache is not None:
        counts["cached"] = int(cache["asked"]) - int(cache["computed"])
    return counts


def machine() -> dict[str, Any]:
    """What a time was measured on."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _where() -> str:
    """Which machine, process and GPU this is, for whoever reads the log of a failed run."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = f", GPU {gpu}" if gpu else ""
    return f"{time.strftime('%F %T')}, process {os.getpid()} on {socket.gethostname()}{seen}"


def _own_rich() -> None:
    """Tables in a log as wide as they are: there is no terminal whose width rich could ask for."""
    os.environ.setdefault("COLUMNS", "120")


def _last_words(log: Path) -> str:
    sys.stderr.flush()  # which is the log, while the job runs
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = [line for line in lines if "error" in line.lower()] or lines
    return found[-1].strip() if found else "it said nothing"
