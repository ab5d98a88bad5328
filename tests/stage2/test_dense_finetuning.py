"""Fine-tuning on masks, points and boxes: it learns, moves targets with images, and goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from repfusion_env import finetune as command
from repfusion_env import landscape, probe
from repfusion_env.checkpoint import load_latest, save_checkpoint
from repfusion_env.config_loading import load_config, to_yaml
from repfusion_env.data import load_data
from repfusion_env.stage2 import FinetuneConfig, finetune, finetuning, load_banks
from repfusion_env.stage2.finetuning import KIND, Stopped
from repfusion_env.stage2.model_card import model_card
from students import build_backbone

SETTINGS = {"steps": 6, "batch_size": 16, "evaluations": 1, "seed": 3}
TASKS = ("segmentation", "landmarks", "detection")


@pytest.fixture(scope="module")
def student():
    """A small CNN with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build_backbone("small_cnn", in_channels=1, image_size=16)


@pytest.fixture
def experiment(squares):
    """The configuration of a run on the rectangles, by its task."""

    def make(task, **overrides):
        values = {"task": task, "data.name": "npz", "data.path": squares, "device": "cpu"}
        small = {f"{name}.width": 16 for name in TASKS}
        return load_config("digits", values | small | {"distillation.dense": True} | overrides)

    return make


@pytest.fixture
def banks(squares, experiment):
    return load_data(experiment("segmentation").data)


def run(student, banks, experiment, folder=None, **settings):
    options = {key: settings.pop(key) for key in ("resume", "interrupted") if key in settings}
    config = FinetuneConfig(**(SETTINGS | settings))
    return finetune(
        student,
        *banks,
        config,
        experiment=experiment,
        checkpoint_folder=folder,
        progress=False,
        **options,
    )


def equal(first, second):
    one, two = first.model.state_dict(), second.model.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("task", TASKS)
def test_it_learns_what_the_run_was_made_for(task, student, banks, experiment):
    config = experiment(task, **{"segmentation.head": "lraspp"})
    result = run(student, banks, config, steps=30, learning_rate=1e-2, evaluations=3)
    first, last = result.curve[0], result.curve[-1]
    assert last["loss"] < 0.7 * first["loss"]
    assert result.metrics.items() <= last.items() and result.value == last[result.headline]
    better = {"segmentation": result.value > 0.5, "landmarks": result.value < 0.2}
    assert better.get(task, result.metrics.get("map_50", 0.0) > 0.2)


def test_the_reported_miou_is_that_of_the_returned_model(student, banks, experiment):
    result = run(student, banks, experiment("segmentation"), steps=30, learning_rate=5e-3)
    heldout = banks[1]
    with torch.no_grad():
        logits = result.model(heldout.pixels(torch.arange(len(heldout))))
    said = result.model.task.predict(logits).numpy()
    known = heldout.annotations["masks"].values.numpy()
    parts = [
        ((said == k) & (known == k)).sum() / ((said == k) | (known == k)).sum() for k in range(3)
    ]
    assert result.headline == "miou"
    assert result.value == pytest.approx(np.mean(parts), abs=1e-6)
    assert result.metrics["iou/dim"] == pytest.approx(parts[2], abs=1e-6)


