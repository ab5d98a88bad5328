from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor
from torchvision.transforms import Normalize

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import TeacherError, describe_teacher, load_teacher

# Its second block shifts windows: the mask for that is computed, not saved.
SWIN = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "img_size": 32, "window_size": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("test_resnet", {}),
    "vit": ("test_vit", {"img_size": 32, "reg_tokens": 2}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}
# Two taps by model, the default among them, and the class and register tokens before the image's.
TAPS = {
    "resnet": (("layer2.0.bn2", "layer4"), 0),
    "vit": (("patch_embed", "blocks.5"), 3),
    "swin": (("layers.0", "layers.1"), 0),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that timm wrote, of small random classifiers with 7 classes."""
    made = {}
    for name, (architecture, arguments) in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(architecture, num_classes=7, **arguments)
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    # As new, the last norm of a block is 0 and the means are none.
                    torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                    module.running_mean.uniform_(-0.1, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
        save_for_hf(model, made[name], model_args=dict(arguments), safe_serialization=True)
    return made


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of one folder, with ``config.json`` entries and weights changed."""

    def copy(name: str, weights: Any = None, **changes: Any) -> Path:
        content = json.loads((folders[name] / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**content, **changes}))
        tensors = load_file(folders[name] / "model.safetensors")
        save_file(weights(tensors) if weights else tensors, tmp_path / "model.safetensors")
        return tmp_path

    return copy


def teacher_of(folder: Path, *layers: str, **settings: Any) -> Any:
    return load_teacher(TeacherConfig(model=str(folder), layers=layers, **settings), device="cpu")


