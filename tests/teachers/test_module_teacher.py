from __future__ import annotations

import sys
import types
from typing import Any

import gymnasium as gym
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.config_loading import ConfigError
from repfusion_env.teachers import Teacher, TeacherError, describe_teacher, load_teacher

STAGES = ("stem", "body", "head")


class Timed(nn.Module):
    """A denoiser as anyone may have written it."""

    channels, image_size = 1, 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.time = nn.Linear(1, 8)
        self.body = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 1, 3, padding=1)
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = self.time(t[:, None].float() / 1000)[:, :, None, None]
        # In place behind the first tap, so that a tap that is not copied would change.
        hidden = self.stem(x).add_(told)
        output: Tensor = self.head(self.body(hidden).relu_())
        return output


class Untimed(Timed):
    """Images alone; the optional argument is no timestep."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.zeros(len(x)))


class Winding(Timed):
    """Its path depends on values, which the meta device has none of."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(len(x))
        hidden = self.stem(x)
        return self.head(self.body(hidden) if float(hidden.abs().sum()) >= 0 else hidden)


class Swapping(nn.Module):
    """Which layer is the deepest depends on the images."""

    channels, image_size = 1, 16

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 5)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.one(self.other(x)) if float(x.mean()) > 0 else self.other(self.one(x))
        return output


class Tokens(nn.Module):
    """Patches of 4x4 as tokens (N, L, F), and a tuple around them."""

    channels, image_size = 1, 16

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 6, 4, 4)
        self.mixer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.pair = Pair()

    def forward(self, images: Tensor) -> Any:
        return self.pair(self.mixer(self.patches(images).flatten(2).transpose(1, 2)))


class Pair(nn.Module):
    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return 2 * tokens, None


@pytest.fixture
def made(monkeypatch):
    """Gives ``my_teacher:load`` to the configuration, returning what is passed in."""

    def make(module: Any, *layers: str, **settings: Any) -> TeacherConfig:
        room = types.ModuleType("my_teacher")
        room.load = lambda config, *, device: module  # type: ignore[attr-defined]
        room.load.__module__ = "my_teacher"
        monkeypatch.setitem(sys.modules, "my_teacher", room)
        return TeacherConfig(family="my_teacher:load", layers=layers, **settings)

    return make


def seeded(kind: type[nn.Module], **attributes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = kind()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 1, 16, 16, generator=generator), torch.tensor([0, 77, 999])[:count]


def full_forward(
    module: nn.Module, layers: tuple[str, ...], *arguments: Tensor
) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(layer).register_forward_hook(
            lambda _m, _i, output, layer=layer: outputs.update({layer: output.clone()})
        )
        for layer in layers
    ]
    with torch.no_grad():
        module.eval()(*arguments)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize(("kind", "timed"), [(Timed, True), (Untimed, False), (Winding, True)])
def test_features_equal_those_of_hooks_to_the_last_bit(made, kind, timed):
    images, timesteps = inputs()
    reference = seeded(kind)
    expected = full_forward(reference, STAGES, images, *([timesteps] if timed else []))
    for layers in [("stem",), ("body",), STAGES]:
        teacher: Any = load_teacher(made(seeded(kind), *layers), device="cpu")
        assert isinstance(teacher, Teacher)
        features = teacher.features(images, timesteps)
        for layer in layers:
            assert torch.equal(features[layer], expected[layer]), (layers, layer)
            assert teacher.feature_shapes[layer] == expected[layer].shape[1:]
            assert not features[layer].requires_grad
        # Only what can be followed is cut, and only then is it known what is not needed.
        whole = kind is Winding or layers == STAGES
        assert (teacher.parameters_used == teacher.parameters_all) == whole


def test_a_module_whose_order_depends_on_the_images_is_read_in_either_order(made):
    images, timesteps = inputs()
    reference = seeded(Swapping)
    teacher = load_teacher(made(seeded(Swapping), "one", "other"), device="cpu")
    for shown in (images.abs(), -images.abs()):
        expected = full_forward(reference, ("one", "other"), shown)
        features = teacher.features(shown, timesteps)
        assert all(torch.equal(features[layer], expected[layer]) for layer in expected)


