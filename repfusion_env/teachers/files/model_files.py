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

SHIPPED = {"digits": Path(__file__).parents[1] / "digits"}
STEM = "diffusion_pytorch_model"
# Safe ones first; a half-precision copy serves where there is no other.
WEIGHTS = tuple(
    f"{stem}{variant}{suffix}"
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
        if self.remote:
            self._fetch_weights(place)
        for name in WEIGHTS:
            index = place / f"{name}.index.json"
            if index.is_file():
                return self._shards(index)
            if (place / name).is_file():
                return [place / name]
        raise TeacherError(
            f"teacher '{self.model}' has no weights: there is neither {STEM}.safetensors nor "
            f"{STEM}.bin beside its config.json"
        )

    def _shards(self, index: Path) -> list[Path]:
        listed = _read_json(self.model, index).get("weight_map", {})
        names = sorted(set(listed.values())) if isinstance(listed, dict) else []
        missing = [name for name in names if not (index.parent / str(name)).is_file()]
        if missing or not names:
            raise TeacherError(
                f"teacher '{self.model}': {index.name} lists {missing[0] if missing else 'nothing'}"
                f"{', which is not there' if missing else ''}"
            )
        return [index.parent / name for name in names]

    def _fetch_weights(self, place: Path) -> None:
        """Fetch a component's weights, the pickled copy only where there is no other."""
        inside = place.relative_to(self.folder).as_posix()
        for suffix in (".safetensors", ".bin"):
            # In the root a star alone would match the weights of every component below.
            starts = [STEM, "model", "pytorch_model"] if inside == "." else [f"{inside}/"]
            wanted = [f"{start}*{suffix}{end}" for start in starts for end in ("", ".index.json")]
            _download(self.model, self.revision, wanted)
            if any(place.glob(f"*{suffix}")):
                return


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
