"""The core that all families share, on a UNet2DModel and on small networks of its own."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import TeacherError, describe_teacher, load_teacher
from repfusion_env.teachers.base import TeacherCard
from repfusion_env.teachers.detect import family_of
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.reading.network import NetworkTeacher, Plan, load_network
from repfusion_env.teachers.reading.noise_process import noise_levels
from repfusion_env.teachers.reading.tracing import plain_map, trace

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "mid_block.resnets.1.conv2"


def teacher_of(folder: Path, *layers: str, **settings: Any) -> Any:
    config = TeacherConfig(model=str(folder), layers=layers or (LAYER,), **settings)
    return load_teacher(config, device="cpu")


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(TeacherError) as caught:
        teacher_of(folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    images = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return images, torch.tensor([0, 3, 250, 998, 999])


def features(teacher: Any, layer: str = LAYER) -> Tensor:
    return teacher.features(*batch())[layer]


@pytest.mark.parametrize("layer", ["down_blocks.1.attentions.0", "up_blocks.0.resnets.1"])
def test_exactly_those_weights_are_read_that_the_tap_depends_on(make_model, layer):
    folder = make_model()
    read = {name for name, _ in teacher_of(folder, layer).network.named_parameters()}
    unet = UNet2DModel.from_pretrained(folder).eval()
    found: list[Tensor] = []
    unet.get_submodule(layer).register_forward_hook(lambda *given: found.append(given[2]))
    images, timesteps = (values[1:2] for values in batch())
    with torch.no_grad():
        unet(images, timesteps)
        intact, depends = found.pop(), set()
        # By brute force: whatever changes the tap when it is NaN.
        for name, parameter in unet.named_parameters():
            kept, parameter.data = parameter.data, torch.full_like(parameter, torch.nan)
            unet(images, timesteps)
            if not torch.equal(found.pop(), intact):
                depends.add(name)
            parameter.data = kept
    assert read == depends
    assert len(depends) < len(list(unet.parameters()))


def test_a_weight_that_is_read_by_a_property_is_needed():
    class Properties(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned, self.plain = nn.Parameter(torch.ones(3, 8)), nn.Parameter(torch.ones(8))
            self.looked_at = nn.Parameter(torch.ones(8))
            self.tap = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            assert self.looked_at.shape == (8,)
            assert self.looked_at.device == images.device
            return self.tap(self.turned.T @ images.flatten(2) + self.plain.data[:, None])

    with torch.device("meta"):
        network, images = Properties(), torch.empty(1, 3, 4, 4)
    to_map = lambda output, _shape: output.unflatten(2, (4, 4))  # noqa: E731
    found = trace(network, lambda net: net(images), to_map, (3, 4, 4))
    assert found.needed(["tap"]) == {"turned", "plain"}


def test_weights_in_shards_equal_those_in_one_file(make_model):
    folder = make_model()
    unet = UNet2DModel.from_pretrained(folder)
    expected = features(teacher_of(folder))
    (folder / WEIGHTS).unlink()
    unet.save_pretrained(folder, max_shard_size="20KB")
    index = folder / f"{WEIGHTS}.index.json"
    shards = sorted(folder.glob("*-of-*.safetensors"))
    assert index.is_file()
    assert len(shards) > 2
    assert torch.equal(features(teacher_of(folder)), expected)

    weights = load_file(shards[1])
    name = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != name}, shards[1])
    assert f"lacks weights {name}" in refusal(folder)
    shards[1].unlink()
    assert f"lists {shards[1].name}, which is not there" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {}}))
    assert "lists nothing" in refusal(folder)
    for elsewhere in (f"../{WEIGHTS}", str(folder.parent / WEIGHTS), 3):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": elsewhere}}))
        assert f"lists {elsewhere!r}, which is no name of a file beside it" in refusal(folder)


def test_a_half_precision_copy_serves_where_there_is_no_other(make_model):
    folder = make_model()
    whole = features(teacher_of(folder))
    unet = UNet2DModel.from_pretrained(folder).half()
    unet.save_pretrained(folder, variant="fp16")
    assert torch.equal(features(teacher_of(folder)), whole)
    (folder / WEIGHTS).unlink()
    halved = features(teacher_of(folder))
    unet.float().save_pretrained(folder)
    assert torch.equal(features(teacher_of(folder)), halved)
    assert not torch.equal(halved, whole)


def test_old_names_of_attention_are_understood(make_model):
    folder = make_model()
    expected = features(teacher_of(folder))
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, weight in load_file(folder / WEIGHTS).items():
        for new, before in old.items():
            name = name.replace(new, before)
        renamed[name] = weight
    assert "mid_block.attentions.0.query.weight" in renamed
    save_file(renamed, folder / WEIGHTS)
    assert torch.equal(features(teacher_of(folder)), expected)
    renamed["mid_block.attentions.0.querry.weight"] = renamed.pop(
        "mid_block.attentions.0.query.weight"
    )
    save_file(renamed, folder / WEIGHTS)
    assert "lacks weights mid_block.attentions.0.to_q.weight" in refusal(folder)


def test_a_module_that_runs_twice_is_no_layer(make_model):
    folder = make_model()
    twice = "mid_block.resnets.0.nonlinearity"
    assert twice not in describe_teacher(TeacherConfig(model=str(folder))).layers_available
    with pytest.raises(TeacherError, match=f"has no layer '{twice}'"):
        teacher_of(folder, twice)


def test_pieces_and_offload_give_what_the_whole_batch_gives(make_model):
    folder = make_model()
    whole = features(teacher_of(folder))
    for size in (1, 2, 5, 9):
        found = features(teacher_of(folder, batch_size=size))
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    seen: list[int] = []
    teacher = teacher_of(folder, batch_size=2)
    teacher.network.conv_in.register_forward_pre_hook(
        lambda _module, inputs: seen.append(len(inputs[0]))
    )
    features(teacher)
    assert seen == [2, 2, 1]
    assert torch.equal(features(teacher_of(folder, offload="cpu")), whole)


def test_the_teacher_may_see_images_at_another_size(make_model):
    folder = make_model()
    teacher = teacher_of(folder, image_size=16)
    images, timesteps = batch()
    shown = teacher.encode(images)
    assert shown.shape == (5, 3, 16, 16)
    assert teacher.features(shown, timesteps)[LAYER].shape[2:] == (4, 4)
    # A slope stays a slope between the centres of the pixels.
    slope = torch.linspace(-0.8, 0.6, 8).expand(1, 3, 8, 8)
    inner = teacher.encode(slope)[0, 0, 8, 1:-1]
    torch.testing.assert_close(inner, -0.8 + 0.2 * (torch.arange(1, 15) - 0.5) / 2)
    assert torch.equal(teacher_of(folder, image_size=8).encode(images), images)
    # Made smaller, fine stripes become grey instead of one of their two colours.
    stripes = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(8).expand(1, 3, 32, 32)
    grey = teacher_of(folder, image_size=8).encode(stripes)[..., 1:-1]
    assert grey.shape[-1] == 6
    assert grey.abs().max() < 0.3


class Tied(nn.Module):
    """Two layers with one weight, a buffer in the file and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Conv2d(3, 3, 1)
        self.register_buffer("shift", torch.full((3, 1, 1), 2.0))
        self.register_buffer("ramp", torch.arange(4.0), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.second(self.first(images) + self.shift + self.ramp))


