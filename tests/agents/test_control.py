from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.command_line import script_of
from agents.controls import ControlTrainer
from agents.train_control import main
from repfusion_env.config_loading import load_config, merge
from repfusion_env.data import bank
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.runs import Run
from repfusion_env.stage2 import labelled_subset

SHORT = {
    "env.num_envs": 8,
    "run.decisions": 96,
    "run.log_every": 2,
    "run.checkpoint_every": 3,
    "optimizer.batch_size": 12,
    "student.ema": 0.9,
    "contrastive.hidden": 16,
    "contrastive.projection": 8,
}


def trainer(tiny: dict[str, Any], method: str, **more: Any) -> ControlTrainer:
    own = {name: more.pop(name) for name in ("labels", "augment") if name in more}
    return ControlTrainer(load_config("digits", merge(tiny, more)), method, **own)


@pytest.mark.parametrize("method", ["simclr", "supervised"])
def test_a_control_begins_with_the_weights_and_images_of_the_distilled_student(
    method: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"seed": 5, "env": {"num_envs": 6, "group_size": 2}, "optimizer.batch_size": 10}
    control = trainer(tiny, method, **more)
    env = RepFusionVectorEnv(config=load_config("digits", merge(tiny, more)))
    distilled = env.trainer.student.backbone.state_dict()
    mine = control.student.backbone.state_dict()
    assert mine.keys() == distilled.keys()
    assert all(torch.equal(mine[name], distilled[name]) for name in mine)

    shown: dict[str, list[list[int]]] = {"control": [], "env": []}
    pixels = bank.ImageBank.pixels
    names = {id(control.parts.train): "control", id(env.trainer.parts.train): "env"}

    def watch(self: bank.ImageBank, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) in (6, 10):
            shown[names[id(self)]].append(ids.tolist())
        return pixels(self, ids)

    monkeypatch.setattr(bank.ImageBank, "pixels", watch)
    _, info = env.reset(seed=5)
    for _ in range(3):
        _, _, _, _, info = env.step([0] * 6)
        control.step()
        # The batch that trains ends with the most recent earlier images.
        assert shown["control"][-1][:6] == info["image_id"].tolist()
    batches = [ids for ids in shown["env"] if ids[:6] in [b[:6] for b in shown["control"]]]
    assert batches[-1] == shown["control"][-1] and len(batches[-1]) == 10


def test_a_few_labels_are_all_that_is_shown(tiny: dict[str, Any]) -> None:
    control = trainer(tiny, "supervised", labels="10%")
    allowed = labelled_subset(control.parts.train.labels, 10, 0)
    control.parts.train.labels[~torch.isin(torch.arange(96), allowed)] = -100  # would be an error
    seen = set()
    for _ in range(12):
        control.step()
        seen |= set(control.recent.tolist())
    assert seen == set(allowed.tolist()) and control.labels == 10
    assert np.isfinite(control.drain_metrics()["student/task_loss"])


def test_labels_teach_the_supervised_control_and_none_reach_simclr(tiny: dict[str, Any]) -> None:
    more = {"env.num_envs": 32, "optimizer.batch_size": 32}
    supervised, augmented = (
        trainer(tiny, "supervised", augment=augment, **more) for augment in (False, True)
    )
    for control in (supervised, augmented):
        control.step()
    first, other_first = (c.drain_metrics()["student/task_loss"] for c in (supervised, augmented))
    assert first != other_first and abs(first - other_first) < 0.5
    for _ in range(30):
        supervised.step()
    supervised.metrics.drain()
    supervised.step()
    assert supervised.drain_metrics()["student/accuracy"] > 0.8  # of ten classes

    one, other = (trainer(tiny, "simclr") for _ in range(2))
    other.parts.train.labels.fill_(3)
    for control in (one, other):
        for _ in range(3):
            control.step()
    mine, theirs = one.student.state_dict(), other.student.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert one.heldout_metrics() == {} and one.student.head is None


def test_the_weight_adds_views_to_labels(tiny: dict[str, Any]) -> None:
    control = trainer(tiny, "supervised", **{"contrastive.weight": 0.3})
    plain = trainer(tiny, "supervised")
    control.step()
    plain.step()
    metrics = control.drain_metrics()
    assert metrics["student/contrastive_loss"] > 0
    # The first loss is measured before anything differs; only then the views have their say.
    assert metrics["student/task_loss"] == plain.drain_metrics()["student/task_loss"]
    a, b = (c.student.backbone.state_dict() for c in (control, plain))
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controls")