def images_of(side: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(3, channels, side, side, generator=generator) * 2 - 1
    return images, torch.tensor([0, 400, 999])


def full_forward(folder: Path, layers: tuple[str, ...], images: Tensor) -> dict[str, Tensor]:
    """The loader, transform and forward of timm itself."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    outputs: dict[str, Tensor] = {}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            # Cloned, because what follows in a ResNet adds in place.
            lambda _module, _inputs, output, layer=layer: outputs.update({layer: output.clone()})
        )
    settings = model.pretrained_cfg
    with torch.no_grad():
        model(Normalize(settings["mean"], settings["std"])(images * 0.5 + 0.5))
    return outputs


def as_map(output: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if output.ndim == 3:
        output = output[:, output.shape[1] - shape[1] * shape[2] :]
        return output.transpose(1, 2).reshape(len(output), *shape)
    return output.permute(0, 3, 1, 2) if output.shape[3] == shape[0] else output


@pytest.mark.parametrize("name", MODELS)
def test_the_cut_forward_equals_timms_own_to_the_last_bit(folders, name):
    taps, prefix = TAPS[name]
    images, timesteps = images_of()
    expected = full_forward(folders[name], taps, images)
    together = teacher_of(folders[name], *taps)
    features = together.features(images, timesteps)
    default = teacher_of(folders[name])
    assert default.layers == taps[1:]
    for layer in taps:
        shape = together.feature_shapes[layer]
        map_ = as_map(expected[layer], shape)
        assert float(map_.std()) > 0
        if layer == "blocks.5":
            assert expected[layer].shape[1] == prefix + shape[1] * shape[2]
        assert torch.equal(features[layer], map_), layer
    assert torch.equal(default.features(images, timesteps)[taps[1]], features[taps[1]])
    assert default.parameters_used < default.parameters_all


def test_a_square_image_with_as_many_channels_as_positions_keeps_its_channels_apart(folders):
    # test_resnet's first map is (32, h, w), and that of a 64-pixel image 32x32.
    images, timesteps = images_of(64)
    expected = full_forward(folders["resnet"], ("conv1",), images)["conv1"]
    feature = teacher_of(folders["resnet"], "conv1").features(images, timesteps)["conv1"]
    assert feature.shape[1:] == (32, 32, 32)
    assert torch.equal(feature, expected)


def test_noise_is_that_of_ddpm_on_pixels_and_timestep_0_is_all_but_clean(folders):
    from diffusers import DDPMScheduler

    teacher = teacher_of(folders["resnet"])
    images, timesteps = images_of()
    assert torch.equal(teacher.encode(images), images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    theirs = DDPMScheduler().add_noise(images, noise, timesteps)
    torch.testing.assert_close(teacher.add_noise(images, noise, timesteps), theirs)
    assert float(teacher.snr(torch.tensor([0]))) > 9000
    # The network itself is not told the timestep.
    first = teacher.features(images, timesteps)["layer4"]
    assert torch.equal(first, teacher.features(images, timesteps.flip(0))["layer4"])


# A batch norm keeps its statistics whole; a mask of shifted windows meets half precision.
@pytest.mark.parametrize(("name", "layer"), [("resnet", "layer4"), ("swin", "layers.0")])
def test_half_precision_stays_close(folders, name, layer):
    images, timesteps = images_of()
    exact = teacher_of(folders[name], layer).features(images, timesteps)[layer]
    half = teacher_of(folders[name], layer, precision="bf16").features(images, timesteps)[layer]
    assert 0 < float((half - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_the_head_is_no_layer_and_never_read(copied):
    def without_meaning(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v * float("nan") if k.startswith("fc.") else v for k, v in weights.items()}

    folder = copied("resnet", without_meaning)
    card = describe_teacher(TeacherConfig(model=str(folder)))
    assert "fc" not in card.layers_available
    images, timesteps = images_of()
    teacher = teacher_of(folder)
    assert teacher.features(images, timesteps)["layer4"].isfinite().all()
    assert teacher.network.fc.weight is None


def test_a_head_that_gives_maps_is_no_layer_either(tmp_path):
    pretrained = {"input_size": [3, 64, 64], "classifier": "classifier", "num_classes": 7}
    content = {"architecture": "dpn48b", "pretrained_cfg": pretrained}
    (tmp_path / "config.json").write_text(json.dumps(content))
    card = describe_teacher(TeacherConfig(model=str(tmp_path)))
    with torch.device("meta"):
        model = timm.create_model("dpn48b", num_classes=7)
    logits = model.classifier(torch.empty(1, model.num_features, 1, 1, device="meta"))
    assert logits.shape == (1, 7, 1, 1)
    assert "classifier" not in card.layers_available
    assert "features" in card.layers_available


def test_buffers_that_old_files_hold_are_made_anew(copied, folders):
    def older(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        index = "layers.0.blocks.0.attn.relative_position_index"
        return {**weights, index: torch.full((16, 16), -1)}

    images, timesteps = images_of()
    expected = teacher_of(folders["swin"]).features(images, timesteps)["layers.1"]
    assert torch.equal(
        teacher_of(copied("swin", older)).features(images, timesteps)["layers.1"], expected
    )


def test_incomplete_weights_are_refused_where_timm_would_go_on(copied):
    def refusal(change: Any) -> str:
        with pytest.raises(TeacherError) as caught:
            teacher_of(copied("resnet", change))
        return str(caught.value)

    def lacking(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in weights.items() if name != "layer3.0.bn1.weight"}

    def other_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**weights, "fc.weight": weights["fc.weight"][:3].clone()}

    assert "lacks weights layer3.0.bn1.weight" in refusal(lacking)
    assert "wrong shape of weights fc.weight" in refusal(other_head)


@pytest.mark.parametrize(
    ("changes", "settings", "sentence"),
    [
        ({"architecture": "test_resnett"}, {}, "'test_resnett', which timm does not have. Did you"),
        ({"architecture": 3}, {}, "names no architecture"),
        ({"model_args": {"in_chans": 1}}, {}, "gives 3 values of mean for images of 1 channel"),
        ({"model_args": {"leyers": 3}}, {}, "cannot be built"),
        ({"architecture": "hiera_tiny_224"}, {}, "orders its tokens by windows"),
        ({}, {"layers": ("layer5",)}, "no layer 'layer5' with an output (N, F, h, w); did you"),
        ({}, {"layers": ("fc",)}, "has no layer 'fc'"),
        ({}, {"options": {"part": "head"}}, "family 'timm' has no 'part'"),
    ],
)
def test_wrong_folders_and_settings_end_in_one_sentence(copied, changes, settings, sentence):
    folder = copied("resnet", **changes)
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherConfig(model=str(folder), **settings), device="cpu")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_is_one_of_timms_pretrained_models(monkeypatch):
    asked = []

    def find(model: str, revision: str | None) -> Any:
        asked.append(model)
        raise TeacherError("no network")

    monkeypatch.setattr("repfusion_env.teachers.timm.find_model", find)
    with pytest.raises(TeacherError, match="no network"):
        describe_teacher(TeacherConfig(family="timm", model="resnet18.a1_in1k"))
    assert asked == ["timm/resnet18.a1_in1k"]
    with pytest.raises(TeacherError, match="Did you mean 'resnet18'"):
        describe_teacher(TeacherConfig(family="timm", model="resnett18"))


def test_an_environment_steps_with_a_classifier_of_grey_images(tiny, tmp_path):
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("test_resnet", in_chans=1)
    save_for_hf(model, tmp_path, model_args={"in_chans": 1}, safe_serialization=True)
    content = json.loads((tmp_path / "config.json").read_text())
    content["pretrained_cfg"] |= {"mean": [0.5], "std": [0.25]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    settings = {**tiny, "teacher": {"model": str(tmp_path), "standardize_images": 16}}
    settings["env"] = {"action": "layer"}
    settings["timesteps"] = {"values": [0]}
    settings["teacher"]["layers"] = ["layer2", "layer4"]
    env = gym.make_vec("repfusion_env:RepFusion-v0", num_envs=4, config="debug", **settings)
    env.reset(seed=0)
    _, rewards, *_ = env.step([0, 1, 0, 1])
    assert rewards.isfinite().all()
    env.close()