def own_teacher(path: Path, build: Any, *layers: str) -> NetworkTeacher:
    plan = Plan("own", build, lambda network, images, _conditions: network(images), (3, 4, 4))
    found = plan.trace()
    card = TeacherCard(3, 4, 1000, tuple(found.shapes))
    config = TeacherConfig(layers=layers)
    weights = lambda _shapes: WeightFiles("own", [path])  # noqa: E731
    return load_network(plan, weights, noise_levels(), config, card, found)


def test_shared_weights_and_buffers_are_those_of_the_file(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Tied().eval()
    network.shift.fill_(5.0)
    torch.save(network.state_dict(), tmp_path / "own.bin")
    teacher = own_teacher(tmp_path / "own.bin", Tied, "second")
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.second(network.first(images) + 5.0 + torch.arange(4.0))
    found = teacher.features(images, torch.tensor([1, 2]))["second"]
    assert torch.equal(found, expected)
    assert teacher.network.last.weight is None


def model(folder: Path, inside: str, **config: Any) -> TeacherConfig:
    place = folder / inside
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    return TeacherConfig(model=str(folder))


@pytest.mark.parametrize(
    ("inside", "config", "family"),
    [
        ("", {"_class_name": "UNet2DModel"}, "unet2d"),
        ("unet", {"_class_name": "UNet2DModel"}, "unet2d"),
        ("unet", {"_class_name": "UNet2DConditionModel"}, "unet2d_condition"),
        ("transformer", {"_class_name": "DiTTransformer2DModel"}, "dit"),
        (
            "transformer",
            {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"},
            "dit",
        ),
        ("", {"architecture": "resnet18"}, "timm"),
    ],
)
def test_a_folder_tells_its_family(tmp_path, inside, config, family):
    assert family_of(model(tmp_path, inside, **config)) == family
    # What the user says goes first, and asks for no files.
    assert family_of(TeacherConfig(family="edm", model="nowhere")) == "edm"


def test_the_denoiser_of_a_pipeline_tells_and_not_its_other_parts(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    model(tmp_path, "vae", _class_name="AutoencoderKL")
    with pytest.raises(TeacherError, match="names a class of diffusers or an architecture of timm"):
        family_of(TeacherConfig(model=str(tmp_path)))
    assert family_of(model(tmp_path, "unet", _class_name="UNet2DModel")) == "unet2d"


def test_files_tell_their_family_by_their_suffix_and_others_are_refused(tmp_path):
    for name in ("some.pt", "some.onnx"):
        (tmp_path / name).write_bytes(b"x")
    assert family_of(TeacherConfig(model=str(tmp_path / "some.pt"))) == "guided_diffusion"
    with pytest.raises(TeacherError, match=r"is a file; .* a checkpoint \.pt"):
        family_of(TeacherConfig(model=str(tmp_path / "some.onnx")))
    with pytest.raises(TeacherError, match=r"has no config\.json"):
        family_of(TeacherConfig(model=str(tmp_path)))
    config = model(tmp_path, "", _class_name="VQModel")
    with pytest.raises(TeacherError, match="'VQModel', which belongs to no known family; give"):
        family_of(config)


def test_a_weight_that_the_forward_throws_away_leaves_its_address_to_nobody():
    alive = []

    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.labels: nn.Embedding | None = nn.Embedding(10, 8)
            self.body = nn.Conv2d(8, 8, 1)

        def forward(self, images: Tensor) -> Tensor:
            assert self.labels is not None
            weight = weakref.ref(self.labels.weight)
            self.labels = None
            # Weights are told by their address while the forward is followed.
            alive.append(weight() is not None)
            return self.body(images)

    with torch.device("meta"):
        network, images = Forgetful(), torch.empty(1, 8, 4, 4)
    found = trace(network, lambda net: net(images), plain_map, (8, 4, 4))
    assert alive == [True]
    assert "labels.weight" not in found.touched
    assert found.sizes["labels.weight"] == 80