def test_what_lies_behind_the_deepest_layer_does_not_run(made):
    module = seeded(Untimed)
    teacher = load_teacher(made(module, "body"), device="cpu")
    teacher.network.head.forward = None  # type: ignore[attr-defined]
    assert teacher.features(*inputs())["body"].isfinite().all()


def test_the_users_module_is_left_as_it_is_and_the_teacher_is_frozen(made):
    module = seeded(Timed)
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    teacher: Any = load_teacher(made(module, "stem", precision="bf16"), device="cpu")
    teacher.features(*inputs())
    assert module.training and all(weight.requires_grad for weight in module.parameters())
    assert not teacher.network.training
    assert not any(weight.requires_grad for weight in teacher.network.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == before[name].dtype
    # No hook of ours stays on it: its forward still reaches the end.
    assert module.eval()(*inputs()).shape == (3, 1, 8, 8)
    # Batch statistics in the mode of training would make one image's feature depend on the others.
    images, timesteps = inputs()
    alone = teacher.features(images[:1], timesteps[:1])["stem"]
    torch.testing.assert_close(alone, teacher.features(images, timesteps)["stem"][:1])


def test_half_precision_stays_close(made):
    images, timesteps = inputs()
    exact = load_teacher(made(seeded(Timed), "head"), device="cpu").features(images, timesteps)
    teacher: Any = load_teacher(made(seeded(Timed), "head", precision="bf16"), device="cpu")
    half = teacher.features(images, timesteps)
    assert teacher.network.body.weight.dtype == torch.bfloat16
    assert 0 < float((half["head"] - exact["head"]).abs().max()) < 0.05


def test_tokens_and_the_first_of_several_outputs_are_maps(made):
    images, timesteps = inputs()
    reference = seeded(Tokens).eval()
    teacher = load_teacher(made(seeded(Tokens), "mixer", "pair"), device="cpu")
    features = teacher.features(images, timesteps)
    with torch.no_grad():
        tokens = reference.mixer(reference.patches(images).flatten(2).transpose(1, 2))
    assert features["mixer"].shape == (3, 6, 4, 4)
    torch.testing.assert_close(features["mixer"][:, :, 1, 2], tokens[:, 6])
    torch.testing.assert_close(features["pair"], 2 * features["mixer"])


def test_the_noise_process_is_the_modules_own(made, tmp_path):
    images, timesteps = inputs()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))

    def noised(module: nn.Module, **settings: Any) -> Tensor:
        return load_teacher(made(module, "stem", **settings), device="cpu").add_noise(
            images, noise, timesteps
        )

    bars = torch.linspace(0.99, 0.01, 1000)
    expected = bars[timesteps].sqrt().view(-1, 1, 1, 1) * images
    expected = expected + (1 - bars[timesteps]).sqrt().view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(noised(seeded(Timed, alpha_bars=bars)), expected)

    sigmas = torch.linspace(0.01, 50, 1000)
    torch.testing.assert_close(
        noised(seeded(Timed, sigmas=sigmas)), images + sigmas[timesteps].view(-1, 1, 1, 1) * noise
    )

    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.save_pretrained(tmp_path)
    theirs = scheduler.add_noise(images, noise, timesteps)
    torch.testing.assert_close(noised(seeded(Timed), model=str(tmp_path)), theirs)
    torch.testing.assert_close(
        noised(seeded(Timed, sigmas=sigmas), options={"schedule": str(tmp_path)}), theirs
    )

    plain = noised(seeded(Timed))
    torch.testing.assert_close(
        plain, DDIMScheduler(beta_end=0.02).add_noise(images, noise, timesteps)
    )
    torch.testing.assert_close(noised(seeded(Timed), options={"schedule": "levels"}), plain)


