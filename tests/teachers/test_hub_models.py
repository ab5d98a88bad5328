"""Models on the hub, which is a folder here: the client's own patterns choose what is fetched."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from latent_models import save_model

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import TeacherError, describe_teacher, load_teacher

HEAVY = (".safetensors", ".bin")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Callable[[Path], set[str]]:
    """Serves one folder as the model ``owner/name`` at ``v1``; returns the weights fetched."""
    served: list[Path] = []
    fetched: set[str] = set()

    def download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (model, revision) == ("owner/name", "v1")
        files = [path for path in served[0].rglob("*") if path.is_file()]
        names = [path.relative_to(served[0]).as_posix() for path in files]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(served[0] / name, tmp_path / "cache" / name)
            if name.endswith(HEAVY):
                fetched.add(name)
        return str(tmp_path / "cache")

    def serve(folder: Path) -> set[str]:
        served.append(folder)
        for path in [path for path in folder.rglob("*") if path.suffix in HEAVY]:
            # Copies that most models hold beside the file that is needed.
            for other in (".fp16.safetensors", ".non_ema.safetensors", ".fp16.bin"):
                shutil.copy(path, path.with_suffix(other))
        return fetched

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return serve


def check(folder: Path, *fetched: str, hub: Callable[[Path], set[str]]) -> None:
    """Whether exactly these weights are fetched, and the teacher is that of the folder."""
    local = load_teacher(TeacherConfig(model=str(folder)), device="cpu")
    found = hub(folder)
    config = TeacherConfig(model="owner/name", revision="v1")
    describe_teacher(config)
    assert found == set()
    remote = load_teacher(config, device="cpu")
    assert found == set(fetched)
    images = torch.rand(1, local.channels, local.image_size, local.image_size) * 2 - 1
    timesteps = torch.tensor([20])
    expected = local.features(local.encode(images), timesteps)
    given = remote.features(remote.encode(images), timesteps)
    assert all(torch.equal(given[layer], expected[layer]) for layer in local.layers)


def test_one_copy_of_a_network_is_fetched(make_model, hub):
    check(make_model(), "diffusion_pytorch_model.safetensors", hub=hub)


def test_shards_are_fetched_by_their_index(make_model, hub):
    from diffusers import UNet2DModel

    folder = make_model()
    unet = UNet2DModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder, max_shard_size="50KB", variant="fp16")
    shards = [path.name for path in folder.glob("*-of-*")]
    assert len(shards) > 1
    check(folder, *shards, hub=hub)


def test_pickles_are_fetched_where_there_is_nothing_else(make_model, hub):
    folder = make_model(safe=False, subfolders=True)
    local = load_teacher(TeacherConfig(model=str(folder)), device="cpu")
    served = hub(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    remote = load_teacher(TeacherConfig(model="owner/name", revision="v1"), device="cpu")
    assert served == {"unet/diffusion_pytorch_model.bin"}
    assert remote.fingerprint == local.fingerprint


def test_a_pipeline_gives_its_denoiser_vae_and_text_encoder(tmp_path, hub):
    folder = save_model(tmp_path / "sd", "sd")
    shutil.copytree(folder / "vae", folder / "safety_checker")
    parts = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    names = {**parts, "text_encoder": "model"}
    check(folder, *(f"{part}/{name}.safetensors" for part, name in names.items()), hub=hub)


def test_a_transformer_is_fetched_with_its_vae(tmp_path, transformer_folder, hub):
    folder = shutil.copytree(transformer_folder("dit"), tmp_path / "dit")
    names = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae")]
    check(folder, *names, hub=hub)


def test_a_classifier_is_fetched(tmp_path, hub):
    model = timm.create_model("test_vit")
    timm.models.save_for_hf(model, tmp_path / "vit", safe_serialization=True)
    (tmp_path / "vit" / "pytorch_model.bin").write_bytes(b"another copy")
    check(tmp_path / "vit", "model.safetensors", hub=hub)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError, "'owner/name' is gated: accept its terms"),
        (RepositoryNotFoundError, "no such public model on the hub"),
        ("ProxyError", "could not be fetched from the hub"),
        (ConnectionError, "could not be fetched from the hub"),
    ],
)
def test_what_the_hub_refuses_ends_in_one_sentence(monkeypatch, error, said):
    if isinstance(error, str):
        # Of the HTTP library that the client in use is built on.
        library = huggingface_hub.errors.HfHubHTTPError.__mro__[1].__module__
        error = getattr(importlib.import_module(library), error)

    def download(*_given: Any, **_settings: Any) -> str:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(TeacherError, match=said) as caught:
        describe_teacher(TeacherConfig(model="owner/name"))
    assert "\n" not in str(caught.value)
