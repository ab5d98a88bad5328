from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from repfusion_env.config import DataConfig
from repfusion_env.config_loading import load_config
from repfusion_env.config_options import key_overrides
from repfusion_env.data import load_data
from repfusion_env.data.annotations import Masks
from repfusion_env.data.bank import UNLABELLED, ImageBank
from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.tasks import pixel_probe
from repfusion_env.tasks.pixel_probing import PixelProbeSettings, ensemble, measure, measuring
from repfusion_env.tasks.pixel_probing.ensemble import PixelClassifier, train_member, votes
from repfusion_env.tasks.pixel_probing.pixels import PixelVectors, Reader
from repfusion_env.tasks.pixel_probing.settings import default_layers
from repfusion_env.teachers import describe_teacher, load_teacher


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def enlarged(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Vectors of all pixels (N H W, D) as the method defines them."""
    parts = [F.interpolate(found, size, mode="bilinear", align_corners=False) for found in maps]
    return torch.cat(parts, dim=1).permute(0, 2, 3, 1).flatten(0, 2)


@pytest.fixture
def maps() -> list[Tensor]:
    # Smaller than the image, as large in one direction, and larger.
    return [drawn(3, 5, 2, 3), drawn(3, 4, 6, 9, seed=1), drawn(3, 2, 12, 12, seed=2)]


def test_a_pixels_vector_is_that_of_the_enlarged_maps(maps: list[Tensor]) -> None:
    vectors, pixels = PixelVectors(maps, (6, 9)), torch.randperm(3 * 6 * 9)
    assert vectors.width == 11
    assert torch.allclose(vectors(pixels), enlarged(maps, (6, 9))[pixels], atol=1e-6)


def test_a_whole_image_is_classified_as_its_pixels_are(maps: list[Tensor]) -> None:
    with own_randomness(0):
        member = PixelClassifier(11, 4)
        member(torch.randn(64, 11))  # moves the normalisation's averages
    member.eval()
    whole = member.of_images(maps, (6, 9))
    single = member(enlarged(maps, (6, 9))).view(3, 6, 9, 4).permute(0, 3, 1, 2)
    assert torch.allclose(whole, single, atol=1e-6) and float(whole.detach().std()) > 1e-4


def test_the_class_of_most_members_has_the_pixel(maps: list[Tensor]) -> None:
    members = []
    for seed in range(5):
        with own_randomness(seed):
            member = PixelClassifier(11, 4).eval()
        for layer in (member.first, member.rest[2], member.rest[5]):
            layer.weight.data *= 50  # as different from each other as trained ones
        members.append(member.requires_grad_(False))
    found = votes(members, maps, (6, 9))
    vectors = enlarged(maps, (6, 9))
    said = np.stack([member(vectors).argmax(1).numpy() for member in members])
    counts = np.stack([np.bincount(pixel, minlength=4) for pixel in said.T])
    assert np.array_equal(found.permute(0, 2, 3, 1).reshape(-1, 4).numpy(), counts)
    assert len({tuple(row) for row in counts.tolist()}) > 3 and (counts > 1).any()


def reading(model: str, timesteps: tuple[int, ...], noised: bool = True) -> tuple[Reader, Tensor]:
    config = load_config({"teacher.model": model, "teacher.layers": ["mid_block", "up_blocks.1"]})
    reader = Reader(load_teacher(config.teacher, device="cpu"), timesteps, noised, seed=3)
    images = drawn(18, 1, 16, 16).clamp(-1, 1)
    images[17] = images[0]
    return reader, images


def test_maps_of_one_size_lie_side_by_side_by_timestep_and_layer(tiny_teacher: str) -> None:
    reader, images = reading(tiny_teacher, (50, 400), noised=False)
    coarse, fine = reader(images)
    expected = [
        reader.teacher.features(images[:2], torch.full((2,), timestep)) for timestep in (50, 400)
    ]
    for found, layer in ((coarse, "mid_block"), (fine, "up_blocks.1")):
        wanted = torch.cat([maps[layer] for maps in expected], dim=1)
        assert torch.allclose(found[:2], wanted, atol=1e-5)
    assert coarse.shape[2:] == (8, 8) and fine.shape[2:] == (16, 16)


def test_all_images_are_read_under_the_same_noise(tiny_teacher: str) -> None:
    reader, images = reading(tiny_teacher, (300,))
    noised = reader(images)
    clean = Reader(reader.teacher, (300,), False, 3)(images)
    other = Reader(reader.teacher, (300,), True, 4)(images)
    for index in range(2):
        # The same image in another forward gives the same, so noise depends on neither.
        assert torch.allclose(noised[index][0], noised[index][17], atol=1e-5)
        assert not torch.allclose(noised[index], clean[index], atol=0.1)
        assert not torch.allclose(noised[index], other[index], atol=0.1)


def problem(count: int = 600) -> tuple[PixelVectors, Tensor, Tensor]:
    """Pixels whose class is where their vector lies, and nothing else."""
    maps = drawn(6, 8, 10, 10)
    vectors = PixelVectors([maps], (10, 10))
    direction = drawn(8, 3, seed=1)
    labels = (enlarged([maps], (10, 10)) @ direction).argmax(1)
    pixels = torch.randperm(600, generator=torch.Generator().manual_seed(2))[:count]
    return vectors, pixels, labels[pixels]


def test_a_classifier_learns_what_the_vectors_tell_and_follows_its_seed() -> None:
    vectors, pixels, labels = problem()
    member = train_member(vectors, pixels[:400], labels[:400], 3, seed=0)
    accuracy = (member(vectors(pixels[400:])).argmax(1) == labels[400:]).float().mean()
    assert float(accuracy) > 0.9 and not member.training
    again = train_member(vectors, pixels[:400], labels[:400], 3, seed=0)
    other = train_member(vectors, pixels[:400], labels[:400], 3, seed=1)
    assert torch.equal(again.first.weight, member.first.weight)
    assert not torch.allclose(other.first.weight, member.first.weight, atol=1e-3)


def test_training_ends_when_batches_stop_getting_better() -> None:
    vectors, pixels, _ = problem()
    noise = torch.randint(0, 2, (600,), generator=torch.Generator().manual_seed(5))
    steps: list[int] = []
    train_member(vectors, pixels, noise, 2, seed=0, watch=lambda step, _: steps.append(step))
    # Ten batches an epoch: not before four epochs and 51 batches, and not the whole 1,000.
    assert steps[-1] + 49 >= 91 and steps[-1] < 700


def test_a_class_of_hardly_any_pixels_does_not_count_where_it_is_rare() -> None:
    masks = torch.zeros(2, 256, 256, dtype=torch.int64)
    masks[0, 0, :19], masks[1, 0, :20] = 3, 3
    found = measuring.without_slips(masks)
    assert bool((found[0, 0, :19] == 255).all()) and int((found == 255).sum()) == 19
    small = torch.zeros(1, 16, 16, dtype=torch.int64)
    small[0, 0, 0] = 1
    assert torch.equal(measuring.without_slips(small), small)


def test_the_default_layers_are_blocks_of_the_decoder() -> None:
    available = describe_teacher(load_config().teacher).layers_available
    assert default_layers(available) == ("mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2")


@pytest.fixture
def tiny_squares(tiny_teacher: str) -> dict[str, Any]:
    return {
        "device": "cpu",
        "data.name": f"{__name__}:squares",
        "teacher.model": tiny_teacher,
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the classifiers that are trained, in order."""
    seeds: list[int] = []
    monkeypatch.setattr(ensemble, "EPOCHS", 1)

    def counted(*given: Any) -> PixelClassifier:
        seeds.append(given[4])
        return train_member(*given)

    monkeypatch.setattr(measuring, "train_member", counted)
    return seeds


SMALL = {"timesteps": (50, 200), "images": 3, "heldout": 10, "members": 2}


def test_the_metric_is_that_of_the_members_vote(
    tiny_squares: dict[str, Any], tmp_path: Path
) -> None:
    config = load_config(tiny_squares)
    found = measure(config, PixelProbeSettings(**SMALL), folder=tmp_path)
    # Again from the files: naive vectors, numpy's counting.
    teacher = load_teacher(replace(config.teacher, layers=found.layers), device="cpu")
    reader = Reader(teacher, (50, 200), True, derive_seed(0, "pixel probe noise"))
    heldout = load_data(config.data)[1]
    vectors = enlarged(reader(heldout.pixels(torch.arange(10))), (16, 16))
    assert vectors.shape[1] == found.width
    said = []
    for path in sorted((tmp_path / "members").iterdir()):
        member = PixelClassifier(found.width, 3)
        member.load_state_dict(load_file(path))
        said.append(member.eval()(vectors).argmax(1).numpy())
    answer = np.stack([np.bincount(pixel, minlength=3) for pixel in np.stack(said).T]).argmax(1)
    truth = heldout.annotations["masks"].tensors[0][:10].flatten().numpy()
    pairs = [(answer == label, truth == label) for label in range(3)]
    ious = [(a & b).sum() / (a | b).sum() for a, b in pairs if (a | b).any()]
    assert found.metrics["miou"] == pytest.approx(float(np.mean(ious)), abs=1e-5)
    accuracy = float((answer == truth).mean())
    assert found.metrics["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-5)
    assert accuracy > float((truth == 0).mean())  # better than to see nothing


def test_an_interrupted_probe_goes_on_and_ends_as_an_uninterrupted_one(
    tiny_squares: dict[str, Any],
    tmp_path: Path,
    trained: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, settings = load_config(tiny_squares), PixelProbeSettings(**SMALL, repeats=2)
    whole = measure(config, settings)
    assert len(trained) == len(set(trained)) == 4 and len(whole.draws) == 2
    assert whole.draws[0] != whole.draws[1]
    del trained[:]
    counted = measuring.train_member

    def interrupted(*given: Any) -> PixelClassifier:
        if len(trained) == 3:
            raise KeyboardInterrupt
        return counted(*given)

    monkeypatch.setattr(measuring, "train_member", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(config, settings, folder=tmp_path)
    monkeypatch.setattr(measuring, "train_member", counted)
    resumed = measure(config, settings, folder=tmp_path)
    assert len(trained) == 4 and resumed.draws == whole.draws
    # What is there is used, what is damaged or of other labels is made anew.
    (tmp_path / "members" / "draw1-0.safetensors").write_bytes(b"cut off")
    assert measure(config, settings, folder=tmp_path).draws == whole.draws
    assert len(trained) == 5
    measure(config, replace(settings, images=4, repeats=1), folder=tmp_path)
    assert len(trained) == 7


def test_the_command_writes_a_summary_and_pictures(
    trained: list[int],
    tiny_squares: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pixel_probe.main([*words(tiny_squares, tmp_path), "--repeats", "2"]) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["timesteps"] == [50, 200] and found["layers"] == ["mid_block", "up_blocks.1"]
    assert found["labelled_images"] == 3 and found["heldout_images"] == 10
    assert found["seeds"] == [0, 1] and found["headline"] == "miou"
    miou = found["metrics"]["miou"]
    assert miou["mean"] == pytest.approx(sum(miou["draws"]) / 2)
    assert miou["deviation"] == pytest.approx(abs(miou["draws"][0] - miou["draws"][1]) / 2**0.5)
    shown = f"{100 * miou['mean']:.1f} ± {100 * miou['deviation']:.1f} %"
    assert shown in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "out" / "predictions.png").convert("RGB"))
    assert picture.shape[1] > 600 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def words(given: dict[str, Any], folder: Path) -> list[str]:
    """A command line of the small probe."""
    keys = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    own = "--config digits --timesteps 50 200 --layers mid_block up_blocks.1 --images 3"
    own += f" --heldout 10 --members 2 --out {folder / 'out'}"
    return [*keys, *own.split()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.name", "digits"), "task 'pixel_probe' needs masks, but data set 'digits' has"),
        (("--layers", "mid_blok"), "teacher.layers: the teacher has no layer 'mid_blok'"),
        (("--timesteps", "1000"), "the grid holds 1000, but the teacher's scheduler has"),
        (("--timesteps", "50", "50"), "--timesteps: '50' is named twice"),
        (("--timesteps", "-5"), "-5 given; it must be 0 or more"),
        (("--images", "13"), "--images: 13 given, but data set 'squares' has 12 training"),
        (("--members", "0"), "--members: 0 given; it must be 1 or more"),
        (("--membrs", "3"), "--membrs: there is no such option. Did you mean 'members'?"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    more: tuple[str, ...],
    message: str,
    tiny_squares: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pixel_probe.main([*words(tiny_squares, tmp_path), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_documented_commands_and_defaults_are_the_commands_own() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pixel_probe.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)
    commands = [shlex.split(line, comments=True)[3:] for line in block.splitlines()]
    assert len(commands) == 3
    for arguments in commands:
        _, others = pixel_probe.parser().parse_known_args(arguments)
        key_overrides(others, pixel_probe.parser())
    rows = dict(re.findall(r"^\| `--(\w+) [^`]*` \|.*\| `?([^|`]+)`? \|$", page, re.M))
    parser = pixel_probe.parser()
    for name in ("images", "members", "repeats", "timesteps"):
        default = parser.get_default(name)
        words = default if isinstance(default, list) else [default]
        assert rows[name].strip() == " ".join(map(str, words))


def test_images_without_a_labelled_pixel_are_refused(tiny_squares: dict[str, Any]) -> None:
    given = tiny_squares | {"data.name": f"{__name__}:unlabelled_squares"}
    with pytest.raises(ValueError, match=r"3 labelled images drawn by seed 0 have [01] pixels"):
        measure(load_config(given), PixelProbeSettings(**SMALL))


def squares(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """A bright square and a grey one in each image, and masks that tell them apart."""
    return drawn_squares(12, 0), drawn_squares(10, 1)


def drawn_squares(count: int, seed: int) -> ImageBank:
    random = np.random.default_rng(seed)
    images = random.integers(0, 30, (count, 1, 16, 16)).astype(np.uint8)
    masks = np.zeros((count, 16, 16), np.uint8)
    for row in range(count):
        for label, light in ((1, 250), (2, 130)):
            left, top = random.integers(0, 11, 2)
            images[row, 0, top : top + 5, left : left + 5] = light
            masks[row, top : top + 5, left : left + 5] = label
    known = {"masks": Masks(torch.from_numpy(masks), ("ground", "bright", "grey"))}
    pixels, labels = torch.from_numpy(images), torch.zeros(count, dtype=torch.int64)
    return ImageBank("squares", pixels, labels, UNLABELLED, annotations=known)


def unlabelled_squares(config: DataConfig) -> tuple[ImageBank, ImageBank]:
    """The same with masks of which one says what a single pixel is, and the others nothing."""
    values = torch.full((12, 16, 16), 255, dtype=torch.uint8)
    values[5, 0, 0] = 1
    train = replace(drawn_squares(12, 0), annotations={"masks": Masks(values, ("a", "b"))})
    return train, train
