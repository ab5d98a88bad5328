"""Stage 2 of one run: probes of frozen features and fine-tuning with few or all labels.

Shape letters: M training images, S student width.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.comparison.headline import Headline, headline_of_task
from repfusion_env.atomic import write_text
from repfusion_env.config import DataConfig, ExperimentConfig
from repfusion_env.data import ImageBank, load_data
from repfusion_env.devices import resolve_device
from repfusion_env.metrics import plain
from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.tasks.build import build_task

if TYPE_CHECKING:
    from students import Backbone

# A classifier of single pixels is for few images: its cost grows with their pixels.
MOST_IMAGES = 50


@functools.lru_cache(maxsize=1)
def _banks(config: str, device: str) -> tuple[ImageBank, ImageBank]:
    """Both banks on the device; a worker's runs share them."""
    train, heldout = load_data(DataConfig(**json.loads(config)))
    return train.to(resolve_device(device)), heldout.to(resolve_device(device))


def banks(config: ExperimentConfig) -> tuple[ImageBank, ImageBank]:
    """The training and the held-out images of a configuration, loaded once for each process."""
    from dataclasses import asdict

    return _banks(json.dumps(asdict(config.data)), config.device)


def saved_backbone(run: Path, config: ExperimentConfig) -> Backbone:
    """The backbone of a finished run."""
    from repfusion_env.stage2 import load_student

    return load_student(run, shape=banks(config)[0].shape).backbone


def initial_backbone(config: ExperimentConfig, seed: int) -> Backbone:
    """The weights with which every student of this seed begins."""
    from repfusion_env.student import student_backbone

    shape = banks(config)[0].shape
    with own_randomness(derive_seed(seed, "student")):
        backbone = student_backbone(config.student, shape)
    return backbone.eval()


def measure(
    backbone: Backbone,
    config: ExperimentConfig,
    *,
    labels: Sequence[str],
    draws: int,
    finetune: dict[str, Any] | None,
    seed: int,
    kept: Path,
) -> dict[str, Any]:
    """The task's headline metric on all held-out images.

    Classification: linear probe and nearest neighbours, averaged over ``draws`` random labelled
    subsets; arms of one seed meet the same ones. Other tasks: the task's head, trained on frozen
    features of the first subset. All: fine-tuning on the first subset.

    Args:
        backbone: In evaluation mode; not changed.
        config: Names task, data and device.
        labels: Fractions (``"1%"``) or counts of the training images.
        draws: Of labelled subsets, where not all labels are used.
        finetune: Keys of :class:`repfusion_env.stage2.FinetuneConfig`; None: no fine-tuning. Those
            it does not name are the defaults, or the run's own augmentation. A head on frozen
            features is trained by them too, and by the defaults where there is no fine-tuning.
        seed: Of subsets and fine-tuning.
        kept: File for what has been measured; what is in it is not measured again.

    Returns:
        JSON-able: the headline's values under its name (``accuracy``: ``"linear 1%"``,
        ``"knn 1%"``, ``"finetune 1%"``; ``miou``: ``"head 1%"``, ``"finetune 1%"``), ``metric``
        (name and sense), ``metrics`` (of dense tasks all of the metric's values), ``chosen``
        (regularisation and neighbours, a list over draws) and ``seconds``.
    """
    train, heldout = banks(config)
    found = _kept(config, train, kept)
    backbone = backbone.to(train.images.device)
    if config.task == "classification":
        _probe(backbone, train, heldout, labels, draws, seed, found, kept)
    else:
        frozen = {**(finetune or {}), "frozen": True}
        _tune("head", backbone, config, frozen, labels, seed, found, kept)
    if finetune is not None:
        _tune("finetune", backbone, config, finetune, labels, seed, found, kept)
    return found


