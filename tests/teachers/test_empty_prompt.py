"""The empty prompt: equal to what the text encoders give themselves, whole or refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_parts import clip_encoder, clip_tokenizer, save_index, t5_encoder, t5_tokenizer

from repfusion_env.teachers import TeacherError
from repfusion_env.teachers.empty_prompt import FILE, empty_prompt, main
from repfusion_env.teachers.files.model_files import find_model

START, END = 0, 1  # of CLIP, which pads with the end
CLIP_IDS = torch.tensor([[START] + [END] * 7])


def t5_ids(length: int) -> torch.Tensor:
    return torch.tensor([[1] + [0] * (length - 1)])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "tokenizer": clip_tokenizer(tmp_path_factory.mktemp("words")),
        "clip": clip_encoder(16),
        "clip_small": clip_encoder(16, projection=10),
        "clip_large": clip_encoder(24, projection=12, seed=1),
        "t5_tokenizer": t5_tokenizer(),
        "t5": t5_encoder(20),
        "t5_wide": t5_encoder(64, seed=1),
    }


@pytest.fixture
def save(parts: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, *encoders: str, **settings: Any) -> Path:
        chosen: dict[str, Any] = {}
        for number, encoder in enumerate(encoders):
            end = f"_{number + 1}" if number else ""
            words = "t5_tokenizer" if encoder.startswith("t5") else "tokenizer"
            chosen[f"tokenizer{end}"] = parts[words] if encoder else None
            chosen[f"text_encoder{end}"] = parts[encoder] if encoder else None
        save_index(tmp_path / name, name, chosen, **settings)
        return tmp_path / name

    return make


def prompt_of(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, Any]:
    return empty_prompt(find_model(str(folder), None), settings, dtype)


def same(given: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=1e-5, atol=1e-6)
        assert not given[name].requires_grad and not given[name].is_inference()


@torch.no_grad()
def test_each_pipelines_prompt_is_made_of_its_text_encoders_outputs(save, parts):
    last = parts["clip"](CLIP_IDS)
    same(prompt_of(save("StableDiffusionPipeline", "clip")), {"encoder_hidden_states": last[0]})

    small = parts["clip"](CLIP_IDS, output_hidden_states=True)
    large = parts["clip_large"](CLIP_IDS, output_hidden_states=True)
    sequence = torch.cat([small.hidden_states[-2], large.hidden_states[-2]], 2)
    folder = save("StableDiffusionXLPipeline", "clip", "clip_large")
    expected = {"encoder_hidden_states": sequence, "text_embeds": large.text_embeds}
    same(prompt_of(folder), expected)

    for name, length in (("PixArtAlphaPipeline", 120), ("PixArtSigmaPipeline", 300)):
        ids = t5_ids(length)
        mask = (torch.arange(length) == 0).long()[None]
        expected = {
            "encoder_hidden_states": parts["t5"](ids, attention_mask=mask)[0],
            "encoder_attention_mask": mask,
        }
        same(prompt_of(save(name, "t5")), expected)

    expected = {
        "encoder_hidden_states": parts["t5"](t5_ids(512))[0],
        "pooled_projections": last.pooler_output,
    }
    same(prompt_of(save("FluxPipeline", "clip", "t5")), expected)

    small = parts["clip_small"](CLIP_IDS, output_hidden_states=True)
    clips = torch.cat([small.hidden_states[-2], large.hidden_states[-2]], 2)
    clips = torch.nn.functional.pad(clips, (0, 64 - 40))
    pooled = torch.cat([small.text_embeds, large.text_embeds], 1)
    third = parts["t5_wide"](t5_ids(256))[0]
    expected = {
        "encoder_hidden_states": torch.cat([clips, third], 1),
        "pooled_projections": pooled,
    }
    folder = save("StableDiffusion3Pipeline", "clip_small", "clip_large", "t5_wide")
    same(prompt_of(folder), expected)

    # Saved without T5, as many are: the library puts zeros in its place.
    expected["encoder_hidden_states"] = torch.cat([clips, torch.zeros_like(third)], 1)
    folder = save("StableDiffusion3Pipeline", "clip_small", "clip_large", "")
    same(prompt_of(folder, joint_attention_dim=64), expected)


def test_half_precision_is_that_of_the_network_and_masks_stay_whole_numbers(save):
    folder = save("PixArtSigmaPipeline", "t5")
    exact, half = prompt_of(folder), prompt_of(folder, torch.float16)
    assert half["encoder_hidden_states"].dtype == torch.float16
    assert half["encoder_attention_mask"].dtype == torch.int64
    error = (half["encoder_hidden_states"].float() - exact["encoder_hidden_states"]).abs().max()
    assert 0 < error < 0.1


def test_a_half_precision_copy_serves_where_there_is_no_other(save):
    folder = save("StableDiffusionPipeline", "clip")
    exact = prompt_of(folder)["encoder_hidden_states"]
    path = folder / "text_encoder" / "model.safetensors"
    halved = {name: value.half() for name, value in load_file(path).items()}
    save_file(halved, path.with_name("model.fp16.safetensors"), metadata={"format": "pt"})
    path.unlink()
    given = prompt_of(folder)["encoder_hidden_states"]
    assert 0 < float((given - exact).abs().max()) < 0.05


def test_a_saved_prompt_needs_no_text_encoders(save, capsys, monkeypatch):
    folder = save("StableDiffusionXLPipeline", "clip", "clip_large")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}")
    expected = prompt_of(folder)
    assert main([str(folder)]) == 0
    assert f"{FILE}: encoder_hidden_states 1x8x40, text_embeds 1x12" in capsys.readouterr().out
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / part)
    monkeypatch.setitem(sys.modules, "transformers", None)
    same(prompt_of(folder), expected)
    # Written again, it would be of the encoders, which are gone.
    assert main([str(folder), "--out", str(folder / "other")]) == 2
    assert "needs transformers: pip install" in capsys.readouterr().err
    assert not (folder / "other").exists()
    (folder / FILE).write_bytes(b"x")
    assert f"{FILE} is damaged" in refusal(folder)
    save_file({"text": torch.zeros(2)}, folder / FILE)
    assert f"{FILE} has no encoder_hidden_states; it has text" in refusal(folder)
    save_file({"encoder_hidden_states": torch.full((1, 2), float("nan"))}, folder / FILE)
    assert "is not finite in encoder_hidden_states" in refusal(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(TeacherError) as caught:
        prompt_of(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_that_a_text_encoder_lacks_are_never_drawn_at_random(save):
    folder = save("StableDiffusionPipeline", "clip")
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight"))
    removed = weights.pop(name)
    save_file(weights, path, metadata={"format": "pt"})
    said = refusal(folder)
    assert "text_encoder/model.safetensors lacks weights " in said
    assert "layers.1.mlp.fc1.weight" in said
    save_file({**weights, name: removed[:3].clone()}, path, metadata={"format": "pt"})
    assert "transformers cannot load its text_encoder" in refusal(folder)
    save_file({**weights, name: removed * torch.nan}, path, metadata={"format": "pt"})
    assert "values that are not finite in" in refusal(folder)
    path.write_bytes(path.read_bytes()[:100])
    assert "transformers cannot load its text_encoder" in refusal(folder)


def test_missing_parts_and_unknown_classes(save):
    folder = save("StableDiffusionPipeline", "clip")
    shutil.move(folder / "tokenizer", folder / "elsewhere")
    assert "has no tokenizer: the embeddings of its empty prompt need" in refusal(folder)
    shutil.move(folder / "elsewhere", folder / "tokenizer")
    for entry in (["their_code", "CLIPTextModel"], ["transformers", "CLIPTextModle"]):
        edit(folder / "model_index.json", text_encoder=entry)
        said = refusal(folder)
        assert f"text_encoder as {'.'.join(entry)}, which is no text encoder of" in said
    assert "Did you mean 'CLIPTextModel'?" in said
    edit(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    shutil.rmtree(folder / "text_encoder")
    assert "has no text_encoder: " in refusal(folder)
    edit(folder / "model_index.json", _class_name="StableDifusionPipeline")
    assert "Did you mean 'StableDiffusionPipeline'?" in refusal(folder)
    (folder / "model_index.json").unlink()
    assert "is conditioned on text, but its folder holds neither" in refusal(folder)


def test_parts_that_do_not_fit_each_other(save):
    folder = save("FluxPipeline", "t5", "clip")
    assert "FluxPipeline cannot encode the empty prompt" in refusal(folder)


def test_random_numbers_and_the_users_logging_are_left_alone(save, capfd):
    from transformers.utils import logging

    folder = save("FluxPipeline", "clip", "t5")
    capfd.readouterr()
    state, verbosity = torch.get_rng_state(), logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    prompt_of(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert "".join(capfd.readouterr()) == ""
