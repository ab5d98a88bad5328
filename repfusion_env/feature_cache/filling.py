"""Filling caches ahead of the runs that read them.

Shape letters: n images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from repfusion_env.config import ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.feature_cache.files import GIB, DiskStore
from repfusion_env.feature_cache.opening import PIECE, FeatureCaches, reachable_timesteps
from repfusion_env.feature_cache.records import record_type
from repfusion_env.features import CHUNK, heldout_noise_seed, training_noise_seed
from repfusion_env.frozen import FrozenParts, build_frozen_parts
from repfusion_env.progress import Progress, watched


@dataclass(frozen=True)
class Filled:
    """What was done for one cache.

    Attributes:
        folder: Of the cache.
        split: Whose images.
        noise_seed: Of its noise; None under clean input.
        features: Looked up in all.
        computed: How many of them were not there yet.
        bytes_on_disk: Of the cache afterwards.
        finished: Whether nothing is missing.
    """

    folder: Path
    split: str
    noise_seed: int | None
    features: int
    computed: int
    bytes_on_disk: int
    finished: bool


@dataclass(frozen=True)
class _Job:
    split: str
    bank: ImageBank
    noise_seed: int
    parts: list[tuple[int, bool]]

    @property
    def features(self) -> int:
        return len(self.parts) * len(self.bank)


def fill(
    config: ExperimentConfig,
    *,
    timesteps: Sequence[int] = (),
    splits: Sequence[str] = ("train", "heldout"),
    seeds: Sequence[int] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> list[Filled]:
    """Compute what is missing of the features that runs of ``config`` may ask for.

    Args:
        config: The experiment; kept on disk, whatever ``cache.store`` says.
        timesteps: Only these; none: all that the run's actions and ``fusion.timesteps`` lead to.
        splits: ``train``, ``heldout``.
        seeds: Of the runs; none: the configuration's. Where ``teacher.noise_seed`` is given, or
            there is no noise, all of them share one cache.
        stopped: Asked between batches; what is computed by then is kept.

    Returns:
        One entry for each cache, up to the one where it was stopped.

    Raises:
        ValueError: In a sentence: a timestep that runs do not ask for, too small a
            ``cache.disk_gib``, or a folder that cannot be used.
    """
    wanted = replace(config, cache=replace(config.cache, store="disk"))
    parts = build_frozen_parts(wanted)
    if config.observation.source == "teacher":
        _embed(wanted, parts, splits, stopped)
    reachable = reachable_timesteps(wanted, parts.grid, parts.teacher.num_timesteps)
    caches = FeatureCaches(
        wanted, parts.teacher, reachable, parts.features.shapes, parts.train, in_memory=False
    )
    jobs = _jobs(wanted, parts, caches, timesteps, splits, seeds or (config.seed,))
    for job in jobs:
        _check_room(wanted, caches, job)
    found: list[Filled] = []
    with Progress(sum(j.features for j in jobs), "features", description="feature cache") as bar:
        for job in jobs:
            done = sum(filled.features for filled in found)
            found.append(_fill(parts, caches, job, wanted, stopped, bar, done))
            if not found[-1].finished:
                break
    return found


def _embed(
    config: ExperimentConfig,
    parts: FrozenParts,
    splits: Sequence[str],
    stopped: Callable[[], bool],
) -> None:
    """Look at every image as the agent will, so that runs find its embedding on disk."""
    size = config.teacher.batch_size or CHUNK
    banks = [parts.train if split == "train" else parts.heldout for split in splits]
    for bank in banks:
        ids = torch.arange(len(bank), device=parts.device)
        pieces = watched(
            bank.announced(ids.split(size)), len(bank), description="observations", unit="images"
        )
        for piece in pieces:
            if stopped():
                return
            parts.features.embedded(bank, piece, config.observation.timestep)


def _jobs(
    config: ExperimentConfig,
    parts: FrozenParts,
    caches: FeatureCaches,
    timesteps: Sequence[int],
    splits: Sequence[str],
    seeds: Sequence[int],
) -> list[_Job]:
    unknown = sorted(set(timesteps) - set(caches.timesteps))
    if unknown:
        known = ", ".join(map(str, caches.timesteps[:12]))
        more = ", ..." if len(caches.timesteps) > 12 else ""
        raise ValueError(
            f"--timesteps: {unknown[0]} given, which runs of this configuration never ask for; "
            f"allowed: {known}{more}"
        )
    jobs: dict[str, _Job] = {}
    for seed in seeds:
        for split in splits:
            train = split == "train"
            bank = parts.train if train else parts.heldout
            own = replace(config, seed=seed)
            noise = training_noise_seed(own, seed) if train else heldout_noise_seed(own)
            chosen = [part for part in caches.parts(bank) if not timesteps or part[0] in timesteps]
            jobs.setdefault(caches.identity(bank, noise).name, _Job(split, bank, noise, chosen))
    return list(jobs.values())


def _check_room(config: ExperimentConfig, caches: FeatureCaches, job: _Job) -> None:
    disk = _disk(caches, job)
    record = record_type(disk.identity.feature_bytes).itemsize
    there = set(disk.files())
    room = disk.most_files - len(there - set(job.parts))
    if disk.slots < len(job.bank) or len(job.parts) > room:
        needed = len(set(job.parts) | there) * len(job.bank) * record / GIB
        raise ValueError(
            f"cache.disk_gib: {config.cache.disk_gib:g} given, but these features take "
            f"{needed:.3g} GiB with what is in '{disk.folder}' already; give more, fewer "
            "--timesteps, or cache.precision bf16; where the cache was made with less, delete "
            "it first"
        )


def _fill(
    parts: FrozenParts,
    caches: FeatureCaches,
    job: _Job,
    config: ExperimentConfig,
    stopped: Callable[[], bool],
    bar: Progress,
    done: int,
) -> Filled:
    disk, bank = _disk(caches, job), job.bank
    # As large as the batches of a run, whose rounding the features then have.
    size = max(config.env.num_envs, PIECE)
    counts = caches.training if bank is parts.train else caches.others
    asked, computed = counts.asked, counts.computed
    finished = True
    for look in _looks(parts, caches, job, size):
        if stopped():
            finished = False
            break
        look()
        if disk.stopped:
            raise ValueError(disk.stopped.replace("; the run goes on", "; filling ends"))
        bar.update(done + counts.asked - asked)
    return Filled(
        disk.folder,
        job.split,
        disk.identity.noise_seed,
        counts.asked - asked,
        counts.computed - computed,
        bytes_on_disk(disk.folder),
        finished,
    )


def _looks(
    parts: FrozenParts, caches: FeatureCaches, job: _Job, size: int
) -> Iterator[Callable[[], object]]:
    """Looks at all of a job, n = ``size`` images each; an image is decoded and encoded once."""
    bank = job.bank
    for ids in bank.announced(torch.arange(len(bank), device=parts.device).split(size)):
        for mirror in sorted({mirrored for _, mirrored in job.parts}):
            images = bank.pixels(ids).flip(-1) if mirror else None
            read = parts.features.reader(caches, bank, ids, job.noise_seed, images)
            for timestep, mirrored in job.parts:
                if mirrored == mirror:
                    yield partial(read, torch.full_like(ids, timestep)[:, None])


def bytes_on_disk(folder: Path) -> int:
    """What the files of a cache's folder take; slots that were never filled take nothing."""
    return sum(512 * path.stat().st_blocks for path in folder.glob("*.bin"))


def _disk(caches: FeatureCaches, job: _Job) -> DiskStore:
    disk = caches.of(job.bank, job.noise_seed).disk
    assert disk is not None  # cache.store is disk
    return disk
