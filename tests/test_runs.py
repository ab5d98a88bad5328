"""Run folders: names, metrics, events read back by TensorBoard, locks, rewinding."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import ConfigError, check, load_config
from repfusion_env.runs import Run, RunError


def config_for(folder: Path, **options: Any) -> ExperimentConfig:
    return check({"run": {"folder": str(folder), **options}, "seed": 7})


def new_run(folder: Path, **options: Any) -> Run:
    return Run.create(config_for(folder, **options), agent="reinforce", label="digits")


def events_of(run: Run) -> EventAccumulator:
    """TensorBoard's own reader, with every event kept."""
    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(run.folder), size_guidance=everything).Reload()


def test_a_run_can_be_repeated_from_its_folder(tmp_path: Path) -> None:
    config = config_for(tmp_path / "runs", name="first")
    with Run.create(config, agent="reinforce", label="digits") as run:
        assert run.folder == tmp_path / "runs" / "first"
    assert load_config(run.folder / "config.yaml") == config
    with Run.resume(run.folder) as resumed:
        assert resumed.config == config
        assert resumed.agent == "reinforce"


def test_an_unnamed_run_is_named_after_label_agent_and_time(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    with Run.create(config, agent="sb3-ppo", label="my config/π") as run:
        assert re.fullmatch(r"my-config-π-sb3-ppo-\d{8}-\d{6}", run.folder.name)


def test_runs_made_at_once_get_a_folder_each(tmp_path: Path) -> None:
    runs: list[Run] = []
    start = threading.Barrier(8)

    def create() -> None:
        start.wait()
        runs.append(new_run(tmp_path))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.folder for run in runs}) == 8
    stems = Counter(re.sub(r"(-\d{6})-\d$", r"\1", run.folder.name) for run in runs)
    assert stems.most_common(1)[0][1] >= 2, "none was made in the same second as another"
    for run in runs:
        run.close()


def test_a_taken_name_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    with new_run(tmp_path, name="mine") as run:
        run.log(1, 64, {"reward/mean": 1.0})
    before = run.metrics_path.read_bytes()
    with pytest.raises(RunError, match=r"run\.name: '.*mine' exists already; .*--resume .*mine"):
        new_run(tmp_path, name="mine")
    assert run.metrics_path.read_bytes() == before


@pytest.mark.parametrize("name", ["..", "", "a/b", "/tmp/x"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="it must be the plain name of a folder"):
        new_run(tmp_path, name=name)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"run\.folder: '.*file' cannot be written: File exists"):
        new_run(tmp_path / "file")


def test_what_is_no_run_is_not_resumed(tmp_path: Path) -> None:
    new_run(tmp_path, name="digits-ppo").close()
    with pytest.raises(RunError, match=r"no run folder '.*digits-pp'\. Did you mean 'digits-ppo'"):
        Run.resume(tmp_path / "digits-pp")
    with pytest.raises(RunError, match=r"is no run folder: it has no run\.json"):
        Run.resume(tmp_path)
    run_file = tmp_path / "digits-ppo" / "run.json"
    run_file.write_text("[]")
    with pytest.raises(RunError, match=r"run\.json' does not name the run's agent"):
        Run.resume(tmp_path / "digits-ppo")
    run_file.write_text('{"agent": "reinforce"}')
    (tmp_path / "digits-ppo" / "config.yaml").write_text("sead: 3")
    with pytest.raises(ConfigError, match="Did you mean 'seed'"):
        Run.resume(tmp_path / "digits-ppo")


