"""Teachers as a user meets them: by the commands, and in the frame that is drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from latent_models import save_model

from agents import train_reinforce
from repfusion_env import frozen, rendering
from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import load_teacher, show

SMALL = [
    "--config=debug",
    "--device=cpu",
    "--run.decisions=32",
    "--env.num_envs=8",
    "--optimizer.batch_size=8",
    "--teacher.standardize_images=8",
    "--data.train_limit=32",
    "--timesteps.count=2",
]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert train_reinforce.main([*SMALL, *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "error: " in line]


def test_a_run_with_a_latent_teacher_ends_with_its_summary(transformer_folder, tmp_path, capsys):
    folder = str(transformer_folder("sd3"))
    words = ["--teacher.model", folder, "--run.folder", str(tmp_path), "--run.name", "latent"]
    assert train_reinforce.main([*SMALL, *words]) == 0
    assert "fixed (best)" in capsys.readouterr().out
    assert json.loads((tmp_path / "latent" / "summary.json").read_text())["decisions"] == 32


def test_missing_text_encoders_are_told_before_images_or_weights_are_read(
    tmp_path, capsys, monkeypatch
):
    folder = save_model(tmp_path / "sd")
    (folder / "text_encoder" / "config.json").unlink()
    monkeypatch.setattr(frozen, "load_data", lambda _: pytest.fail("images were read"))
    [said] = refusal(capsys, "--teacher.model", str(folder), "--data.channels", "3")
    assert "has no text_encoder: the embeddings of its empty prompt need" in said


def test_a_loader_of_ones_own_that_gives_no_teacher_is_one_sentence(capsys):
    [said] = refusal(capsys, "--teacher.family", f"{__name__}:gives_weights")
    assert "its loader must return a Teacher" in said
    [said] = refusal(capsys, "--teacher.family", f"{__name__}:takes_nothing")
    assert "it is called as load(config, device=...)" in said


def gives_weights(config: TeacherConfig, *, device: Any) -> dict[str, int]:
    return {"weight": 1}


def takes_nothing() -> None:
    return None


def test_a_frame_shows_latents_as_a_picture(transformer_folder, tiny, monkeypatch):
    drawn = []
    draw = rendering.draw_frame
    monkeypatch.setattr(rendering, "draw_frame", lambda frame: drawn.append(frame) or draw(frame))
    teacher = {**tiny["teacher"], "model": str(transformer_folder("dit"))}
    settings = {**tiny, "teacher": teacher, "env": {}}
    for given, seen in (("noised", "noised latents"), ("clean", "clean latents")):
        teacher["input"] = given
        env = gym.make("repfusion_env:RepFusion-v0", render_mode="rgb_array", **settings)
        env.reset(seed=0)
        env.step(1)
        assert env.render().shape == (480, 1120, 3)  # type: ignore[union-attr]
        env.close()
        assert (drawn[-1].seen, drawn[-1].noised.shape) == (seen, (1, 3, 8, 8))


def test_show_tells_every_layer_whole_and_what_it_costs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    folder = save_model(tmp_path / "classes", "classes")
    assert show.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    [default] = [line for line in lines if "(default)" in line]
    teacher: Any = load_teacher(TeacherConfig(model=str(folder)), device="cpu")
    used, whole = teacher.parameters_used, teacher.parameters_all
    shape = ", ".join(map(str, teacher.feature_shapes[teacher.layers[0]]))
    name, rest = default.split("  (default)")
    assert name.strip() == teacher.layers[0]
    assert rest.strip().split("  ")[-1].strip() == f"{used:,} ({used / whole:.0%})"
    assert f" {shape} " in rest
    assert show.main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: teacher ")


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_damaged_weights_are_named_with_their_part(transformer_folder, tmp_path, part):
    folder = shutil.copytree(transformer_folder("dit"), tmp_path / "copy")
    path: Path = folder / part / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f": {part}/diffusion_pytorch_model.* is damaged"):
        load_teacher(TeacherConfig(model=str(folder)), device="cpu")
