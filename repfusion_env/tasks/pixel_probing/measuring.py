"""Trains a pixel probe and judges it on held-out images, over one or several draws of labels.

Shape letters: N images, H,W image, K classes, M pixels.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repfusion_env.atomic import write_text
from repfusion_env.config import ExperimentConfig
from repfusion_env.data import load_data
from repfusion_env.data.annotations import IGNORE, Masks
from repfusion_env.devices import resolve_device
from repfusion_env.noise import derive_seed
from repfusion_env.progress import Progress
from repfusion_env.registry import TASKS
from repfusion_env.tasks import Task
from repfusion_env.tasks.build import build_task, check_heldout
from repfusion_env.tasks.measuring import measure as measure_task
from repfusion_env.tasks.pixel_probing.ensemble import PixelClassifier, train_member, votes
from repfusion_env.tasks.pixel_probing.members import load_member, save_member
from repfusion_env.tasks.pixel_probing.pixels import PixelVectors, Reader
from repfusion_env.tasks.pixel_probing.settings import PixelProbeSettings, default_layers
from repfusion_env.tasks.requirements import require_annotation
from repfusion_env.teachers import check_fit, describe_teacher, load_teacher

if TYPE_CHECKING:
    from repfusion_env.prediction_figure import Predictions

# It rises whenever a probe would come out differently.
VERSION = 1
# The paper gives up a class of fewer than 20 pixels in a 256x256 image: a slip of the annotator.
LEAST_PART = 20 / 256**2
# Of held-out images whose hidden layers are in memory at once.
PIXELS = 2**18


@dataclass(frozen=True, eq=False)
class PixelProbeResult:
    """What a pixel probe reaches.

    Attributes:
        task: Whose metric it is.
        layers: What was read of the teacher.
        timesteps: At which it was read.
        width: Length of a pixel's vector.
        images: Labelled images of each draw.
        heldout_images: Images that it was judged by.
        members: Classifiers of an ensemble.
        seeds: Of the draws.
        draws: The metric's values by name, of each draw.
        seconds: Spent, without what was kept of an earlier command.
        predictions: Pictures of held-out images by the first draw's ensemble, where asked for.
    """

    task: Task
    layers: tuple[str, ...]
    timesteps: tuple[int, ...]
    width: int
    images: int
    heldout_images: int
    members: int
    seeds: tuple[int, ...]
    draws: tuple[dict[str, float], ...]
    seconds: float
    predictions: Predictions | None

    @property
    def metrics(self) -> dict[str, float]:
        """Means by name, over the draws that have a value of it."""
        names = dict.fromkeys(name for draw in self.draws for name in draw)
        return {name: statistics.fmean(self.values(name)) for name in names}

    def values(self, name: str) -> list[float]:
        """Of the draws: a class that is in no mask and in no answer has none."""
        return [draw[name] for draw in self.draws if name in draw]


def measure(
    config: ExperimentConfig,
    settings: PixelProbeSettings | None = None,
    *,
    folder: str | Path | None = None,
    pictures: bool = False,
) -> PixelProbeResult:
    """Train and judge a pixel probe on a teacher and data set.

    Args:
        config: Teacher, data and device of the experiment; a task of the user's own on masks gives
            its metric, otherwise it is that of ``segmentation``.
        settings: What is read and how much is trained.
        folder: Where classifiers and finished draws are kept, so that an interrupted command goes
            on; None: nowhere.
        pictures: Whether to draw predictions too.

    Raises:
        ValueError: In a sentence each: the data set has no masks, the teacher lacks a layer or
            timestep, or does not fit the images.
    """
    started = time.monotonic()
    settings = settings or PixelProbeSettings()
    probe = _Probe(config, settings, None if folder is None else Path(folder))
    draws, ensembles = [], []
    total = settings.repeats * settings.members
    with Progress(total, "classifiers", description="train") as progress:
        for draw in range(settings.repeats):
            ensembles.append(probe.ensemble(draw, progress))
    images = settings.repeats * probe.heldout_count
    with Progress(images, "images", description="evaluate") as progress:
        for draw, members in enumerate(ensembles):
            draws.append(probe.judged(draw, members, progress))
    return PixelProbeResult(
        task=probe.task,
        layers=tuple(probe.reader.teacher.layers),
        timesteps=settings.timesteps,
        width=ensembles[0][0].first.in_features,
        images=settings.images,
        heldout_images=probe.heldout_count,
        members=settings.members,
        seeds=tuple(range(settings.seed, settings.seed + settings.repeats)),
        draws=tuple(draws),
        seconds=time.monotonic() - started,
        predictions=probe.pictures(ensembles[0]) if pictures else None,
    )


class _Probe:
    """Banks, teacher and task of one measurement."""

    def __init__(
        self, config: ExperimentConfig, settings: PixelProbeSettings, folder: Path | None
    ) -> None:
        self.settings, self.folder = settings, folder
        device = resolve_device(config.device)
        card = describe_teacher(config.teacher)
        layers = settings.layers or default_layers(card.layers_available)
        config = replace(
            config,
            task="segmentation" if config.task in TASKS else config.task,
            teacher=replace(config.teacher, layers=layers),
            # What is not read here has nothing to object to.
            timesteps=replace(config.timesteps, values=settings.timesteps),
            observation=replace(config.observation, source="pixels"),
            fusion=replace(config.fusion, timesteps=()),
        )
        train, heldout = load_data(config.data)
        self.masks = require_annotation(train, Masks, "pixel_probe")
        check_fit(card, config, train.shape)
        if settings.images > len(train):
            raise ValueError(
                f"--images: {settings.images} given, but data set '{train.name}' has {len(train)} "
                "training images"
            )
        self.train, self.heldout = train.to(device), heldout.to(device)
        self.task = build_task(config, self.train)
        most = settings.heldout or config.evaluation.images or len(heldout)
        self.heldout_count = min(most, len(heldout))
        check_heldout(config, heldout, self.heldout_count)
        teacher = load_teacher(config.teacher, device=device)
        noised = config.teacher.input == "noised"
        seed = derive_seed(settings.seed, "pixel probe noise")
        self.reader = Reader(teacher, settings.timesteps, noised, seed)
        self.key = _key(
            *(VERSION, teacher.fingerprint, train.fingerprint, noised, settings.seed),
            *(settings.timesteps, settings.images, config.task),
            *(config.teacher.image_size, config.teacher.precision),
        )

    def ensemble(self, draw: int, progress: Progress) -> list[PixelClassifier]:
        """The members of one draw, in eval mode; those that are kept are not trained again."""
        seed, count = self.settings.seed + draw, self.settings.members
        done = draw * count
        # Nothing is read for an ensemble that is there already.
        found = [self._kept(draw, number) for number in range(count)]
        if all(member is not None for member in found):
            progress.update(done + count)
            return [member for member in found if member is not None]
        vectors, pixels, labels = self._labelled(seed)
        members = []
        for number, kept in enumerate(found):
            at = done + number

            def show(step: int, loss: float, at: int = at) -> None:
                progress.update(at, step=step, loss=loss)

            member = kept
            if member is None:
                mine = derive_seed(seed, "pixel probe", number)
                member = train_member(vectors, pixels, labels, self._classes, mine, show)
                if self.folder is not None:
                    save_member(member, self._path(draw, number), _key(self.key, draw, number))
            members.append(member)
            progress.update(at + 1)
        return members

    def judged(
        self, draw: int, members: Sequence[PixelClassifier], progress: Progress
    ) -> dict[str, float]:
        """The task's metric on the held-out images."""
        count = self.heldout_count
        key = _key(self.key, draw, len(members), self.heldout.fingerprint, count)
        path = None if self.folder is None else self.folder / "draws" / f"draw{draw}.json"
        found = None if path is None else _stored(path, key)
        if found is not None:
            progress.update((draw + 1) * count)
            return found
        done = draw * count

        def outputs(images: Tensor) -> Tensor:
            nonlocal done
            answer = self._votes(members, images)
            done += len(images)
            progress.update(done)
            return answer

        found = measure_task(self.task, outputs, self.heldout, count)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"key": key, "metrics": found}) + "\n")
        return found

    def pictures(self, members: Sequence[PixelClassifier]) -> Predictions:
        """Of some held-out images."""
        from repfusion_env.prediction_figure import draw_predictions

        shown = self.heldout.head(self.heldout_count)
        drawn = draw_predictions(self.task, lambda images: self._votes(members, images), shown)
        return replace(drawn, answer_name="probe says")

    @property
    def _classes(self) -> int:
        return len(self.masks.classes)

    def _votes(self, members: Sequence[PixelClassifier], images: Tensor) -> Tensor:
        """(N, K, H, W), as logits: the class with most votes has the largest."""
        parts = images.split(max(1, PIXELS // (self._size[0] * self._size[1])))
        return torch.cat([votes(members, self.reader(part), self._size) for part in parts])

    @property
    def _size(self) -> tuple[int, int]:
        return self.train.shape[1], self.train.shape[2]

    def _labelled(self, seed: int) -> tuple[PixelVectors, Tensor, Tensor]:
        """Vectors of the labelled images, the labelled pixels (M,), and their classes (M,)."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "pixel probe images"))
        ids = torch.randperm(len(self.train), generator=generator)[: self.settings.images]
        ids = ids.to(self.train.device)
        labels = without_slips(self.task.targets(self.train, ids)).flatten()
        pixels = (labels != IGNORE).nonzero()[:, 0]
        if len(pixels) < 2:
            raise ValueError(
                f"--images: the {self.settings.images} labelled images drawn by seed {seed} have "
                f"{len(pixels)} pixels with a class; give more images or another --seed"
            )
        vectors = PixelVectors(self.reader(self.train.pixels(ids)), self._size)
        return vectors, pixels, labels[pixels]

    def _kept(self, draw: int, number: int) -> PixelClassifier | None:
        if self.folder is None:
            return None
        member = load_member(self._path(draw, number), _key(self.key, draw, number), self._classes)
        return None if member is None else member.to(self.train.device)

    def _path(self, draw: int, number: int) -> Path:
        assert self.folder is not None
        return self.folder / "members" / f"draw{draw}-{number}.safetensors"


def without_slips(masks: Tensor) -> Tensor:
    """Masks (N, H, W) int64 in which a class of hardly any pixels in an image does not count."""
    flat = masks.flatten(1)
    counts = torch.zeros(len(flat), IGNORE + 1, dtype=torch.int64, device=masks.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    few = counts.gather(1, flat) < LEAST_PART * flat.shape[1]
    return torch.where(few, IGNORE, flat).view_as(masks)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _stored(path: Path, key: str) -> dict[str, float] | None:
    """What an earlier command left; None unless it is whole and of this ``key``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        return {name: float(value) for name, value in content["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
