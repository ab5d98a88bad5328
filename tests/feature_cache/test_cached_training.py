"""Training out of a feature cache: the same student, fewer teacher forwards."""

from __future__ import annotations

import hashlib
import warnings
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.reporting import teacher_evaluations
from repfusion_env.config_loading import ConfigError, check, load_config, merge
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.feature_cache import CacheWarning
from repfusion_env.features import TeacherFeatures
from repfusion_env.teachers.reading.network import NetworkTeacher

FIXED = {"teacher.noise": "fixed"}


@pytest.fixture
def cached(tiny: dict[str, Any], tmp_path: Path):
    """Makes an environment whose features are kept in one folder."""

    def make(store: str, **changes: Any) -> RepFusionVectorEnv:
        keys = {"cache": {"store": store, "folder": str(tmp_path)}, "data.train_limit": 16}
        keys |= {"teacher.standardize_images": 8, "timesteps.count": 3} | FIXED
        env = RepFusionVectorEnv(config=merge(merge(tiny, keys), changes))
        env.reset(seed=changes.get("seed", 0))
        return env

    return make


def _go(env: RepFusionVectorEnv, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        env.action_space.seed(step)
        env.step(env.action_space.sample())


def _student(env: RepFusionVectorEnv) -> str:
    digest = hashlib.sha256()
    for value in env.trainer.student.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _forbid_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(NetworkTeacher, "features", refuse)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher.input": "clean", "teacher.noise": "fresh", "reward": "teacher_probe"},
        {"env.action": "timestep_set", "env.set_size": 2, "fusion.timesteps": [7]},
        {"env.action": "continuous_timestep", "timesteps.last": 20},
        {
            "teacher.layers": ["down_blocks.0.resnets.0", "mid_block"],
            "env.action": "timestep_and_layer",
            "fusion": {"weights": "learned", "timesteps": [5]},
        },
        {"augmentation.flip": True, "env.group_size": 2},
    ],
    ids=["pooled", "clean", "sets", "continuous", "layers", "flip and groups"],
)
def test_the_student_is_the_same_to_the_last_bit(changes, cached, monkeypatch):
    students = []
    for store in ("off", "memory", "disk"):
        env = cached(store, **changes)
        _go(env, 6)
        students.append(_student(env))
    assert len(set(students)) == 1


def test_maps_of_a_dense_task_are_the_same_to_the_last_bit(cached, squares):
    changes = {
        "data": {"name": "npz", "path": squares, "train_limit": 16},
        "task": "segmentation",
        "distillation.dense": True,
        "augmentation.flip": True,
    }
    students = []
    for store in ("off", "disk", "memory"):
        env = cached(store, **changes)
        _go(env, 6)
        students.append(_student(env))
    assert len(set(students)) == 1


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_what_is_kept_does_not_go_through_the_teacher_again(store, cached, monkeypatch):
    env = cached(store)
    bank, ids = env.trainer.parts.train, torch.arange(16)
    visits = torch.zeros_like(ids)
    for timestep in env.grid.timesteps:
        env.trainer.judge(bank, ids, torch.full_like(ids, timestep), visits)
    first = env.trainer.judge(bank, ids, torch.full_like(ids, 400), visits).reward
    _forbid_the_teacher(monkeypatch)
    again = env.trainer.judge(bank, ids, torch.full_like(ids, 400), visits).reward
    assert torch.equal(first, again)


def test_what_is_opened_in_inference_mode_is_filled_outside_of_it(cached):
    env = cached("memory")
    bank, ids = env.trainer.parts.heldout, torch.arange(4)
    for first, inside in ((0, True), (4, False), (8, True)):
        with torch.inference_mode(inside):
            env.trainer.judge(bank, ids + first, torch.full_like(ids, 400), ids)
    cache = env.trainer.parts.features.caches.of(bank, env.trainer.heldout_noise_seed)
    assert cache.memory.count == 12


