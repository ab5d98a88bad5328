"""What is compared: the published step and the configurations of our side, over one material.

Shape letters: N lanes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.material import CLASSES, DDPM_CIFAR10_UNET, LAYER, TINY_UNET, Material
from benchmarks.published_step import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, PublishedStep
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import check, load_config
from repfusion_env.data import load_data
from repfusion_env.devices import resolve_device
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.trainer import DistillationTrainer, StepResult

TIMESTEPS = 1000
DIGITS = "shipped digits"
PREPARED = 64  # batches of ids and actions drawn before the clock starts
NO_ROOM_GIB = 1e-6  # so that a cache on disk is read from there


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        lanes: N of our side.
        rounds: Samples per line.
        steps: Per sample.
        student: Name in the registry.
        smoke: Tiny networks, no meaning.
        published_lanes: Batch size of the published step; None: N.
    """

    lanes: int
    rounds: int
    steps: int
    student: str
    smoke: bool = False
    published_lanes: int | None = None

    @property
    def published(self) -> int:
        """Batch size of the published step."""
        return self.published_lanes or self.lanes

    @property
    def images(self) -> int:
        """Of the bank: few enough for a cache of all their 1,000 timesteps in memory."""
        return 16 if self.smoke else min(max(256, 4 * self.lanes), 2048)


@dataclass(frozen=True)
class Setting:
    """One configuration of our side.

    Attributes:
        name: In the table.
        reward: ``reward.kind``.
        input: ``teacher.input``.
        fast: bf16 and channels-last for teacher and student.
        compiled: ``speed.compile on``; on CUDA with CUDA graphs.
        cache: ``cache.store``; the disk's is read from the disk. Warm before the clock starts.
        start: ``reward.student``.
        group: ``env.group_size``.
    """

    name: str
    reward: str
    input: str
    fast: bool
    compiled: bool = False
    cache: str = "off"
    start: str = "updated"
    group: int = 1


def published_work(name: str, **changes: Any) -> Setting:
    """Clean input and a head on the teacher's feature, as in the published step."""
    settings: dict[str, Any] = {"fast": True} | changes
    return Setting(f"published work, {name}", "teacher_probe", "clean", **settings)


def default_reward(name: str, **changes: Any) -> Setting:
    """Noised input and the look-ahead, as in the shipped configurations."""
    settings: dict[str, Any] = {"fast": True} | changes
    return Setting(f"default reward, {name}", "student_lookahead", "noised", **settings)


SETTINGS = (
    published_work("fp32", fast=False),
    published_work("fast"),
    published_work("fast, compiled", compiled=True),
    published_work("cache in memory, fp32", fast=False, cache="memory"),
    published_work("cache in memory, fast", cache="memory"),
    published_work("cache in memory, fast, compiled", cache="memory", compiled=True),
    published_work("cache on disk, fast, compiled", cache="disk", compiled=True),
    default_reward("fp32", fast=False),
    default_reward("fast"),
    default_reward("fast, compiled", compiled=True),
    default_reward("training forward's student, fast, compiled", compiled=True, start="training"),
    default_reward("groups of 4, fast, compiled", compiled=True, group=4),
    default_reward("cache in memory, fast, compiled", cache="memory", compiled=True),
    default_reward(
        "training forward's student, cache in memory, fast, compiled",
        cache="memory",
        compiled=True,
        start="training",
    ),
)


def experiment(
    setting: Setting, material: Material, size: Size, device: str, folder: Path | None = None
) -> ExperimentConfig:
    """The configuration of our side: everything that the published step does, by its settings.

    Args:
        setting: Which.
        material: Teacher and images.
        size: Lanes and student.
        device: As in configurations.
        folder: For a cache on disk.
    """
    form = {
        "precision": "bf16" if setting.fast else "fp32",
        "channels_last": setting.fast,
    }
    width = (TINY_UNET if size.smoke else DDPM_CIFAR10_UNET)["block_out_channels"][-1]
    # Compilation takes minutes whatever the size.
    compiled = setting.compiled and not size.smoke
    graphs = compiled and resolve_device(device).type == "cuda"
    return check(
        {
            "device": device,
            "data": {"name": "npz", "path": str(material.bank)},
            "teacher": {
                "model": str(material.teacher),
                "layers": [LAYER],
                "input": setting.input,
                "noise": "fresh" if setting.cache == "off" else "fixed",
                # Statistics of each of 1000 timesteps would take many times the measurement.
                "standardize": "grid",
                "standardize_images": 64,
                **form,
            },
            "timesteps": {"count": TIMESTEPS, "first": 0, "last": TIMESTEPS - 1},
            "student": {"name": size.student, "ema": 0.999, **form},
            "optimizer": {
                "name": "sgd",
                "learning_rate": LEARNING_RATE,
                "momentum": MOMENTUM,
                "weight_decay": WEIGHT_DECAY,
                "batch_size": size.lanes,
            },
            "reward": {
                "kind": setting.reward,
                "probe_hidden": width,
                "student": setting.start,
            },
            # Pixels need no pass of the teacher over the bank, and are the largest observation.
            "observation": {"source": "pixels"},
            "env": {"num_envs": size.lanes, "group_size": setting.group},
            "speed": {
                "compile": "on" if compiled else "off",
                "cuda_graphs": graphs,
            },
            "cache": {
                "store": setting.cache,
                "folder": str((folder or material.bank.parent) / "cache"),
                "memory_gib": NO_ROOM_GIB if setting.cache == "disk" else 16.0,
            },
        }
    )


