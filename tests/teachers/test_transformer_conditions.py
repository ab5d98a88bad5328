"""What DiT, PixArt, SD3 and Flux are told beside the timestep, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_parts import clip_encoder, clip_tokenizer, save_index, t5_encoder, t5_tokenizer
from torch import Tensor

from repfusion_env.config import ExperimentConfig, TeacherConfig
from repfusion_env.config_loading import ConfigError
from repfusion_env.teachers import TeacherError, check_fit, describe_teacher, load_teacher
from repfusion_env.teachers.reading.network import NetworkTeacher

PROMPTED = ("pixart", "sd3", "flux")


def teacher_of(folder: Path, *layers: str, **options: Any) -> NetworkTeacher:
    teacher = load_teacher(TeacherConfig(model=str(folder), layers=layers, **options), device="cpu")
    assert isinstance(teacher, NetworkTeacher)
    return teacher


def read(teacher: NetworkTeacher, side: int = 8) -> Tensor:
    latents = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(3))
    (feature,) = teacher.features(latents, torch.tensor([0, 250, 999])).values()
    return feature


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherConfig(model=str(folder), **options), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def copied(transformer_folder, tmp_path):
    def copy(case: str, *, without: str = "-") -> Path:
        folder = tmp_path / case
        shutil.copytree(transformer_folder(case), folder, ignore=shutil.ignore_patterns(without))
        return folder

    return copy


def test_no_label_reaches_a_dit(transformer_folder):
    teacher = teacher_of(transformer_folder("dit"), "transformer_blocks.2")
    before = read(teacher)
    tables = [
        module.embedding_table.weight
        for name, module in teacher.network.named_modules()
        if name.endswith("class_embedder")
    ]
    assert [tuple(table.shape) for table in tables] == [(11, 16)] * 3
    for table in tables:
        table.data[:10] = torch.nan
    assert torch.equal(read(teacher), before)
    # The check can fail: the last row is the one that is read.
    for table in tables:
        table.data[10] = torch.nan
    assert read(teacher).isnan().all()


def test_tokens_that_the_mask_hides_are_never_seen(copied):
    folder = copied("pixart")
    before = read(teacher_of(folder))
    path = folder / "empty_prompt.safetensors"
    prompt = load_file(path)
    prompt["encoder_hidden_states"][:, 2:] += 1
    save_file(prompt, path)
    assert torch.equal(read(teacher_of(folder)), before)
    prompt["encoder_hidden_states"][:, 1] += 1
    save_file(prompt, path)
    assert not torch.equal(read(teacher_of(folder)), before)


def test_the_guidance_of_a_distilled_network_is_an_option(transformer_folder):
    guided, plain = transformer_folder("flux_guided"), transformer_folder("flux")
    default = read(teacher_of(guided))
    assert torch.equal(read(teacher_of(guided, options={"guidance": 3.5})), default)
    told = teacher_of(guided, options={"guidance": 1})
    assert not torch.equal(read(told), default)
    assert told.fingerprint != teacher_of(guided).fingerprint
    assert torch.equal(read(teacher_of(plain, options={"guidance": 1})), read(teacher_of(plain)))


@pytest.mark.parametrize("case", PROMPTED)
def test_the_prompt_goes_where_the_teacher_goes_and_in_its_precision(transformer_folder, case):
    folder = transformer_folder(case)
    exact = read(teacher_of(folder))
    teacher = teacher_of(folder, precision="bf16")
    dtypes = {
        name: value.dtype
        for name, value in teacher.plan.run.prompt.items()  # type: ignore[attr-defined]
    }
    assert dtypes.pop("encoder_attention_mask", torch.int64) == torch.int64
    assert set(dtypes.values()) == {torch.bfloat16}
    error = float((read(teacher) - exact).abs().max() / exact.std())
    assert 1e-6 < error < 0.3
    teacher.to("meta")
    held = teacher.plan.run.prompt.values()  # type: ignore[attr-defined]
    assert {value.device.type for value in held} == {"meta"}
    weights_and_features = [*teacher.network.parameters(), read_on_meta(teacher)]
    assert {value.device.type for value in weights_and_features} == {"meta"}


def read_on_meta(teacher: NetworkTeacher) -> Tensor:
    latents = torch.empty(3, 4, 8, 8, device="meta")
    (feature,) = teacher.features(
        latents, torch.empty(3, dtype=torch.int64, device="meta")
    ).values()
    return feature


@pytest.mark.parametrize("case", ["dit", *PROMPTED])
def test_pieces_and_offload_change_nothing(transformer_folder, case):
    folder = transformer_folder(case)
    whole = read(teacher_of(folder))
    torch.testing.assert_close(read(teacher_of(folder, batch_size=2)), whole)
    offloaded = teacher_of(folder, offload="cpu")
    assert torch.equal(read(offloaded), whole)


def test_the_fingerprint_knows_the_prompt_and_the_vae(copied):
    folder = copied("sd3")
    first = teacher_of(folder).fingerprint
    assert teacher_of(folder).fingerprint == first
    path = folder / "empty_prompt.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    second = teacher_of(folder).fingerprint
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae = load_file(path)
    vae["encoder.conv_in.bias"] += 1
    save_file(vae, path)
    assert len({first, second, teacher_of(folder).fingerprint}) == 3


@pytest.mark.parametrize(
    ("case", "pipeline"), [("sd3", "StableDiffusion3Pipeline"), ("flux", "FluxPipeline")]
)
def test_the_models_own_text_encoders_are_told_nothing(copied, tmp_path, case, pipeline):
    import diffusers

    folder = copied(case, without="empty_prompt*")
    clip = clip_tokenizer(tmp_path / "words")
    if case == "sd3":
        parts = {
            "tokenizer": clip,
            "text_encoder": clip_encoder(8, projection=4),
            "tokenizer_2": clip,
            "text_encoder_2": clip_encoder(8, projection=8, seed=1),
            "tokenizer_3": t5_tokenizer(),
            "text_encoder_3": t5_encoder(20),
        }
    else:
        parts = {
            "tokenizer": clip,
            "text_encoder": clip_encoder(12),
            "tokenizer_2": t5_tokenizer(),
            "text_encoder_2": t5_encoder(20),
        }
    save_index(folder, pipeline, parts)
    ours = read(teacher_of(folder))
    whole = getattr(diffusers, pipeline)(transformer=None, vae=None, scheduler=None, **parts)
    prompts = {"sd3": ("", None, None), "flux": ("", None)}[case]
    with torch.no_grad():
        embeddings = whole.encode_prompt(*prompts, device="cpu")
    names = {"sd3": (0, 2), "flux": (0, 1)}[case]
    saved = {
        name: embeddings[place].detach().clone()
        for name, place in zip(("encoder_hidden_states", "pooled_projections"), names, strict=True)
    }
    save_file(saved, folder / "empty_prompt.safetensors")
    # Rounding apart: where a weight lies in memory decides in which order a CPU adds.
    torch.testing.assert_close(read(teacher_of(folder)), ours, rtol=1e-4, atol=1e-5)


def test_a_vae_of_other_latents(copied):
    folder = copied("sd3")
    edit(folder / "vae" / "config.json", latent_channels=16)
    message = "its VAE gives latents of 16 channels, but its transformer takes 4"
    assert message in refusal(folder)
    with pytest.raises(TeacherError, match=message):
        describe_teacher(TeacherConfig(model=str(folder)))


def test_a_folder_without_a_vae(copied):
    folder = copied("flux")
    shutil.rmtree(folder / "vae")
    assert "has no VAE: its denoiser works on latents" in refusal(folder)


def test_a_prompt_of_another_model(copied):
    folder = copied("sd3")
    path = folder / "empty_prompt.safetensors"
    prompt = load_file(path)
    save_file({**prompt, "pooled_projections": torch.zeros(1, 7)}, path)
    assert "gives pooled_projections as 1x7, but its transformer takes 1x12" in refusal(folder)
    save_file({"encoder_hidden_states": torch.zeros(1, 5, 21)}, path)
    assert "encoder_hidden_states as 1x5x21, but its transformer takes 1xTx20" in refusal(folder)
    save_file({"encoder_hidden_states": torch.zeros(1, 5, 20)}, path)
    assert "its empty prompt has no pooled_projections, which its transformer" in refusal(folder)


@pytest.mark.parametrize(
    ("case", "layer", "hint"),
    [
        ("sd3", "transformer_blocks.0.ff_context", "transformer_blocks.0.ff_context.net"),
        ("flux", "transformer_block.0", "did you mean"),
        ("flux", "time_text_embed.timestep_embedder", "has no layer"),
        ("pixart", "transformer_blocks.9", "did you mean 'transformer_blocks."),
    ],
)
def test_a_layer_that_is_no_map_of_the_image(transformer_folder, case, layer, hint):
    message = refusal(transformer_folder(case), layers=(layer,))
    assert f"the teacher has no layer '{layer}' with an output (N, F, h, w)" in message
    # The text's own layers are not offered either.
    assert (hint in message) == ("context" not in hint)


def test_incomplete_weights(copied):
    folder = copied("dit")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["transformer_blocks.2.ff.net.2.bias"]
    save_file(weights, path)
    # Behind the layer that is read, and refused all the same.
    assert "lacks weights transformer_blocks.2.ff.net.2.bias" in refusal(folder)


def test_options_of_another_family(transformer_folder):
    assert "family 'sd3' has no 'guidance'" in refusal(
        transformer_folder("sd3"), options={"guidance": 1.0}
    )
    assert "teacher.options.guidance: 'strong' given; it must be a number" in refusal(
        transformer_folder("flux"), options={"guidance": "strong"}
    )
    assert "family 'dit' takes a DiTTransformer2DModel or Transformer2DModel" in refusal(
        transformer_folder("sd3"), family="dit"
    )


def test_configurations_that_make_no_sense(copied):
    folder = copied("flux")
    edit(folder / "transformer" / "config.json", in_channels=18)
    assert "in_channels 18 and patch_size 1; family 'flux' packs 2x2 latents" in refusal(folder)
    folder = copied("dit")
    edit(folder / "transformer" / "config.json", norm_type="ada_norm_single")
    assert "norm_type 'ada_norm_single'; family 'dit' takes" in refusal(folder, family="dit")
    edit(folder / "transformer" / "config.json", norm_type="ada_norm_zero", sample_size=9)
    assert "latents of side 9, which patches of 2 do not divide" in refusal(folder)
    edit(folder / "transformer" / "config.json", sample_size=8, num_layers=0)
    assert "num_layers 0; a positive whole number is needed" in refusal(folder)


def test_images_that_do_not_fit(transformer_folder):
    folder = transformer_folder("sd3")
    config = ExperimentConfig(teacher=TeacherConfig(model=str(folder)))
    card = describe_teacher(config.teacher)
    check_fit(card, config, (1, 16, 16))
    with pytest.raises(ConfigError) as caught:
        check_fit(card, config, (3, 18, 18))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "teacher.model",
        "data.image_size",
    ]
    with pytest.raises(TeacherError, match="positions up to latents of 24x24, and these are 26x26"):
        read(teacher_of(folder), side=26)