def test_a_full_table_makes_the_host_wait_for_nothing(cached, no_waiting):
    env = cached("memory", **{"augmentation.flip": True})
    trainer, ids = env.trainer, torch.arange(16)
    bank, features = trainer.parts.train, trainer.parts.features
    both = (bank.pixels(ids), bank.pixels(ids).flip(-1))
    at = torch.tensor(env.grid.timesteps).expand(16, -1)
    filled = [
        [z.clone() for (z,) in features.each(bank, ids, at, ids, trainer.noise_seed, images)]
        for images in both
    ]
    cache = features.caches.of(bank, trainer.noise_seed)
    assert cache.memory.complete
    cache.waiting_is_free = False  # as on CUDA
    with no_waiting():
        found = [
            [z for (z,) in features.each(bank, ids, at, ids, trainer.noise_seed, images)]
            for images in both
        ]
    for mine, expected in zip(found, filled, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    assert not torch.equal(filled[0][0], filled[1][0])
    # A timestep that the table has no place for gives no other's feature.
    outside = torch.full((16, 1), 3)
    ((lost,),) = features.each(bank, ids, outside, ids, trainer.noise_seed)
    assert lost.isnan().all()
    cache.waiting_is_free = True
    ((computed,),) = features.each(bank, ids, outside, ids, trainer.noise_seed)
    (expected,) = features(bank, ids, outside[:, 0], ids, trainer.noise_seed)
    assert torch.equal(computed, expected)


def test_a_second_run_reads_what_the_first_has_left_on_disk(cached, monkeypatch):
    first, looks = cached("disk"), []
    _go(first, 6)
    first.trainer.judge(first.trainer.parts.heldout, *_some(first))
    _forbid_the_teacher(monkeypatch)  # to the statistics and the observations too
    shape = first.trainer.parts.features.shapes
    monkeypatch.setattr(TeacherFeatures, "_look_at_one", lambda self, _: _set(self, shape))
    second = cached("disk")
    _go(second, 6)
    looks = [
        env.trainer.judge(env.trainer.parts.heldout, *_some(env)).reward for env in (first, second)
    ]
    assert _student(first) == _student(second) and torch.equal(*looks)
    assert second.trainer.drain_metrics()["cache/hit_rate"] == 1.0
    assert teacher_evaluations(second, 1, 24) == {"setup": 1, "training": 0}


def _some(env: RepFusionVectorEnv) -> tuple[torch.Tensor, ...]:
    ids = torch.arange(4)
    return ids, torch.tensor(env.grid.timesteps)[ids % 3], ids


def _set(features: TeacherFeatures, shapes: list[tuple[int, int, int]]) -> None:
    features.shapes = shapes


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(store, cached):
    straight = cached(store)
    _go(straight, 5)
    state = deepcopy(straight.state_dict())
    _go(straight, 5, start=5)
    resumed = cached(store)
    resumed.load_state_dict(state)
    _go(resumed, 5, start=5)
    assert _student(resumed) == _student(straight)
    told = [env.trainer.parts.features.caches.summary() for env in (straight, resumed)]
    assert told[0]["asked"] == told[1]["asked"] == 40


def test_seeds_share_a_cache_where_the_noise_has_a_seed_of_its_own(cached):
    heldout = set()
    for seed in (0, 1):
        env = cached("disk", **{"teacher.noise_seed": 5, "seed": seed, "run.decisions": 64})
        bank, ids = env.trainer.parts.train, torch.arange(16)
        at = torch.tensor(env.grid.timesteps).expand(16, -1)
        list(env.trainer.parts.features.each(bank, ids, at, ids, env.trainer.noise_seed))
        assert env.trainer.parts.features.caches.summary() == {
            "asked": 48,
            "computed": 0 if seed else 48,
        }
        heldout.add(env.trainer.heldout_noise_seed)
    assert len(heldout) == 1


def test_without_a_seed_of_its_own_the_noise_is_that_of_the_run(cached):
    seeds = {cached("off", seed=seed).trainer.noise_seed for seed in (0, 1)}
    assert len(seeds) == 2
    assert cached("off", **{"teacher.noise_seed": 1}).trainer.noise_seed in seeds


def test_whatever_features_depend_on_makes_another_cache(cached, tmp_path):
    changes = [
        {},
        {"seed": 1},
        {"teacher.input": "clean"},
        {"teacher.layers": ["down_blocks.0.resnets.0"]},
        {"teacher.precision": "bf16"},
        {"data.train_limit": 15},
        {"distillation.dense": True},
        {"cache.precision": "bf16"},
    ]
    names = set()
    for change in changes:
        env = cached("disk", **change)
        caches, trainer = env.trainer.parts.features.caches, env.trainer
        names.add(caches.identity(trainer.parts.train, trainer.noise_seed).name)
        names.add(caches.identity(trainer.parts.heldout, trainer.heldout_noise_seed).name)
    # Of the held-out images one less: they do not change with the training images' number.
    assert len(names) == 2 * len(changes) - 1


@pytest.mark.parametrize(("precision", "digits"), [("bf16", 8), ("fp16", 11)])
def test_half_the_bytes_keep_their_digits_from_the_first_look_on(precision, digits, cached):
    exact, rounded = cached("off"), cached("memory", **{"cache.precision": precision})
    bank, ids = exact.trainer.parts.train, torch.arange(16)
    at = torch.full((16, 1), 400)
    looks = []
    for env in (exact, rounded, rounded):
        features = env.trainer.parts.features
        caches, features._statistics = features._statistics, []  # as the teacher gives them
        looks.append(next(features.each(bank, ids, at, torch.zeros_like(ids), 3))[0])
        features._statistics = caches
    error = (looks[1] - looks[0]).abs()
    # Half a unit of the last digit; below 2**-14 those of fp16 are no finer than 2**-24.
    assert error.any() and (error <= (looks[0].abs() * 2.0**-digits).clamp_min(2.0**-25)).all()
    assert torch.equal(looks[1], looks[2])


def test_features_too_large_for_fp16_are_refused(cached, monkeypatch):
    env = cached("memory", **{"cache.precision": "fp16"})
    honest = NetworkTeacher.features
    monkeypatch.setattr(
        NetworkTeacher,
        "features",
        lambda *given: {layer: z * 1e6 for layer, z in honest(*given).items()},
    )
    with pytest.raises(ValueError, match=r"cache\.precision: fp16 cannot hold features as large"):
        _go(env, 1)


def test_features_that_are_not_finite_are_not_kept(cached, monkeypatch):
    env = cached("disk")
    honest = NetworkTeacher.features
    with monkeypatch.context() as patch:
        patch.setattr(
            NetworkTeacher,
            "features",
            lambda *given: {layer: z * float("nan") for layer, z in honest(*given).items()},
        )
        _go(env, 1)
    assert env.trainer.drain_metrics()["student/nonfinite_steps"] == 1
    caches, trainer = env.trainer.parts.features.caches, env.trainer
    disk = caches.of(trainer.parts.train, trainer.noise_seed).disk
    assert sum(len(part.images) for file in disk.files() for part in disk.scan(*file)) == 0


def test_a_table_too_small_for_all_keeps_the_newest(cached):
    whole, small = cached("memory"), cached("memory", **{"cache.memory_gib": 6_000 / 2**30})
    memory = None
    for env in (whole, small):
        _go(env, 12)
        caches, trainer = env.trainer.parts.features.caches, env.trainer
        memory = caches.of(trainer.parts.train, trainer.noise_seed).memory
    assert memory is not None and 0 < memory.slots < 16 and not memory.complete
    assert memory._values.nbytes + memory._images.nbytes <= 6_000 + 32 * 4 + 8  # and the NaN row
    assert _student(whole) == _student(small)


def test_auto_takes_memory_where_all_fits_and_else_the_disk(cached, tmp_path):
    for gib, wanted in ((1.0, (True, False)), (1e-6, (False, True))):
        trainer = cached("auto", **{"cache.memory_gib": gib}).trainer
        cache = trainer.parts.features.caches.of(trainer.parts.train, trainer.noise_seed)
        assert (cache.memory is not None, cache.disk is not None) == wanted


def test_a_full_disk_does_not_end_the_run(cached):
    # Room for the files of two of three timesteps, after another run has made the folder.
    env = cached("disk", **{"timesteps.values": [0, 400]})
    _go(env, 4)
    trainer = env.trainer
    disk = trainer.parts.features.caches.of(trainer.parts.train, trainer.noise_seed).disk
    room = 2 * disk.slots * (disk.identity.feature_bytes + 16)
    with pytest.warns(CacheWarning, match="is full"):
        env = cached("disk", **{"cache.disk_gib": room / 2**30})
        _go(env, 8)
    assert env.trainer.steps == 8


def test_room_is_shared_out_among_all_that_a_run_on_clean_images_asks_for(cached):
    """Statistics and observations open the folder first, and ask for fewer timesteps."""
    clean = {"teacher.input": "clean", "teacher.noise": "fresh", "augmentation.flip": True}
    record = 4 * cached("off", **clean).trainer.parts.features.widths[0] + 16
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        # Of three timesteps and the agent's own, mirrored or not, eight images each.
        env = cached("disk", **clean, **{"cache.disk_gib": 4 * 2 * 8 * record / 2**30})
        _go(env, 12)
    trainer = env.trainer
    disk = trainer.parts.features.caches.of(trainer.parts.train, trainer.noise_seed).disk
    assert disk.slots == 8 and {mirrored for _, mirrored in disk.files()} == {False, True}


def test_reports_count_what_went_through_the_teacher(cached, monkeypatch):
    env = cached("memory")
    seen: list[int] = []
    honest = NetworkTeacher.features

    def counted(self: NetworkTeacher, images: torch.Tensor, timesteps: torch.Tensor) -> Any:
        seen.append(len(images))
        return honest(self, images, timesteps)

    with monkeypatch.context() as patch:
        patch.setattr(NetworkTeacher, "features", counted)
        _go(env, 20)  # 4 lanes, of which a smaller forward is filled up to 4
    assert env.trainer.parts.features.caches.summary()["asked"] == 80
    computed = teacher_evaluations(env, 1, 80)["training"]
    assert computed == len(set(_decided(env, 20))) <= sum(seen) < 80
    assert env.trainer.drain_metrics()["cache/hit_rate"] == pytest.approx(1 - computed / 80)


def _decided(env: RepFusionVectorEnv, steps: int) -> list[tuple[int, int]]:
    """(image, timestep) of the same decisions, made again with nothing kept."""
    again = RepFusionVectorEnv(config=merge(asdict(env.config), {"cache.store": "off"}))
    again.reset(seed=0)
    pairs: list[tuple[int, int]] = []
    for step in range(steps):
        again.action_space.seed(step)
        image = again._ids
        info = again.step(again.action_space.sample())[4]
        pairs += zip(image.tolist(), info["timestep"].tolist(), strict=True)
    return pairs


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"cache": "disk"}, "under teacher.noise fresh no feature comes twice"),
        ({"cache": "disk", "augmentation.jitter": 0.2, **FIXED}, "augmentation.jitter: 0.2 given"),
        ({"cache": "disk", "cache.folder": "", **FIXED}, "it must name a folder"),
        ({"teacher.noise_seed": 3}, "teacher.noise_seed: 3 given, but under teacher.noise fresh"),
    ],
)
def test_what_a_cache_cannot_do_is_refused_before_anything_loads(keys, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check(keys)


def test_flips_clean_input_and_fixed_noise_may_be_cached():
    for keys in (FIXED, {"teacher.input": "clean"}):
        load_config("digits", {"cache": "disk", "augmentation.flip": True, **keys})
