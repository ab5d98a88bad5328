from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import train_control
from agents.evaluation import evaluate, linear_probe_accuracy
from agents.reporting import log_evaluation, teacher_evaluations
from agents.train_reinforce import main
from repfusion_env import finetune
from repfusion_env.config_loading import load_config
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.runs import Run
from repfusion_env.teachers.reading.network import NetworkTeacher


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def run(experiment: Callable[..., Path], once: Path) -> Path:
    """A finished run, trained once and only to be read; what it said lies beside it."""
    if not (once / "my run").exists():
        settings = {"run.decisions": 80, "run.log_every": 5, "evaluation.images": 24}
        config = experiment(**settings, **{"run.folder": str(once)})
        with (
            (once / "out").open("w", encoding="utf-8") as out,
            (once / "err").open("w", encoding="utf-8") as err,
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            assert main(["--config", str(config), "--run.name", "my run"]) == 0
    return once / "my run"


def own_accuracy(env: RepFusionVectorEnv) -> float:
    """Of the student's head on all held-out images."""
    bank, student = env.trainer.parts.heldout, env.trainer.student
    with torch.no_grad():
        pooled = env.trainer.embed(bank.pixels(torch.arange(len(bank))))[1]
        return float((student.head(pooled).argmax(1) == bank.labels).float().mean())


def test_the_summary_says_what_the_saved_student_and_policy_are_worth(run: Path):
    summary = json.loads((run / "summary.json").read_text())
    env = RepFusionVectorEnv(config=str(run / "config.yaml"))
    weights = {
        key: torch.from_numpy(v) for key, v in load_file(run / "student.safetensors").items()
    }
    env.trainer.student.load_state_dict(weights)
    policy = load_file(run / "policy.safetensors")

    def greedy(observations: torch.Tensor) -> torch.Tensor:
        hidden = np.tanh(
            observations.numpy() @ policy["network.1.weight"].T + policy["network.1.bias"]
        )
        logits = hidden @ policy["network.3.weight"].T + policy["network.3.bias"]
        return torch.from_numpy(logits.argmax(1))

    found = evaluate(env, greedy, 24)
    assert summary["reward"]["learned"] == pytest.approx(found.learned, abs=1e-4)
    assert summary["reward"]["random"] == pytest.approx(found.random, abs=1e-4)
    assert list(summary["reward"]["fixed"]) == ["0", "200", "400", "600", "800"]
    assert list(summary["reward"]["fixed"].values()) == pytest.approx(found.by_arm, abs=1e-4)
    accuracy = linear_probe_accuracy(env.trainer, 10_000)
    assert summary["student"]["linear_probe_accuracy"] == pytest.approx(accuracy)
    metrics = {"accuracy": own_accuracy(env)}
    assert summary["student"]["metrics"] == pytest.approx(metrics)
    assert summary["student"]["headline"] == "accuracy"
    assert summary["heldout_images"] == 24 and summary["decisions"] == 80
    assert summary["seconds"] > 0
    assert summary["decisions_per_second"] == pytest.approx(80 / summary["seconds"])


def test_the_table_tells_all_policies_and_where_to_look(run: Path):
    said, complaints = ((run.parent / name).read_text(encoding="utf-8") for name in ("out", "err"))
    summary = json.loads((run / "summary.json").read_text())
    rows = {
        tuple(words[:-2]): float(words[-2])
        for words in (line.replace(" ± ", "±").split() for line in said.splitlines())
        if words and words[0] in ("learned", "random", "fixed")
    }
    assert rows[("learned", "(reinforce)")] == pytest.approx(summary["reward"]["learned"], abs=1e-4)
    assert rows[("random",)] == pytest.approx(summary["reward"]["random"], abs=1e-4)
    best = max(summary["reward"]["fixed"].values())
    assert rows[("fixed", "(best)")] == pytest.approx(best, abs=1e-4)
    assert said.count("\n  fixed") == 5
    student = summary["student"]
    assert (
        f"student: linear probe accuracy {student['linear_probe_accuracy']:.1%}; its own head: "
        f"accuracy {student['metrics']['accuracy']:.1%}\n"
    ) in said
    assert f"tensorboard --logdir {run.parent}\n" in said
    assert "Traceback" not in complaints
    # What is printed can be pasted into a shell, although the name has a space.
    again = said.split("again:")[1].strip()
    assert again == (
        f"python -m agents.train_reinforce --config '{run / 'config.yaml'}' --run.name null"
    )


def test_the_run_can_be_repeated_from_its_own_configuration(
    run: Path, logged: Callable[[Path], Any], tmp_path: Path
):
    options = ["--run.folder", str(tmp_path), "--run.name", "again"]
    assert main(["--config", str(run / "config.yaml"), *options]) == 0
    assert logged(tmp_path / "again") == logged(run)


def test_the_figures_are_pictures_worth_their_size(run: Path):
    for name in ("summary.png", "predictions.png"):
        with Image.open(run / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert pixels.shape[0] > 300 and pixels.shape[1] > 600
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_tensorboard_has_the_shared_tags_at_decisions(run: Path):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()
    assert {
        "reward/mean",
        "timestep/mean",
        "timestep/entropy",
        "student/distillation_loss",
        "student/accuracy",
        "charts/decisions_per_second",
        "evaluation/learned_reward",
        "evaluation/random_reward",
    } <= set(tags["scalars"])
    assert "timestep/histogram" in tags["histograms"]
    assert sorted(tags["images"]) == ["evaluation/predictions", "evaluation/reward_by_timestep"]
    assert [event.step for event in events.Scalars("reward/mean")] == [20, 40, 60, 80]
    summary = json.loads((run / "summary.json").read_text())
    (accuracy,) = events.Scalars("evaluation/accuracy")
    assert accuracy.value == pytest.approx(summary["student"]["metrics"]["accuracy"])
    (final,) = events.Scalars("evaluation/learned_reward")
    assert (final.step, final.value) == (80, pytest.approx(summary["reward"]["learned"]))


@pytest.mark.parametrize(
    ("task", "headline", "metric"),
    [
        ("segmentation", "mIoU", "pixel_accuracy"),
        ("landmarks", "NME", "failure_rate_0.1"),
        ("detection", "mAP", "map_50"),
    ],
)
def test_a_dense_run_reports_its_metric_and_shows_its_predictions(
    task: str,
    headline: str,
    metric: str,
    experiment: Callable[..., Path],
    squares: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    data = {"name": "npz", "path": squares, "train_limit": None, "heldout_limit": None}
    config = experiment(
        **{
            "task": task,
            "data": data,
            "distillation.dense": True,
            "run.decisions": 16,
            "run.log_every": 2,
            "evaluation.images": 4,
        }
    )
    assert main(["--config", str(config), "--run.name", task]) == 0
    student = json.loads((tmp_path / task / "summary.json").read_text())["student"]
    env = RepFusionVectorEnv(config=str(tmp_path / task / "config.yaml"))
    weights = load_file(tmp_path / task / "student.safetensors")
    env.trainer.student.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    found = env.trainer.heldout_metrics()
    # What could not be measured is null in the summary.
    expected = {name: value for name, value in found.items() if np.isfinite(value)}
    assert {n: v for n, v in student["metrics"].items() if v is not None} == pytest.approx(expected)
    assert metric in student["metrics"] and student["headline"] in student["metrics"]
    # The images came without labels.
    assert student["linear_probe_accuracy"] is None
    assert f"student: {headline} " in capsys.readouterr().out.replace("  ", " ")
    with Image.open(tmp_path / task / "predictions.png") as picture:
        assert picture.size[0] > 1000
    frame = env.heldout_view(1, "rgb_array")
    frame.reset(seed=0)
    frame.step(frame.action_space.sample())
    assert frame.frame().shape == (656, 1120, 3)


def test_an_evaluation_is_logged_once_for_each_step(tiny: dict[str, Any], tmp_path: Path):
    config = load_config(None, {**tiny, "run.folder": str(tmp_path)})
    env = RepFusionVectorEnv(config=config)
    found = evaluate(env, lambda observations: torch.zeros(len(observations)).long(), 8)
    with Run.create(config, agent="reinforce", label="x") as run:
        run.log(5, 20, {"reward/mean": -1.0})
        for step in (5, 5, 10, 10):
            log_evaluation(run, env, step, 4 * step, found)
        metrics = run.metrics()
    assert metrics["step"].tolist() == [5, 5, 10]
    assert metrics["evaluation/learned_reward"][1:] == pytest.approx([found.learned] * 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher.standardize_images": 5},
        {"teacher.standardize": "grid", "observation.source": "pixels", "reinforce.network": "cnn"},
        {"env.action": "timestep_set", "env.set_size": 2, "fusion.timesteps": [7]},
    ],
)
def test_teacher_evaluations_are_the_images_that_its_network_saw(changes, monkeypatch):
    seen: list[int] = []
    network = NetworkTeacher.features

    def counted(self, images, timesteps):
        seen.append(len(images))
        return network(self, images, timesteps)

    monkeypatch.setattr(NetworkTeacher, "features", counted)
    env = RepFusionVectorEnv(config={"data.train_limit": 40, "env.num_envs": 8, **changes})
    env.reset(seed=0)
    setup = sum(seen)
    _, _, _, _, info = env.step(env.action_space.sample())
    timesteps = info["timestep"].reshape(8, -1).shape[1]
    told = teacher_evaluations(env, timesteps, decisions=8)
    assert told == {"setup": setup, "training": sum(seen) - setup}


def test_images_that_could_not_be_read_are_listed_in_the_summary(
    experiment: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 16, 16), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "images" / "a" / "0.png").write_bytes(b"no image")
    data = {"name": "folder", "path": str(tmp_path / "images"), "skip_unreadable": 0.1}
    data |= {"image_size": 16, "channels": 1}
    config = experiment(**{"run.decisions": 16, "evaluation.images": 4})
    words = [f"--data.{key}={value}" for key, value in data.items()]
    with pytest.warns(RuntimeWarning, match=r"0\.png"):
        assert main(["--config", str(config), "--run.name", "r", *words]) == 0
    with pytest.warns(RuntimeWarning, match=r"0\.png"):
        control = ["--config", str(config), "--run.name", "c", "--method", "simclr", *words]
        assert train_control.main(control) == 0
    with pytest.warns(RuntimeWarning, match=r"0\.png"):
        assert finetune.main([str(tmp_path / "r"), "--labels", "4", "--steps", "1"]) == 0
    assert "skipped: 1 unreadable image(s), listed in summary.json" in capsys.readouterr().out
    for folder in ("r", "c", "r/finetune-4"):
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        (listed,) = summary["unreadable_images"]
        assert "0.png" in listed