def test_metrics_come_back_as_columns(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        run.log(10, 640, {"reward/mean": -1.5, "timestep/counts": [3, 0, 1]})
        run.log(20, 1280, {"reward/mean": math.nan, "timestep/counts": [1, 1, 2]})
        run.log(30, 1920, {"reward/mean": torch.tensor(-0.5), "student/accuracy": np.float32(0.5)})
        metrics = run.metrics()
        rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert rows[0] == {
        "step": 10,
        "decisions": 640,
        "reward/mean": -1.5,
        "timestep/counts": [3, 0, 1],
    }
    assert rows[1]["reward/mean"] is None
    np.testing.assert_array_equal(metrics["step"], [10, 20, 30])
    np.testing.assert_array_equal(metrics["decisions"], [640, 1280, 1920])
    np.testing.assert_array_equal(metrics["reward/mean"], [-1.5, np.nan, -0.5])
    np.testing.assert_array_equal(metrics["student/accuracy"], [np.nan, np.nan, 0.5])
    np.testing.assert_array_equal(metrics["timestep/counts"], [[3, 0, 1], [1, 1, 2], [np.nan] * 3])


def test_counts_of_every_row_stay_whole_numbers(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        assert set(run.metrics()) == {"step", "decisions"}
        for step in (1, 2):
            run.log(step, step, {"timestep/counts": [step, 2**40]})
        counts = run.metrics()["timestep/counts"]
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, [[1, 2**40], [2, 2**40]])


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    timesteps = np.repeat([0, 40, 80], [5, 3, 2])
    figure = Figure(figsize=(2, 1), dpi=50, facecolor="#ff0000")
    with new_run(tmp_path) as run:
        run.log(
            10,
            640,
            {"reward/mean": -1.5, "timestep/counts": [5, 3, 2]},
            {"timestep/histogram": timesteps, "empty": np.zeros(0)},
            {"evaluation/figure": figure},
        )
    events = events_of(run)
    tags = events.Tags()
    assert tags["scalars"] == ["reward/mean"]
    assert tags["histograms"] == ["timestep/histogram"]
    [scalar] = events.Scalars("reward/mean")
    assert (scalar.step, scalar.value) == (640, -1.5)
    histogram = events.Histograms("timestep/histogram")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (10, 0, 80)
    assert histogram.sum == timesteps.sum()
    [image] = events.Images("evaluation/figure")
    assert (image.width, image.height) == (100, 50)


def test_a_column_name_is_no_tag(tmp_path: Path) -> None:
    with new_run(tmp_path) as run, pytest.raises(ValueError, match="'step' is a column"):
        run.log(1, 1, {"step": 2.0})


def test_a_resumed_run_leaves_no_duplicates(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        for step in range(1, 11):
            run.log(step, 64 * step, {"reward/mean": float(step)}, {"t": np.full(4, step)})
    with Run.resume(run.folder) as run:
        run.rewind(5)
        assert run.metrics()["step"].tolist() == [1, 2, 3, 4, 5]
        for step in range(6, 9):
            run.log(step, 64 * step, {"reward/mean": -float(step)}, {"t": np.full(4, -step)})
        values = [*range(1, 6), -6, -7, -8]
        assert run.metrics()["reward/mean"].tolist() == values
    events = events_of(run)
    scalars = events.Scalars("reward/mean")
    assert [event.value for event in scalars] == values
    assert [event.step for event in scalars] == [64 * step for step in range(1, 9)]
    sums = [event.histogram_value.sum for event in events.Histograms("t")]
    assert sums == [4 * value for value in values]


def test_rewinding_to_the_beginning_forgets_everything(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        run.log(3, 0, {"reward/mean": 1.0})
        run.log(4, 10, {"reward/mean": 2.0})
        run.rewind(0)
        assert run.metrics()["step"].tolist() == []
        run.log(1, 5, {"reward/mean": 3.0})
    assert [event.value for event in events_of(run).Scalars("reward/mean")] == [3.0]


def test_half_a_row_of_a_killed_process_is_dropped(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        run.log(1, 64, {"reward/mean": 1.0})
    whole = run.metrics_path.read_bytes()
    for torn in (b'{"step": 2, "decis', b'{"step": 2, "decisions": 128}', b"\0" * 40):
        run.metrics_path.write_bytes(whole + torn)
        with Run.resume(run.folder) as run:
            assert run.metrics_path.read_bytes() == whole
            run.log(2, 128, {"reward/mean": 2.0})
            assert run.metrics()["reward/mean"].tolist() == [1.0, 2.0]


def test_checkpoints_belong_to_the_agent_and_the_newest_are_kept(tmp_path: Path) -> None:
    with new_run(tmp_path, keep_checkpoints=2) as run:
        assert run.load_checkpoint() is None
        for step in (1, 2, 3):
            run.save_checkpoint(step, {"weights": torch.full((2,), float(step))})
    with Run.resume(run.folder) as run:
        step, state = run.load_checkpoint() or pytest.fail("nothing was loaded")
        assert (step, state["weights"].tolist()) == (3, [3.0, 3.0])
        assert len(list(run.checkpoint_folder.iterdir())) == 2


def test_the_summary_is_json_that_any_reader_takes(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        run.write_summary(
            {
                "reward": {"learned": np.float32(-0.5), "fixed": {0: np.nan, 40: -0.25}},
                "counts": np.arange(3),
            }
        )

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    assert json.loads(run.summary_path.read_text(), parse_constant=refuse) == {
        "reward": {"learned": -0.5, "fixed": {"0": None, "40": -0.25}},
        "counts": [0, 1, 2],
    }


def test_two_runs_in_one_process_do_not_write_to_one_folder(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(RunError, match=rf"is being written by process {os.getpid()} on "):
        Run.resume(run.folder)
    run.close()
    run.close()
    Run.resume(run.folder).close()


HOLDER = """
import sys, time
from repfusion_env.runs import Run
run = Run.resume(sys.argv[1])
print("holding", flush=True)
time.sleep(60)
"""


def test_a_killed_process_lets_go_of_its_run(tmp_path: Path) -> None:
    new_run(tmp_path, name="shared").close()
    folder = tmp_path / "shared"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(RunError, match=f"is being written by process {holder.pid} on"):
            Run.resume(folder)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with Run.resume(folder) as run:
        run.log(1, 1, {"reward/mean": 0.0})


# A row of metrics.jsonl is 48 bytes here: the first limit cuts it, the second the events' file.
@pytest.mark.parametrize("limit", [60, 300])
def test_a_full_disk_while_logging_is_one_sentence(tmp_path: Path, limit: int) -> None:
    import resource

    run = new_run(tmp_path)
    run.log(1, 64, {"reward/mean": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RunError, match=r"cannot be written: File too large"):
            run.log(2, 128, {"reward/mean": 2.0}, {"samples": np.arange(1000)})
        run.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with Run.resume(run.folder) as run:
        run.rewind(1)
        run.log(2, 128, {"reward/mean": 2.5})
        assert run.metrics()["reward/mean"].tolist() == [1.0, 2.5]
    assert [event.value for event in events_of(run).Scalars("reward/mean")] == [1.0, 2.5]


def test_importing_runs_loads_nothing_heavy() -> None:
    code = (
        "import sys, repfusion_env.runs; "
        "print({'torch', 'tensorboard', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
