"""Where the files of a model are: shipped, in a local folder, or on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repfusion_env.registry import did_you_mean
from repfusion_env.teachers.base import TeacherError

SHIPPED = {name: Path(__file__).parents[1] / name for name in ("digits", "digit_scenes")}
STEM = "diffusion_pytorch_model"
# Each with the index that lists its shards, where there are several. Safe ones first; a
# half-precision copy serves where there is no other.
WEIGHTS = tuple(
    (f"{stem}{variant}{suffix}", f"{stem}{suffix}.index{variant}.json")
    for suffix in (".safetensors", ".bin")
    for variant in ("", ".fp16")
    for stem in (STEM, "model", "pytorch_model")
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model.

    Attributes:
        model: As the user named it.
        folder: Where the files are; a single file's own folder.
        revision: On the hub.
        remote: Whether files that are not here yet can be fetched from the hub.
        file: The file itself where the model is one.
    """

    model: str
    folder: Path
    revision: str | None = None
    remote: bool = False
    file: Path | None = None

    def has(self, component: str) -> bool:
        """Whether there is a ``config.json`` of ``component`` (a subfolder)."""
        return (self.folder / component / "config.json").is_file()

    def config(self, component: str = "", *, name: str = "config.json") -> dict[str, Any]:
        """The configuration of a component, from its subfolder or the model's folder itself.

        Raises:
            TeacherError: It is missing or no JSON object.
        """
        return _read_json(self.model, self.place(component, name) / name)

    def place(self, component: str, name: str = "config.json") -> Path:
        """The folder that holds the component's ``name``.

        Raises:
            TeacherError: Neither the model's folder nor its subfolder does.
        """
        if self.file is not None:
            raise TeacherError(
                f"teacher '{self.model}' is a file; its teacher.family takes a folder with a {name}"
            )
        places = [self.folder, self.folder / component] if component else [self.folder]
        if (self.folder / "model_index.json").is_file():
            places.reverse()
        for place in places:
            if (place / name).is_file():
                return place
        why = "; without it the noise of its timesteps is unknown" if "scheduler" in name else ""
        where = f", neither in the folder itself nor in '{component}/'" if component else ""
        raise TeacherError(f"teacher '{self.model}' has no {name}{where}{why}")

    def scheduler(self) -> dict[str, Any]:
        """The noise scheduler's configuration."""
        return self.config("scheduler", name="scheduler_config.json")

    def weights(self, component: str = "") -> list[Path]:
        """The files of a component's weights: one, or the shards that an index lists.

        Raises:
            TeacherError: There are none, or a shard is missing.
        """
        place = self.place(component)
        for name, index in WEIGHTS:
            shards = self._shards(place / index) if (place / index).is_file() else None
            names = shards or [name]
            # From the hub one file after the other: most models hold several copies.
            if self.remote and not all((place / name).is_file() for name in names):
                inside = place.relative_to(self.folder)
                wanted = [(inside / name).as_posix() for name in names]
                _download(self.model, self.revision, wanted)
            missing = [name for name in names if not (place / name).is_file()]
            if shards and missing:
                raise TeacherError(
                    f"teacher '{self.model}': {index} lists {missing[0]}, which is not there"
                )
            if not missing:
                return [place / name for name in names]
        raise TeacherError(
            f"teacher '{self.model}' has no weights: there is neither {STEM}.safetensors nor "
            f"{STEM}.bin beside its config.json"
        )

    def _shards(self, index: Path) -> list[str]:
        listed = _read_json(self.model, index).get("weight_map")
        names = list(listed.values()) if isinstance(listed, dict) else []
        if not names:
            raise TeacherError(f"teacher '{self.model}': {index.name} lists nothing")
        for name in names:
            # A file of weights lies beside its index: nothing else on this machine is read.
            if not isinstance(name, str) or name != Path(name).name or "\\" in name:
                raise TeacherError(
                    f"teacher '{self.model}': {index.name} lists {name!r}, which is no name of a "
                    "file beside it"
                )
        return sorted(set(names))


def find_model(model: str, revision: str | None) -> ModelFiles:
    """Find a model; from the hub only its configuration files are fetched.

    Args:
        model: Name of a shipped model, local folder or file, or hub id ``owner/name``.
        revision: Commit, tag or branch on the hub.

    Raises:
        TeacherError: There is no such model.
    """
    if model in SHIPPED:
        return ModelFiles(model, SHIPPED[model])
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelFiles(model, path)
    if path.is_file():
        return ModelFiles(model, path.parent, file=path)
    if not HUB_ID.fullmatch(model) or model.startswith("."):
        raise TeacherError(
            f"teacher '{model}': there is no such folder, and a hub id reads 'owner/name'; "
            f"shipped: {', '.join(SHIPPED)}.{did_you_mean(model, SHIPPED)}"
        )
    folder = _download(model, revision, ["*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model"])
    return ModelFiles(model, folder, revision, remote=True)


def _download(model: str, revision: str | None, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except RevisionNotFoundError as error:
        raise TeacherError(f"teacher '{model}' has no revision '{revision}' on the hub") from error
    except GatedRepoError as error:
        raise TeacherError(
            f"teacher '{model}' is gated: accept its terms on the hub and log in there with "
            "'hf auth login', or give teacher.model a local folder"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise TeacherError(
            f"teacher '{model}': there is no such folder here and no such public model on the hub"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise TeacherError(_unreachable(model, error)) from error
    except Exception as error:
        # The hub's client lets its HTTP library's exceptions through; which one differs by version.
        if not type(error).__module__.startswith(("http", "requests", "urllib3")):
            raise
        raise TeacherError(_unreachable(model, error)) from error


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
