"""Stage 2 of one run: linear probe, nearest neighbours and fine-tuning with few or all labels.

Shape letters: M training images, S student width.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repfusion_env.atomic import write_text
from repfusion_env.config import DataConfig, ExperimentConfig
from repfusion_env.data import ImageBank, load_data
from repfusion_env.devices import resolve_device
from repfusion_env.noise import derive_seed, own_randomness

if TYPE_CHECKING:
    from students import Backbone


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
    from students import build_backbone

    channels, size, _ = banks(config)[0].shape
    with own_randomness(derive_seed(seed, "student")):
        backbone = build_backbone(
            config.student.name,
            in_channels=channels,
            image_size=size,
            pretrained=config.student.pretrained,
        )
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
    """Accuracies on all held-out images.

    Probes are averaged over ``draws`` random labelled subsets; arms of one seed meet the same ones,
    and fine-tuning the first of them.

    Args:
        backbone: In evaluation mode; not changed.
        config: Names data and device.
        labels: Fractions (``"1%"``) or counts of the training labels.
        draws: Of labelled subsets, where not all labels are used.
        finetune: Keys of :class:`repfusion_env.stage2.FinetuneConfig`; None: no fine-tuning.
        seed: Of subsets and fine-tuning.
        kept: File for what has been measured; what is in it is not measured again.

    Returns:
        JSON-able: ``accuracy`` by task (``"linear 1%"``, ``"knn 1%"``, ``"finetune 1%"``),
        ``chosen`` (regularisation and neighbours, by task, a list over draws) and ``seconds``.
    """
    from repfusion_env.stage2 import (
        FinetuneConfig,
        embed,
        knn_probe,
        label_count,
        labelled_subset,
        linear_probe,
    )
    from repfusion_env.stage2 import finetune as run_finetuning

    found: dict[str, Any] = {"accuracy": {}, "chosen": {}, "seconds": {"probe": 0, "finetune": 0}}
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
    train, heldout = banks(config)
    backbone = backbone.to(train.images.device)
    counts = {text: label_count(text, len(train)) for text in labels}
    todo = [text for text in labels if f"knn {text}" not in found["accuracy"]]
    if todo:
        started = time.monotonic()
        train_x, test_x = (embed(backbone, bank).cpu() for bank in (train, heldout))  # (M, S)
        train_y, test_y = train.labels.cpu(), heldout.labels.cpu()
        for text in todo:
            linear, nearest = [], []
            for draw in range(draws if counts[text] < len(train) else 1):
                drawn = derive_seed(seed, f"labels {draw}")
                ids = labelled_subset(train_y, counts[text], drawn)
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
    if finetune is not None:
        for text in labels:
            if f"finetune {text}" not in found["accuracy"]:
                settings = FinetuneConfig(
                    **finetune, labels=text, seed=derive_seed(seed, "labels 0")
                )
                tuned = run_finetuning(backbone, train, heldout, settings, progress=False)
                found["accuracy"][f"finetune {text}"] = tuned.accuracy
                found["seconds"]["finetune"] += tuned.seconds
                write_text(kept, json.dumps(found, indent=1))
    return found
