from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from repfusion_env.config import TeacherConfig
from repfusion_env.config_loading import ConfigError, load_config
from repfusion_env.teachers import (
    TeacherCard,
    TeacherError,
    check_fit,
    describe_teacher,
    load_teacher,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


def refusal(folder: Path | str, **options: Any) -> str:
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherConfig(model=str(folder), **options), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_without_weights(make_model):
    folder = make_model()
    (folder / WEIGHTS).unlink()
    assert "has no weights: there is neither diffusion_pytorch_model.safetensors" in refusal(folder)


def test_a_folder_without_configuration(make_model):
    folder = make_model()
    (folder / "scheduler_config.json").unlink()
    assert "has no scheduler_config.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin"])
def test_a_pickle_is_refused_under_either_name_and_never_run(make_model, tmp_path, name):
    folder = make_model()
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert f"{name} is damaged or not what its name says" in refusal(folder)
    torch.save({"conv_in.weight": Bomb(tmp_path / "ran")}, folder / name)
    assert f"{name} is damaged or not what its name says" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_truncated_weights(make_model):
    folder = make_model()
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert "is damaged" in refusal(folder)


def change_weights(folder: Path, change: Any) -> str:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return refusal(folder)


def test_weights_that_are_not_the_networks_are_named(make_model):
    assert "lacks weights conv_out.weight" in change_weights(
        make_model(name="a"), lambda weights: weights.pop("conv_out.weight")
    )
    assert "has the unknown weights extra.weight" in change_weights(
        make_model(name="b"), lambda weights: weights.update({"extra.weight": torch.ones(2)})
    )
    assert "has a wrong shape of weights conv_out.bias" in change_weights(
        make_model(name="c"), lambda weights: weights.update({"conv_out.bias": torch.ones(7)})
    )
    assert "not finite in conv_in.bias" in change_weights(
        make_model(name="d"), lambda weights: weights["conv_in.bias"].fill_(float("nan"))
    )


def test_another_kind_of_model_or_scheduler(make_model):
    folder = make_model()
    edit(folder / "config.json", _class_name="UNet2DConditionModel")
    said = refusal(folder, family="unet2d")
    assert "is a UNet2DConditionModel; family 'unet2d' takes a UNet2DModel" in said
    edit(folder / "config.json", _class_name="UNet5DModel")
    assert "names 'UNet5DModel', which belongs to no known family" in refusal(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert "names a class of diffusers or an architecture of timm; give" in refusal(folder)
    edit(folder / "config.json", _class_name="UNet2DModel")
    edit(folder / "scheduler_config.json", _class_name="DDPMSchedular")
    assert "names 'DDPMSchedular', which is no scheduler" in refusal(folder)
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "IPNDMScheduler"}))
    assert "has no alphas_cumprod" in refusal(folder)


def test_configurations_that_cannot_be_built(make_model):
    folder = make_model()
    edit(folder / "config.json", down_block_types=["DownBlock2D"])
    assert "the network of its config.json cannot be built" in refusal(folder)
    edit(folder / "config.json", sample_size=None)
    assert "gives sample_size None" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(folder)
    (folder / "config.json").write_text("[1]")
    assert "config.json must hold a JSON object, not list" in refusal(folder)


def test_a_misspelt_layer_is_answered_with_the_closest(make_model):
    said = refusal(make_model(), layers=("mid_block.resnet.1.conv2",))
    assert "no layer 'mid_block.resnet.1.conv2'" in said
    assert "'mid_block.resnets.1.conv2'" in said
    assert "inside it there are 'down_blocks.0.resnets" in refusal(
        make_model(), layers=("down_blocks.0",)
    )


def test_models_that_are_nowhere(tmp_path, monkeypatch):
    assert "there is no such folder" in refusal(tmp_path / "nothing")
    assert "Did you mean 'digits'?" in refusal("digit")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file")
    said = refusal(tmp_path / "file", family="unet2d")
    assert "is a file; its teacher.family takes a folder with a scheduler_config.json" in said