def digits(size: Size, device: str) -> ExperimentConfig:
    """The shipped configuration, whose steps are so short that the environment could show."""
    changes: dict[str, Any] = {"device": device, "env.num_envs": size.lanes}
    if size.smoke:
        changes |= {"data.train_limit": 64, "teacher.standardize_images": 8}
    return load_config("digits", changes)


class WatchedTrainer(DistillationTrainer):
    """The trainer with a stopwatch on ``step``: what an environment's step takes beyond it."""

    _seconds = 0.0
    _pairs: tuple[tuple[torch.cuda.Event, torch.cuda.Event], ...] = ()

    def step(self, *args: Any, **kwargs: Any) -> StepResult:
        """See the trainer. On CUDA the device's own clock is read, later."""
        if self.device.type == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            result = super().step(*args, **kwargs)
            pair[1].record()
            self._pairs = (*self._pairs, pair)
            return result
        started = time.perf_counter()
        result = super().step(*args, **kwargs)
        self._seconds += time.perf_counter() - started
        return result

    def seconds(self) -> float:
        """Spent in :meth:`step` so far; waits for the device."""
        if self._pairs:
            torch.cuda.synchronize(self.device)
            self._seconds += sum(a.elapsed_time(b) for a, b in self._pairs) / 1000
            self._pairs = ()
        return self._seconds


def environment(config: ExperimentConfig) -> tuple[RepFusionVectorEnv, WatchedTrainer]:
    """The environment over a watched trainer, showing its first images."""
    trainer = WatchedTrainer(config, build_frozen_parts(config))
    env = RepFusionVectorEnv(trainer=trainer)
    env.reset(seed=0)
    return env, trainer


def random_actions(env: RepFusionVectorEnv, batches: int) -> Tensor:
    """Actions for so many steps, (batches, N), on the device."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(len(env.grid), (batches, env.num_envs), generator=generator)
    return actions.to(env.device)


def flops_per_decision(setting: Setting, material: Material, size: Size, device: str) -> float:
    """Floating-point operations (a multiplication and an addition are two) of one decision.

    Counted in an uncompiled step of few lanes, on which they depend as little as on the precision:
    matrix products, convolutions and attention, forward and backward.
    """
    from torch.utils.flop_counter import FlopCounterMode

    lanes = min(size.lanes, 8)
    plain = replace(setting, fast=False, compiled=False, cache="off")
    env, _ = environment(experiment(plain, material, replace(size, lanes=lanes), device))
    actions = random_actions(env, 1)[0]
    env.step(actions)
    with FlopCounterMode(display=False) as counter:
        env.step(actions)
    return counter.get_total_flops() / lanes


def published_step(
    material: Material, size: Size, device: str, *, policy: bool, lanes: int | None = None
) -> Any:
    """The published step as a function of the step's number.

    Args:
        material: Teacher and images.
        size: Its student.
        device: As in configurations.
        policy: With its policy network.
        lanes: Batch size; default: the size's.
    """
    where = resolve_device(device)
    bank = load_data(experiment(SETTINGS[0], material, size, device).data)[0].to(where)
    generator = torch.Generator().manual_seed(0)
    shape = (PREPARED, lanes or size.published)
    ids = torch.randint(len(bank), shape, generator=generator).to(where)
    published = PublishedStep(
        material.teacher,
        LAYER,
        student=size.student,
        shape=bank.shape,
        classes=CLASSES,
        device=where,
        policy=policy,
    )

    def step(number: int) -> dict[str, float]:
        at = ids[number % PREPARED]
        return published.step(bank.pixels(at), bank.labels[at])

    return step
