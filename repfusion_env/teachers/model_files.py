"""Where the files of a diffusers model are: shipped, in a local folder, or on the hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repfusion_env.registry import did_you_mean
from repfusion_env.teachers.base import TeacherError

SHIPPED = {"digits": Path(__file__).parent / "digits"}
SAFETENSORS = "diffusion_pytorch_model.safetensors"
PICKLED = "diffusion_pytorch_model.bin"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model; ``weights`` is None where only the configuration was asked for."""

    model: str
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    unet_folder: Path
    weights: Path | None


def find_model_files(model: str, revision: str | None, *, weights: bool) -> ModelFiles:
    """Find a model's configuration, and its weights where asked.

    Configurations lie in the folder itself or in ``unet/`` and ``scheduler/``. Safetensors are
    preferred to a ``.bin``.

    Args:
        model: Name of a shipped model, local folder, or hub id ``owner/name``.
        revision: Commit, tag or branch on the hub.
        weights: Whether weights are needed (and fetched from the hub).

    Raises:
        TeacherError: There is no such model, or a file is missing or no JSON.
    """
    folder = _folder(model, revision, weights=weights)
    unet_folder = folder if (folder / "config.json").is_file() else folder / "unet"
    if not (unet_folder / "config.json").is_file():
        raise TeacherError(
            f"teacher '{model}' has no config.json, neither in the folder itself nor in 'unet/'"
        )
    scheduler = folder / "scheduler_config.json"
    if not scheduler.is_file():
        scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise TeacherError(
            f"teacher '{model}' has no scheduler_config.json, neither in the folder itself nor in "
            "'scheduler/'; without it the noise of its timesteps is unknown"
        )
    found = [unet_folder / name for name in (SAFETENSORS, PICKLED)]
    found = [path for path in found if path.is_file()]
    if weights and not found:
        raise TeacherError(
            f"teacher '{model}' has no weights: there is neither {SAFETENSORS} nor {PICKLED} "
            f"beside its config.json"
        )
    return ModelFiles(
        model,
        _read_json(model, unet_folder / "config.json"),
        _read_json(model, scheduler),
        unet_folder,
        found[0] if weights else None,
    )


def _folder(model: str, revision: str | None, *, weights: bool) -> Path:
    if model in SHIPPED:
        return SHIPPED[model]
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise TeacherError(f"teacher '{model}' is a file; a diffusers model is a folder")
    if not HUB_ID.fullmatch(model) or model.startswith("."):
        raise TeacherError(
            f"teacher '{model}': there is no such folder, and a hub id reads 'owner/name'; "
            f"shipped: {', '.join(SHIPPED)}.{did_you_mean(model, SHIPPED)}"
        )
    return _download(model, revision, weights=weights)


def _download(model: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))

    configs = (
        "config.json",
        "unet/config.json",
        "scheduler_config.json",
        "scheduler/scheduler_config.json",
    )
    try:
        folder = fetch(*configs)
        if weights:
            # The pickled copy is fetched only where there is no other: hubs often hold both.
            for name in (SAFETENSORS, PICKLED):
                if not any((folder / place / name).is_file() for place in (".", "unet")):
                    fetch(name, f"unet/{name}")
                else:
                    break
    except RevisionNotFoundError as error:
        raise TeacherError(f"teacher '{model}' has no revision '{revision}' on the hub") from error
    except (RepositoryNotFoundError, GatedRepoError, HFValidationError) as error:
        raise TeacherError(
            f"teacher '{model}': there is no such folder here and no such public model on the hub"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise TeacherError(_unreachable(model, error)) from error
    except Exception as error:
        # The hub's client lets its HTTP library's exceptions through; which one differs by version.
        if type(error).__module__.partition(".")[0] not in ("httpx", "requests", "httpcore"):
            raise
        raise TeacherError(_unreachable(model, error)) from error
    return folder


def _unreachable(model: str, error: Exception) -> str:
    return (
        f"teacher '{model}': there is no such folder here, and it could not be fetched from the "
        f"hub ({type(error).__name__}); without a network give teacher.model a local folder"
    )


def _read_json(model: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TeacherError(f"teacher '{model}': {path.name} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise TeacherError(
            f"teacher '{model}': {path.name} must hold a JSON object, not {type(content).__name__}"
        )
    return content
