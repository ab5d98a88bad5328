"""Training on streamed images, against training on the same images held on the device."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from agents.controls import ControlTrainer
from repfusion_env import load_config, observations
from repfusion_env.config_loading import merge
from repfusion_env.data.streamed import StreamedImages
from repfusion_env.data.streaming_sources import FileSource
from repfusion_env.data.unreadable import unreadable_images
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.trainer import DistillationTrainer


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 + 12 handwritten digits of three classes, 16x16, as PNG files."""
    from repfusion_env.config import DataConfig
    from repfusion_env.data import load_data

    root = tmp_path_factory.mktemp("digit-files")
    for bank, part, count in zip(load_data(DataConfig()), ("train", "test"), (24, 12), strict=True):
        rows = [row for row in range(len(bank)) if bank.labels[row] < 3][:count]
        for row in rows:
            path = root / part / str(int(bank.labels[row])) / f"{row:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(bank.images[row, 0].numpy()).save(path)
    return root


@pytest.fixture
def environment(tiny: dict[str, Any], digit_files: Path):
    def made(storage: str, **overrides: Any) -> RepFusionVectorEnv:
        config = {
            key: value for key, value in tiny.items() if key != "data"
        } | {
            "data": {"name": "folder", "path": str(digit_files), "storage": storage},
            "observation.source": "student",
            "teacher.standardize_images": 8,
            "timesteps.count": 3,
        }  # fmt: skip
        return RepFusionVectorEnv(config=merge(config, overrides))

    return made


def run(env: RepFusionVectorEnv, steps: int, seed: int) -> list[torch.Tensor]:
    """Observations and rewards of random actions that depend on (seed, step) alone."""
    seen = []
    for step in range(steps):
        actions = np.random.default_rng((seed, step)).integers(3, size=env.num_envs)
        observations, reward, *_, info = env.step(torch.from_numpy(actions))
        seen += [observations, reward, info["image_id"]]
    return seen


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