def measure_pixels(
    config: ExperimentConfig, *, labels: Sequence[str], seed: int, run: Path
) -> dict[str, Any]:
    """The pixel probe on the teacher's own features, where few images are labelled.

    Args:
        config: Names teacher, data and device.
        labels: Fractions or counts; more than :data:`MOST_IMAGES` are left out.
        seed: Of labelled images and classifiers.
        run: Folder for what has been measured.

    Returns:
        As :func:`measure`, its values under ``"head 1%"``: it is a classifier on frozen features.
        ``teacher_evaluations`` counts the images that went through the teacher to be learned from.
    """
    from repfusion_env.stage2 import label_count
    from repfusion_env.tasks.pixel_probing import PixelProbeSettings
    from repfusion_env.tasks.pixel_probing import measure as run_probe

    train, heldout = banks(config)
    kept = run / "stage-2.json"
    found = _kept(config, train, kept)
    found.setdefault("teacher_evaluations", {"setup": 0, "training": 0})
    values = found[found["metric"]["name"]]
    for text in labels:
        count = label_count(text, len(train))
        if count > MOST_IMAGES or f"head {text}" in values:
            continue
        settings = PixelProbeSettings(
            images=count, heldout=len(heldout), seed=derive_seed(seed, "labels 0")
        )
        started = time.monotonic()
        probed = run_probe(config, settings, folder=run / f"pixel-probe-{count}")
        values[f"head {text}"] = probed.metrics[found["metric"]["name"]]
        found["metrics"][f"head {text}"] = plain(probed.metrics)
        found["seconds"]["probe"] += time.monotonic() - started
        found["teacher_evaluations"]["training"] += count * len(settings.timesteps)
        write_text(kept, json.dumps(found, indent=1))
    return found


def _kept(config: ExperimentConfig, train: ImageBank, kept: Path) -> dict[str, Any]:
    """What has been measured, or an empty record."""
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        found.setdefault("metric", Headline().as_dict())
        found.setdefault("metrics", {})
        return found
    headline = headline_of_task(build_task(config, train))
    return {
        headline.name: {},
        "metric": headline.as_dict(),
        "metrics": {},
        "chosen": {},
        "seconds": {"probe": 0, "finetune": 0},
    }


def _probe(
    backbone: Backbone,
    train: ImageBank,
    heldout: ImageBank,
    labels: Sequence[str],
    draws: int,
    seed: int,
    found: dict[str, Any],
    kept: Path,
) -> None:
    """Linear probe and nearest neighbours of classes."""
    from repfusion_env.stage2 import embed, knn_probe, label_count, labelled_subset, linear_probe

    todo = [text for text in labels if f"knn {text}" not in found["accuracy"]]
    if not todo:
        return
    started = time.monotonic()
    train_x, test_x = (embed(backbone, bank).cpu() for bank in (train, heldout))  # (M, S)
    train_y, test_y = train.labels.cpu(), heldout.labels.cpu()
    for text in todo:
        count = label_count(text, len(train))
        linear, nearest = [], []
        for draw in range(draws if count < len(train) else 1):
            drawn = derive_seed(seed, f"labels {draw}")
            ids = labelled_subset(train_y, count, drawn)
            given = (train_x[ids], train_y[ids], test_x, test_y)
            linear.append(linear_probe(*given, seed=drawn))
            nearest.append(knn_probe(*given, seed=drawn))
        for name, probes, choice in (
            ("linear", linear, [probe.strength for probe in linear]),
            ("knn", nearest, [probe.neighbours for probe in nearest]),
        ):
            accuracy = sum(probe.accuracy for probe in probes) / len(probes)
            found["accuracy"][f"{name} {text}"] = accuracy
            found["chosen"][f"{name} {text}"] = choice
    found["seconds"]["probe"] += time.monotonic() - started
    write_text(kept, json.dumps(found, indent=1))


def _tune(
    kind: str,
    backbone: Backbone,
    config: ExperimentConfig,
    keys: dict[str, Any],
    labels: Sequence[str],
    seed: int,
    found: dict[str, Any],
    kept: Path,
) -> None:
    """Fine-tuning, or a head on frozen features (``kind`` is ``head``), at each amount."""
    from repfusion_env.stage2 import FinetuneConfig
    from repfusion_env.stage2 import finetune as run_finetuning
    from repfusion_env.stage2.settings import augmentation_of

    train, heldout = banks(config)
    values = found[found["metric"]["name"]]
    for text in labels:
        if f"{kind} {text}" in values:
            continue
        settings = FinetuneConfig(
            **(augmentation_of(config) | keys), labels=text, seed=derive_seed(seed, "labels 0")
        )
        tuned = run_finetuning(
            backbone, train, heldout, settings, experiment=config, progress=False
        )
        values[f"{kind} {text}"] = tuned.value
        if config.task != "classification":
            found["metrics"][f"{kind} {text}"] = plain(tuned.metrics)
        found["seconds"]["probe" if kind == "head" else "finetune"] += tuned.seconds
        write_text(kept, json.dumps(found, indent=1))