def test_the_reported_nme_is_that_of_the_returned_model(student, banks, experiment):
    result = run(student, banks, experiment("landmarks"))
    heldout = banks[1]
    with torch.no_grad():
        maps = result.model(heldout.pixels(torch.arange(len(heldout))))
    said = result.model.task.predict(maps)[..., :2].double().numpy()
    known = heldout.annotations["keypoints"].points.double().numpy()
    unit = np.sqrt(np.prod(known.max(1) - known.min(1), axis=1))
    errors = np.linalg.norm(said - known, axis=2).mean(1) / unit
    assert result.value == pytest.approx(errors.mean(), rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_an_interrupted_run_goes_on_bit_for_bit(task, student, banks, experiment, tmp_path):
    everything = {"flip": True, "rotation": 15.0, "scale": 0.1, "translation": 0.1, "ema": 0.9}
    whole = run(student, banks, experiment(task), **everything)
    asked = iter([False] * 2 + [True])
    with pytest.raises(Stopped, match="step 3 of 6"):
        run(
            student,
            banks,
            experiment(task),
            tmp_path,
            interrupted=lambda: next(asked),
            **everything,
        )
    torch.rand(5)
    resumed = run(student, banks, experiment(task), tmp_path, resume=True, **everything)
    assert equal(resumed, whole)


def test_masks_move_with_their_images(student, banks, experiment, monkeypatch):
    seen = []
    forward, loss = finetuning.TaskStudent.forward, finetuning.task_loss

    def watched(self, images):
        seen.append([images.clone()])
        return forward(self, images)

    def watch_loss(task, outputs, targets, **options):
        seen[-1].append(targets.clone())
        return loss(task, outputs, targets, **options)

    monkeypatch.setattr(finetuning.TaskStudent, "forward", watched)
    monkeypatch.setattr(finetuning, "task_loss", watch_loss)
    run(student, banks, experiment("segmentation"), flip=True, translation=0.2)
    pairs = [pair for pair in seen if len(pair) == 2]
    originals = {image.numpy().tobytes() for image in banks[0].pixels(torch.arange(48))}
    moved = 0
    for images, masks in pairs:
        moved += sum(image.numpy().tobytes() not in originals for image in images)
        # Between pixels a shifted image is mixed: what is plainly bright or black counts.
        counts = masks != 255
        assert (masks[counts & (images[:, 0] > 0.6)] == 1).all()
        assert (masks[counts & (images[:, 0] == -1.0)] == 0).float().mean() > 0.97
    assert len(pairs) == 6
    assert moved > 80  # of 96


def test_only_the_chosen_images_are_used_whatever_is_in_them(student, banks, experiment):
    train, heldout = banks
    first = run(student, banks, experiment("segmentation"), labels="25%")
    assert first.labels == 12
    other = train.images.clone()
    used = finetuning.task_subset("masks", train, 12, SETTINGS["seed"])
    assert set(finetuning.task_subset("masks", train, 5, SETTINGS["seed"]).tolist()) <= set(
        used.tolist()
    )
    unused = torch.ones(48, dtype=torch.bool)
    unused[used] = False
    other[unused] = 99
    second = run(
        student, (replace(train, images=other), heldout), experiment("segmentation"), labels="25%"
    )
    assert equal(first, second)


def test_a_frozen_student_is_probed_by_its_head_alone(student, banks, experiment):
    result = run(student, banks, experiment("segmentation"), frozen=True, head="linear")
    state = student.state_dict()
    for name, value in result.model.backbone.state_dict().items():
        assert torch.equal(value, state[name])
    weights = sum(parameter.numel() for parameter in result.model.head.parameters())
    assert weights == 128 * 3 + 3  # the last stage's channels to three classes


def test_checkpoints_of_an_earlier_version_go_on(student, banks, experiment, tmp_path):
    asked = iter([False, True])
    with pytest.raises(Stopped):
        run(student, banks, None, tmp_path, interrupted=lambda: next(asked), labels=3)
    step, state = load_latest(tmp_path, kind=KIND)
    settings = json.loads(state["identity"]["settings"])
    for name in ("head", "rotation", "scale", "translation", "jitter"):
        del settings[name]
    state["identity"] = {**state["identity"], "settings": json.dumps(settings, sort_keys=True)}
    del state["identity"]["head"]
    save_checkpoint(tmp_path, step, state, kind=KIND, keep=1)
    resumed = run(student, banks, None, tmp_path, resume=True, labels=3)
    assert equal(resumed, run(student, banks, None, labels=3))


@pytest.mark.parametrize(
    ("task", "settings", "sentence"),
    [
        ("segmentation", {"crop": 2}, "crop: 2 given, but masks of this task cannot follow it"),
        ("landmarks", {"mixup": 0.2}, "mixup: 0.2 given, but keypoints of this task"),
        ("detection", {"label_smoothing": 0.1}, "label_smoothing: 0.1 given, but boxes"),
        ("segmentation", {"head": "fcm"}, "Did you mean 'fcn'"),
        ("classification", {"head": "fcn"}, "task 'classification' has one head alone"),
    ],
)
def test_what_targets_cannot_follow_is_refused(
    task, settings, sentence, student, banks, experiment
):
    with pytest.raises(ValueError, match=sentence):
        run(student, banks, experiment(task), **settings)


def test_images_without_masks_are_refused(student, experiment):
    config = replace(experiment("segmentation"), data=load_config("digits").data)
    with pytest.raises(ValueError, match="task 'segmentation' needs masks"):
        run(student, load_banks(config), config)


@pytest.fixture
def finished_run(experiment, student, tmp_path):
    """A finished run of segmentation, as training commands leave it."""
    from repfusion_env.weights import save_weights

    folder = tmp_path / "runs" / "squares-reinforce"
    folder.mkdir(parents=True)
    config = experiment("segmentation", **{"augmentation.flip": True})
    (folder / "config.yaml").write_text(to_yaml(config))
    about = {"agent": "reinforce", "label": "squares", "created": "2026-01-01T00:00:00+0000"}
    (folder / "run.json").write_text(json.dumps(about))
    save_weights(torch.nn.ModuleDict({"backbone": student}), folder / "student.safetensors")
    summary = {"decisions": 640, "student": {"linear_probe_accuracy": None}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_command_leaves_metric_and_pictures(finished_run, capsys):
    words = [str(finished_run), "--labels", "25%", "--steps", "4", "--evaluations", "2"]
    assert command.main(words) == 0
    folder = finished_run / "finetune-25pct"
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert summary["labelled_images"] == 12 and summary["task"] == "segmentation"
    assert summary["headline"] == "miou" and "accuracy" not in summary
    assert summary["metrics"]["miou"] == rows[-1]["miou"]
    for name in ("curve.png", "predictions.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    # What the run augments, its fine-tuning augments.
    assert json.loads((folder / "config.json").read_text())["settings"]["flip"] is True
    said = capsys.readouterr().out
    shown = f"mIoU {100 * summary['metrics']['miou']:.1f} %"
    assert "12 of 48 images with masks" in said and shown in said
    from repfusion_env.stage2 import load_student

    assert f"`finetune-25pct`, segmentation, 12 images: {shown}" in model_card(
        load_student(finished_run)
    )


def test_what_tells_classes_apart_refuses_dense_runs(finished_run, capsys):
    assert probe.main([str(finished_run)]) == 2
    said = capsys.readouterr().err
    assert "task 'segmentation'" in said and "repfusion_env.finetune" in said
    assert command.main([str(finished_run), "--crop", "2"]) == 2
    assert "crop: 2 given" in capsys.readouterr().err
    assert not list(finished_run.glob("finetune-*"))
    out = finished_run.parent / "landscape"
    config = str(finished_run / "config.yaml")
    assert landscape.main(["--config", config, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "task: 'segmentation' given" in said and "agents.compare" in said
    assert not out.exists()


def test_a_curve_may_hold_classes_that_no_image_has(student, banks, experiment, tmp_path):
    train, heldout = (bank.take(torch.arange(4)) for bank in banks)
    masks = heldout.annotations["masks"]
    empty = replace(masks, values=torch.zeros_like(masks.values), classes=(*masks.classes, "none"))
    heldout = replace(heldout, annotations={"masks": empty})
    values = train.annotations["masks"].values
    train = replace(train, annotations={"masks": replace(empty, values=values)})
    result = run(student, (train, heldout), experiment("segmentation"), tmp_path, steps=2)
    assert math.isfinite(result.value)