SETTINGS: dict[str, dict[str, Any]] = {
    "a batch of lanes": {"env.num_envs": 8},
    "filled up with earlier ones": {"env.num_envs": 3, "observation.source": "pixels"},
    "groups": {"env.num_envs": 8, "env.group_size": 4, "optimizer.batch_size": 2},
    "augmented and filled up": {"augmentation.flip": True, "env.num_envs": 4},
    "sequences": {"env.episode_length": 3, "observation.student_state": True},
    "clusters": {"data.labels": "clusters", "data.clusters": 4, "env.num_envs": 8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_streamed_training_is_resident_training_to_the_last_bit(environment, learned, name):
    found = []
    for storage in ("stream", "resident"):
        env = environment(storage, **SETTINGS[name])
        env.reset(seed=3)
        seen = run(env, 10, 0)  # more than an epoch
        found.append((seen, learned(env.trainer), env.drain_metrics()))
    assert same(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])
    assert 0.0 <= found[0][2].pop("charts/data_wait") <= 1.0
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("name", ["a batch of lanes", "filled up with earlier ones", "groups"])
def test_a_run_stopped_in_mid_epoch_goes_on_as_if_it_had_not_been(environment, learned, name):
    whole = environment("stream", **SETTINGS[name])
    whole.reset(seed=1)
    run(whole, 4, 0)
    state = _through_a_file(whole.state_dict())
    rest = run(whole, 9, 1)
    resumed = environment("stream", **SETTINGS[name])
    resumed.load_state_dict(state)
    assert same(run(resumed, 9, 1), rest)
    assert same(learned(resumed.trainer), learned(whole.trainer))


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def test_images_that_fill_up_a_batch_are_kept_and_not_decoded_again(environment, monkeypatch):
    env = environment("stream", **SETTINGS["filled up with earlier ones"])
    env.reset(seed=0)
    run(env, 1, 0)
    monkeypatch.setattr(StreamedImages, "_looked_up", None)  # not called
    run(env, 5, 0)
    assert env.steps == 6


def test_some_lanes_may_be_reset(environment):
    found = []
    for storage in ("stream", "resident"):
        env = environment(storage, **{"observation.source": "pixels"})
        env.reset(seed=0)
        first = run(env, 2, 0)
        mask = np.array([True, False, True, False])
        shown, info = env.reset(options={"reset_mask": mask})
        found.append([*first, shown, info["image_id"], *run(env, 2, 1)])
    assert same(*found)


def test_embeddings_of_a_streamed_bank_are_those_of_the_resident_table(environment):
    """All 24 images are in the sample, so that mean and deviation are the same."""
    found = []
    for storage in ("stream", "resident"):
        env = environment(storage, **{"observation.source": "teacher"})
        shown, _ = env.reset(seed=0)
        found.append([shown, *run(env, 5, 0)[::3]])
        held, _ = env.heldout_view(4).reset()
        found[-1].append(held)
    for mine, resident in zip(*found, strict=True):
        torch.testing.assert_close(mine, resident, rtol=1e-4, atol=1e-5)


def test_a_streamed_bank_is_sampled_and_not_read_from_end_to_end(environment, monkeypatch):
    monkeypatch.setattr(observations, "SAMPLE", 12)
    met: set[int] = set()
    read = FileSource.read

    def noted(self: FileSource, index: int) -> np.ndarray:
        met.add(index)
        return read(self, index)

    monkeypatch.setattr(FileSource, "read", noted)
    few = {"observation.source": "teacher", "teacher.standardize_images": 4}
    env = environment("stream", **few)
    assert 12 <= len(met) <= 16
    monkeypatch.undo()
    sample = torch.tensor(sorted(met))
    # Of the sample, and at most four more, mean and deviation are about 0 and 1.
    shown = env.observer(env.bank, sample)
    assert shown.mean(0).abs().max() < 1.0 and 0.5 < float(shown.std(0).median()) < 1.5
    monkeypatch.setattr(observations, "SAMPLE", 12)
    assert torch.equal(environment("stream", **few).observer(env.bank, sample), shown)


def test_a_step_takes_no_look_at_a_streamed_id(environment, monkeypatch, no_waiting):
    """What trainer and observation ask for was announced."""
    env = environment("stream", **{"env.num_envs": 8, "observation.source": "pixels"})
    env.reset(seed=0)
    run(env, 2, 0)
    trainer: DistillationTrainer = env.trainer
    ids, visits = env._ids, torch.arange(8)
    choice = env.actions.choice(torch.zeros(8, dtype=torch.int64))
    monkeypatch.setattr(trainer.updates, "watch", lambda _: None)
    with no_waiting():
        env.observer(env.bank, ids)
        trainer.step(ids, choice, visits)
    assert trainer.steps == 3


def test_unreadable_files_met_in_training_are_in_the_summarys_list(environment, digit_files):
    path = next((digit_files / "train" / "1").iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            env = environment("stream", **{"data.skip_unreadable": 0.03})
            env.reset(seed=0)
            seen = run(env, 9, 0)
    finally:
        path.write_bytes(whole)
    assert all(torch.isfinite(values).all() for values in seen)
    listed = unreadable_images(env.trainer.parts.train, env.trainer.parts.heldout)
    assert len(listed["unreadable_images"]) == 1 and path.name in listed["unreadable_images"][0]


def test_two_environments_on_one_streamed_bank_get_each_their_images(environment):
    env = environment("stream", **{"observation.source": "pixels"})
    other = RepFusionVectorEnv(4, train_student=False, split="train", trainer=env.trainer)
    resident = build_frozen_parts(environment("resident").config).train
    env.reset(seed=0)
    other.reset(seed=1)
    for step in range(6):
        for each in (env, other):
            shown, *_ = each.step(torch.full((4,), step % 3))
            assert torch.equal(shown, resident.pixels(each._ids))


@pytest.mark.parametrize(("lanes", "labels"), [(8, "100%"), (3, "18")])
def test_a_streamed_control_learns_what_a_resident_one_does(tiny, digit_files, lanes, labels):
    found = []
    for storage in ("stream", "resident"):
        data = {"name": "folder", "path": str(digit_files), "storage": storage}
        config = load_config("digits", {**tiny, "data": data, "env.num_envs": lanes})
        control = ControlTrainer(config, "supervised", labels=labels)
        for _ in range(9):
            control.step()
        found.append(list(control.student.state_dict().values()))
    assert same(*found)


def test_a_command_that_meets_an_unreadable_file_says_how_to_go_on(
    tiny_teacher, digit_files, tmp_path, monkeypatch, capsys
):
    from agents.train_reinforce import main

    read, runs = FileSource.read, tmp_path / "runs"

    def broken(self: FileSource, index: int) -> np.ndarray:
        if any(runs.glob("*/config.yaml")):
            raise ValueError(f"data.path: {self.named(index)} is truncated or damaged")
        return read(self, index)

    monkeypatch.setattr(FileSource, "read", broken)
    given = {
        "device": "cpu",
        "data.name": "folder",
        "data.path": digit_files,
        "data.storage": "stream",
        "teacher.model": tiny_teacher,
        "teacher.standardize_images": 8,
        "observation.source": "student",
        "timesteps.count": 2,
        "env.num_envs": 4,
        "optimizer.batch_size": 4,
        "run.decisions": 40,
        "run.folder": runs,
    }
    options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert main(options) == 1
    said = capsys.readouterr().err
    assert "is truncated or damaged; data.skip_unreadable allows for some" in said
    assert "go on with: python -m agents.train_reinforce --resume" in said