@pytest.fixture
def finished(experiment: Callable[..., Path], once: Path) -> Callable[[str], Path]:
    """A finished run of a method, trained once for all tests."""

    def run(method: str) -> Path:
        if not (once / method).exists():
            # No such teacher: it is never looked for.
            more = {"run.folder": str(once), "teacher.model": "/nowhere/to/be/found"}
            config = str(experiment(**{**SHORT, **more}))
            options = ["--labels", "20%", "--augment"] if method == "supervised" else []
            words = ["--config", config, "--run.name", method, "--method", method, *options]
            assert main(words) == 0
        return once / method

    return run


@pytest.mark.parametrize("method", ["simclr", "supervised"])
def test_a_control_leaves_what_an_agent_leaves(
    method: str, finished: Callable[[str], Path]
) -> None:
    run = finished(method)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["agent"] == f"control-{method}" and summary["reward"] is None
    assert summary["teacher_evaluations"] == {"setup": 0, "training": 0}
    assert summary["decisions"] == 96 and summary["seconds"] > 0
    assert 0 < summary["student"]["linear_probe_accuracy"] <= 1
    assert summary["labels"] == (19 if method == "supervised" else 0)
    weights = load_file(run / "student.safetensors")
    assert weights and all(name.startswith("backbone.") for name in weights)
    about = json.loads((run / "run.json").read_text())
    assert about["settings"]["method"] == method
    assert (run / "summary.png").stat().st_size > 0
    tag = "student/task_loss" if method == "supervised" else "student/contrastive_loss"
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars(tag)
    assert [event.step for event in events] == list(range(16, 97, 16))


def test_the_saved_backbone_is_the_averaged_one(finished: Callable[[str], Path]) -> None:
    run = finished("simclr")
    with Run.resume(run) as opened:
        restored = opened.load_checkpoint()
    assert restored is not None
    step, kept = restored
    weights = load_file(run / "student.safetensors")
    average, last = kept["trainer"]["average"], kept["trainer"]["student"]
    assert step == 12
    assert all(torch.equal(weights[name], average[name]) for name in weights)
    assert any(not torch.equal(weights[name], last[name]) for name in weights)


@pytest.mark.parametrize("method", ["simclr", "supervised"])
def test_an_interrupted_control_goes_on_to_the_last_bit(
    method: str,
    finished: Callable[[str], Path],
    logged: Callable[[Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = finished(method)
    again = [f"--{name}={value}" for name, value in settings(whole).items()]
    step = ControlTrainer.step

    def interrupted(self: ControlTrainer) -> None:
        step(self)
        if self.steps == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ControlTrainer, "step", interrupted)
    words = ["--config", str(whole / "config.yaml"), "--run.folder", str(tmp_path)]
    assert main([*words, "--run.name", "part", *again]) == 130
    monkeypatch.undo()
    run = tmp_path / "part"
    go_on = f"go on with: python -m agents.train_control --resume {run}"
    assert go_on in capsys.readouterr().err
    assert not (run / "summary.json").exists()

    assert main(["--resume", str(run)]) == 0
    assert logged(run) == logged(whole)
    mine, theirs = (load_file(r / "student.safetensors") for r in (run, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    ends = [json.loads((r / "summary.json").read_text()) for r in (run, whole)]
    assert ends[0]["student"] == ends[1]["student"]


def settings(run: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((run / "run.json").read_text())["settings"]
    return found


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "--method: it must be given; simclr: "),
        (
            "--method simcl",
            "--method: 'simcl' given; allowed: simclr, supervised. Did you mean 'simclr'?",
        ),
        ("--method supervised --labels 0%", "--labels: '0%' given; it must be a percentage"),
        ("--method supervised --labels 99999", "labels: 99999 given, but there are 96 training"),
        ("--method simclr --labels 10%", "--labels: 'simclr' uses no labels"),
        ("--method simclr --augment", "--augment: 'simclr' has its views"),
        (
            "--method simclr --env.num_envs 8 --env.group_size 8 --optimizer.batch_size 8",
            "env.group_size: 8 lanes of the same image are the whole step",
        ),
        ("--method supervised --augment maybe", "--augment: 'maybe' given; it must be true or fal"),
        ("--method supervised --data.labels clusters", "data.labels: 'clusters' are found by the"),
        ("--method supervised --label 3", "--label: there is no such option. Did you mean 'label"),
        ("--resume . --method simclr", "--resume: a run goes on with its own configuration"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    words: str,
    sentence: str,
    experiment: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = [] if "--resume" in words else ["--config", str(experiment(**SHORT))]
    before = set(tmp_path.iterdir())
    assert main([*config, *words.split()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and f"train_control: error: {sentence}" in said.err
    assert said.err.count("error:") == 1
    assert set(tmp_path.iterdir()) == before  # no empty run folder


def test_scripts_are_found_by_the_agents_family() -> None:
    names = {"control-simclr": "train_control", "reinforce": "train_reinforce", "ppo": "train_sb3"}
    assert {agent: script_of(agent) for agent in names} == names