def test_a_hub_id_that_cannot_be_reached_says_that_a_folder_works(tmp_path, monkeypatch):
    from huggingface_hub import constants

    # Offline mode is the hub's own switch: the client fails as without a network, but at once.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refusal("nobody/no-such-ddpm")
    assert "'nobody/no-such-ddpm': there is no such folder here" in said
    assert "without a network give teacher.model a local folder" in said


RANGE = "the teacher's scheduler has the timesteps 0..999"
CARD = TeacherCard(
    channels=1,
    image_size=16,
    num_timesteps=1000,
    layers_available=("mid_block.resnets.1.conv2", "mid_block.resnets.0.conv1"),
    side_divisor=4,
    default_layers=("mid_block.resnets.1.conv2",),
)


def problems(
    card: TeacherCard, overrides: dict[str, Any], shape: tuple[int, int, int]
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_fit(card, load_config({}, overrides), shape)
    return caught.value.problems


def test_a_fitting_experiment_passes():
    check_fit(CARD, load_config({}), (1, 16, 16))
    check_fit(CARD, load_config({}), (1, 32, 24))


def test_timesteps_outside_the_scheduler_name_the_first_and_the_range():
    said = problems(CARD, {"timesteps": [5, 1000, 2000], "observation.timestep": 4000}, (1, 16, 16))
    assert said == [
        f"timesteps.values: the grid holds 1000, but {RANGE}",
        f"observation.timestep: 4000 given; {RANGE}",
    ]
    said = problems(CARD, {"timesteps.last": 1500, "timesteps.count": 3}, (1, 16, 16))
    assert said[0].startswith("timesteps.last: the grid holds 1500")


def test_a_teacher_of_one_size_says_how_it_is_shown_others():
    card = dataclasses.replace(CARD, fixed_size=True)
    check_fit(card, load_config({}), (1, 16, 16))
    check_fit(card, load_config({}, {"teacher.image_size": 16}), (1, 28, 28))
    said = problems(card, {}, (1, 28, 28))
    assert said == [
        "data.image_size: the images are 28x28, but the teacher takes 16x16 alone; "
        "teacher.image_size 16 shows them to it so"
    ]
    said = problems(CARD, {"teacher.image_size": 30}, (1, 16, 16))
    assert said[0].startswith("teacher.image_size: the teacher is shown 30x30")


def test_an_observation_that_is_not_the_teachers_needs_no_timestep():
    overrides = {"observation.source": "pixels", "observation.timestep": 4000}
    check_fit(CARD, load_config({}, overrides), (1, 16, 16))


def test_everything_that_does_not_fit_is_said_at_once():
    overrides = {
        "timesteps": [1000],
        "teacher.layers": ["mid_block.resnets.1.conv3"],
    }
    said = "\n".join(problems(CARD, overrides, (3, 30, 30)))
    for part in (
        "the grid holds 1000",
        "teacher.layers: the teacher has no layer 'mid_block.resnets.1.conv3'",
        "did you mean 'mid_block.resnets.1.conv2'",
        "teacher.model: the images have 3 channels, the teacher takes 1; data.channels 1 converts",
        "data.image_size: the images are 30x30",
        "a multiple of 4",
    ):
        assert part in said
    assert isinstance(ConfigError([]), ValueError)


def test_the_divisor_is_where_the_network_itself_fails(make_model):
    folder = make_model()
    divisor = describe_teacher(TeacherConfig(model=str(folder))).side_divisor
    unet = UNet2DModel.from_pretrained(folder).eval()
    with torch.no_grad():
        unet(torch.zeros(1, 3, 2 * divisor, 3 * divisor), 1)
        with pytest.raises(RuntimeError):
            unet(torch.zeros(1, 3, 2 * divisor + 2, 2 * divisor + 2), 1)


def test_an_unknown_family_is_answered_with_the_closest():
    with pytest.raises(ValueError, match=re.escape("unknown teacher family 'unet'")):
        load_teacher(TeacherConfig(family="unet"), device="cpu")
    with pytest.raises(TypeError, match="must return a Teacher"):
        load_teacher(TeacherConfig(family=f"{__name__}:no_teacher"), device="cpu")


def no_teacher(config: TeacherConfig, *, device: Any) -> int:
    return 3