def test_a_module_with_sigmas_is_told_these(made):
    images, timesteps = inputs()
    sigmas = torch.linspace(0.01, 50, 1000)
    expected = full_forward(seeded(Timed), ("head",), images, sigmas[timesteps])["head"]
    teacher = load_teacher(made(seeded(Timed, sigmas=sigmas), "head"), device="cpu")
    assert torch.equal(teacher.features(images, timesteps)["head"], expected)
    # Images of deviation 0.5 (Karras et al.), unless its sigma_data says otherwise.
    torch.testing.assert_close(teacher.snr(timesteps), 0.25 / sigmas[timesteps] ** 2)


class Labelled(Timed):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t)


class Broken(Timed):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.stem(x))


@pytest.mark.parametrize(
    ("kind", "attributes", "settings", "sentence"),
    [
        (Timed, {}, {"layers": ()}, "needs one named; it has 'stem.0', 'stem.1', 'stem.2', 'stem'"),
        (Timed, {}, {"layers": ("sten",)}, "no layer 'sten' with an output (N, F, h, w); did you"),
        (Timed, {}, {"layers": ("time",)}, "no layer 'time'"),
        (Timed, {"channels": None}, {}, "teacher.options.channels: nothing given"),
        (Timed, {"image_size": (16, 16)}, {}, "teacher.options.image_size: (16, 16) given"),
        (Timed, {}, {"options": {"schedule": "edn"}}, "'edn' given; allowed: levels, edm, or a"),
        (Timed, {"alpha_bars": torch.linspace(0, 1, 9)}, {}, "alpha_bars must fall"),
        (Timed, {"alpha_bars": torch.ones(3, 3)}, {}, "not of shape (3, 3)"),
        (Timed, {"sigmas": torch.linspace(9, 1, 9)}, {}, "sigmas must be positive and rise"),
        (Labelled, {}, {}, "asks for y beside images and timesteps; labels and prompts have no"),
        (Broken, {}, {}, "its forward fails on images of 1x16x16 (RuntimeError"),
    ],
)
def test_what_cannot_be_a_teacher_is_refused_in_one_sentence(
    made, kind, attributes, settings, sentence
):
    config = made(seeded(kind, **attributes), *settings.pop("layers", ("stem",)), **settings)
    with pytest.raises(TeacherError) as caught:
        load_teacher(config, device="cpu")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_factory_that_returns_something_else_is_refused(made):
    for call in (describe_teacher, lambda config: load_teacher(config, device="cpu")):
        with pytest.raises(TypeError, match=r"must return a Teacher .* or an nn.Module, not dict"):
            call(made({}, "stem"))


def test_an_environment_steps_with_a_module_by_its_options(made, tiny):
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
    config = made(module)
    teacher = {"family": config.family, "options": {"channels": 1, "image_size": 16}}
    settings = {**tiny, "teacher": {**teacher, "layers": ["1"]}}
    env = gym.make_vec("repfusion_env:RepFusion-v0", num_envs=4, config="debug", **settings)
    env.reset(seed=0)
    assert env.step([0, 1, 2, 3])[1].isfinite().all()
    env.close()
    with pytest.raises(ConfigError, match="no layer of its own choice; name one, such as '0', '1'"):
        gym.make_vec(
            "repfusion_env:RepFusion-v0", num_envs=4, config="debug", **{**tiny, "teacher": teacher}
        )


def test_a_description_lists_all_maps(made):
    card = describe_teacher(made(seeded(Timed)))
    assert card.layers_available == ("stem.0", "stem.1", "stem.2", "stem", "body", "head")
    assert (card.channels, card.image_size, card.num_timesteps) == (1, 16, 1000)


def test_the_fingerprint_tells_attributes_structure_and_code_apart(made):
    def fingerprint(kind: type[nn.Module] = Timed, **attributes: Any) -> str:
        return load_teacher(made(seeded(kind, **attributes), "stem"), device="cpu").fingerprint

    class Louder(Timed):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(2 * x, t)

    Louder.__qualname__ = Timed.__qualname__
    wider = seeded(Timed).stem
    wider[0].padding = (2, 2)
    assert fingerprint() == fingerprint()
    # All of them have the same weights.
    others = [fingerprint(Louder), fingerprint(gain=2.0), fingerprint(stem=wider)]
    assert len({fingerprint(), *others}) == 4
