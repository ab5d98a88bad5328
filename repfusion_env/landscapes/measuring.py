"""Measures a whole landscape.

Shape letters: D noise draws, L layers, R rows of rewards, T timesteps, M training images, M'
held-out images, F feature width.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import to_dict
from repfusion_env.data.bank import ImageBank
from repfusion_env.features import chunks
from repfusion_env.frozen import FrozenParts, build_frozen_parts
from repfusion_env.landscapes.denoising import measure_denoising
from repfusion_env.landscapes.heads import balanced_folds
from repfusion_env.landscapes.landscape import Example, Landscape
from repfusion_env.landscapes.layers import spread_of_layers
from repfusion_env.landscapes.reading import Judge, Reader, Reading, store, stored
from repfusion_env.landscapes.representation import linear_cka
from repfusion_env.landscapes.selection import measure_selection
from repfusion_env.landscapes.settings import LandscapeSettings
from repfusion_env.observations import Observer
from repfusion_env.progress import Progress
from repfusion_env.teachers import check_fit, describe_teacher, load_teacher
from repfusion_env.trainer import DistillationTrainer

# It rises whenever a reading would come out differently.
VERSION = 1
EXAMPLES = 8


def measure(
    config: ExperimentConfig,
    settings: LandscapeSettings | None = None,
    *,
    run: str | Path | None = None,
    folder: str | Path | None = None,
) -> Landscape:
    """Measure what a teacher offers on a bank, by layer and timestep.

    Args:
        config: The experiment; with ``run`` that of the run.
        settings: How much is measured.
        run: Folder of a finished run, whose trained student then gives the rewards; only the run's
            layers are looked at.
        folder: Where each timestep's measurement is kept, so that an interrupted command goes on;
            None: nowhere.

    Raises:
        ValueError: In a sentence each: the teacher lacks a layer, or the run's student does not
            belong to the configuration, and whatever does not fit as for an environment.
    """
    started = time.monotonic()
    settings = settings or LandscapeSettings()
    config = _observable(config, run)
    parts = build_frozen_parts(config)
    trainer = DistillationTrainer(config, parts)
    if run is not None:
        _load_student(trainer, Path(run))
    layers = _layers(config, parts, settings, run)
    draws = settings.draws if parts.features.noised and not parts.features.fixed_noise else 1
    train_ids, heldout_ids = (
        torch.arange(min(settings.images, len(bank)), device=parts.device)
        for bank in (parts.train, parts.heldout)
    )
    folds = balanced_folds(parts.train.labels[train_ids], settings.labels, settings.seed)
    same = layers == tuple(parts.teacher.layers)
    wanted = replace(config.teacher, layers=layers)
    teacher = parts.teacher if same else load_teacher(wanted, device=parts.device)
    judge = None if run is None else _judge_of(trainer)
    reader = Reader(
        teacher,
        parts.train,
        parts.heldout,
        train_ids,
        heldout_ids,
        folds,
        draws,
        parts.features.noised,
        config.seed,
        judge,
    )
    timesteps = _open_timesteps(config, parts)
    key = _key(config, parts, settings, teacher.fingerprint, trainer if run else None)
    readings = _read_all(reader, timesteps, folder, key)
    with Progress(len(timesteps), "timesteps", description="reconstruct") as progress:
        denoising = measure_denoising(config, parts.heldout, timesteps, progress.update)

    if run is None:
        rows, kind = layers, "teacher_probe"
    else:
        rows, kind = (layers[0] if len(layers) == 1 else "all layers",), trainer.heldout_reward
    train = torch.stack([r.train for r in readings], 2).double().numpy()  # (R, D, T, M)
    heldout = torch.stack([r.heldout for r in readings], 2).double().numpy()
    observer = Observer(trainer)
    looks, heldout_looks = (
        torch.cat([observer(bank, part) for part in chunks(ids)]).cpu().numpy()
        for bank, ids in ((parts.train, train_ids), (parts.heldout, heldout_ids))
    )
    selections = tuple(
        measure_selection(train[row], heldout[row], looks, heldout_looks, timesteps, settings.seed)
        for row in range(len(rows))
    )
    own = config.teacher.layers or tuple(parts.teacher.layers)
    main = next((place for place, row in enumerate(rows) if row in own), 0)
    widths = tuple(teacher.feature_shapes[layer][0] for layer in layers)
    image_rewards = heldout.mean(1)  # (R, T, M')
    lowest, highest = _examples(
        parts.heldout, heldout_ids, image_rewards[main], timesteps, selections[main].best_fixed
    )
    return Landscape(
        teacher=config.teacher.model,
        data=parts.train.name,
        teacher_input=config.teacher.input,
        run=None if run is None else str(run),
        layers=layers,
        widths=widths,
        timesteps=timesteps,
        draws=draws,
        train_images=len(train_ids),
        heldout_images=len(heldout_ids),
        labels=int((folds >= 0).sum()),
        reward_kind=kind,
        reward_rows=rows,
        main=main,
        accuracy=_table([r.accuracy for r in readings]),
        strength=_table([r.strength for r in readings]),
        reward=heldout.mean((1, 3)),
        train_reward=train.mean((1, 3)),
        effective_rank=_table([r.effective_rank for r in readings]),
        norm=_table([r.norm for r in readings]),
        spread_share=_table([r.spread_share for r in readings]),
        cka=_similarities(readings, widths, debiased=False),
        cka_debiased=_similarities(readings, widths, debiased=True),
        image_rewards=image_rewards,
        selections=selections,
        lowest=lowest,
        highest=highest,
        denoising=denoising,
        seconds=time.monotonic() - started,
    )


def _observable(config: ExperimentConfig, run: str | Path | None) -> ExperimentConfig:
    """The configuration with an observation that there is without training."""
    if run is not None:
        return config
    if config.observation.source == "student":
        raise ValueError(
            "observation.source: 'student' given, but without --run there is no trained student; "
            "allowed here: teacher, pixels, torchvision/<name>, timm/<name>, module:function"
        )
    return replace(config, observation=replace(config.observation, student_state=False))


def _load_student(trainer: DistillationTrainer, run: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = run / "student.safetensors"
    if not path.is_file():
        raise ValueError(f"--run: '{run}' holds no student.safetensors; it is no finished run")
    if trainer.fusion.logits is not None or next(iter(trainer.loss.parameters()), None) is not None:
        raise ValueError(
            f"--run: the distillation loss or the fusion of '{run}' has learned weights, which "
            "student.safetensors does not hold; leave --run out"
        )
    try:
        trainer.evaluation_student.load_state_dict(load_file(path, device=str(trainer.device)))
    except (RuntimeError, SafetensorError, OSError) as error:
        sentence = str(error).splitlines()[0]
        raise ValueError(
            f"--run: '{path}' is not the student of this configuration ({sentence})"
        ) from error


def _layers(
    config: ExperimentConfig,
    parts: FrozenParts,
    settings: LandscapeSettings,
    run: str | Path | None,
) -> tuple[str, ...]:
    own = tuple(parts.teacher.layers)
    if run is not None:
        other = [layer for layer in settings.layers if layer not in own]
        if other:
            raise ValueError(
                f"--layers: '{other[0]}' given, but with --run only the run's own layers have "
                f"rewards: {', '.join(own)}"
            )
        return own
    card = describe_teacher(config.teacher)
    layers = settings.layers or spread_of_layers(card.layers_available, own)
    wanted = replace(config, teacher=replace(config.teacher, layers=layers))
    check_fit(card, wanted, parts.train.shape)
    return layers


def _open_timesteps(config: ExperimentConfig, parts: FrozenParts) -> tuple[int, ...]:
    """The grid without what action masks close and without repetitions, rising."""
    valid = parts.valid_actions(config.timesteps.min_snr).tolist()
    pairs = zip(parts.grid.timesteps, valid, strict=True)
    return tuple(sorted({timestep for timestep, allowed in pairs if allowed}))


def _judge_of(trainer: DistillationTrainer) -> Judge:
    def judge(bank: ImageBank, ids: Tensor, timestep: int, draw: int) -> Tensor:
        at, visits = torch.full_like(ids, timestep), torch.full_like(ids, draw)
        return trainer.judge(bank, ids, at, visits).reward

    return judge


def _key(
    config: ExperimentConfig,
    parts: FrozenParts,
    settings: LandscapeSettings,
    teacher: str,
    trainer: DistillationTrainer | None,
) -> str:
    """Of all that a reading depends on but its timestep."""
    told = {
        "version": VERSION,
        "teacher": teacher,
        "input": (config.teacher.input, config.teacher.noise),
        "banks": (parts.train.fingerprint, parts.heldout.fingerprint),
        "settings": (settings.images, settings.labels, settings.draws, settings.seed),
        "seed": config.seed,
    }
    if trainer is not None:
        told["config"] = to_dict(config)
        digest = hashlib.sha256()
        for value in trainer.evaluation_student.state_dict().values():
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        told["student"] = digest.hexdigest()
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _read_all(
    reader: Reader, timesteps: Sequence[int], folder: str | Path | None, key: str
) -> list[Reading]:
    home = None if folder is None else Path(folder) / "timesteps"
    found: dict[int, Reading] = {}
    for timestep in timesteps if home is not None else ():
        assert home is not None
        kept = stored(home / f"t{timestep}.safetensors", key)
        if kept is not None:
            found[timestep] = kept
    total = len(timesteps)
    with Progress(total, "timesteps", description="landscape", initial=len(found)) as progress:
        for timestep in timesteps:
            if timestep in found:
                continue
            found[timestep] = reader.read(timestep)
            if home is not None:
                store(found[timestep], home / f"t{timestep}.safetensors", key)
            progress.update(
                len(found), timestep=timestep, accuracy=float(found[timestep].accuracy.max())
            )
    return [found[timestep] for timestep in timesteps]


def _table(columns: list[Tensor]) -> np.ndarray:
    """T vectors (L,) as (L, T) float64."""
    return torch.stack(columns, dim=1).double().numpy()


def _similarities(readings: list[Reading], widths: Sequence[int], *, debiased: bool) -> np.ndarray:
    """(L, T, T)."""
    split = [reading.features.split(list(widths), dim=1) for reading in readings]
    return np.stack(
        [
            linear_cka([layers[place] for layers in split], debiased=debiased).numpy()
            for place in range(len(widths))
        ]
    )


def _examples(
    bank: ImageBank, ids: Tensor, rewards: np.ndarray, timesteps: Sequence[int], fixed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Images of ``rewards`` (T, M') with the lowest and with the highest best timestep.

    Among equals those come first that lose most at the ``fixed`` timestep: of an image that every
    timestep solves, the best one says nothing.
    """
    best = rewards.argmax(0)
    gains = rewards.max(0) - rewards[list(timesteps).index(fixed)]

    def example(place: int) -> Example:
        image = bank.pixels(ids[place : place + 1])[0].cpu().numpy()
        label = bank.classes[int(bank.labels[ids[place]])]
        return Example(image, label, int(timesteps[best[place]]), float(gains[place]))

    low = np.lexsort((-gains, best))[:EXAMPLES]
    high = np.lexsort((-gains, -best))[:EXAMPLES]
    return tuple(map(example, low.tolist())), tuple(map(example, high.tolist()))
