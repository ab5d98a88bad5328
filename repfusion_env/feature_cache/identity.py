"""What a cache holds: everything that its features depend on, and its manifest on disk.

Shape letters: F feature width, h,w feature positions, M images of the bank.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from repfusion_env.atomic import write_text

# It rises with every change of the files, of the noise as a function of its keys, or of what a key
# means, so that no cache of another version is half understood.
FORMAT = 1
MANIFEST = "manifest.json"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Identity:
    """Two runs share a cache where all of this is the same.

    Args:
        teacher: Fingerprint of the teacher: weights, configuration, noise process, layers.
        layers: Read in one forward; their features are one record.
        shapes: Of each layer, (F,) pooled or (F, h, w) dense.
        num_timesteps: Of the teacher.
        input: ``clean`` or ``noised``.
        noise_seed: Of the fixed noise; None under clean input, which has none.
        data: Fingerprint of the image bank.
        images: M.
        precision: How features are kept: ``fp32``, ``bf16``, ``fp16``.
    """

    teacher: str
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_timesteps: int
    input: str
    noise_seed: int | None
    data: str
    images: int
    precision: str

    @cached_property
    def width(self) -> int:
        """Numbers of one record: the features of one (image, timestep), all layers."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def feature_bytes(self) -> int:
        """Bytes of one record's features."""
        return self.width * BYTES[self.precision]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """Of the cache's folder."""
        return self.digest[:20]


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Args:
        identity: Of the cache.
        slots: Records that the file of one timestep has room for.
        names: Of teacher and data, for people; they identify nothing.
    """

    identity: Identity
    slots: int
    names: Mapping[str, str]

    def text(self) -> str:
        """As it stands in the file."""
        told = {
            "format": FORMAT,
            "names": dict(self.names),
            "identity": asdict(self.identity),
            "slots": self.slots,
        }
        return json.dumps(told, indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache's folder.

    Raises:
        ValueError: It is damaged, of another format, or stands in a folder of another name.
    """
    path = folder / MANIFEST
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        version = told["format"]
        if version != FORMAT:
            raise ValueError(
                f"feature cache '{folder}': format {version!r} given, this version reads format "
                f"{FORMAT}; delete the folder, or name another cache.folder"
            )
        identity = _identity(told["identity"])
        slots, names = told["slots"], told["names"]
        if type(slots) is not int or not 0 < slots <= identity.images:
            raise TypeError(f"{slots!r} slots for {identity.images} images")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"feature cache '{folder}': its {MANIFEST} is damaged "
            f"({type(error).__name__}: {error}); delete the folder"
        ) from error
    if identity.name != folder.name:
        raise ValueError(
            f"feature cache '{folder}': its {MANIFEST} belongs to cache '{identity.name}'; caches "
            "are not renamed or edited, so delete the folder or give it its name back"
        )
    return Manifest(identity, slots, names)


def agreed_manifest(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest of ``folder``, made from ``wanted`` where there is none yet.

    Of several processes that open a new cache at once, the first one's slots hold for all.

    Raises:
        ValueError: The folder holds another cache than ``wanted``, or cannot be used at all.
    """
    path = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            draft = folder / f".{MANIFEST}.{os.getpid()}-{os.urandom(4).hex()}"
            write_text(draft, wanted.text())
            try:
                # Unlike a rename, a link does not replace what another process has just written.
                os.link(draft, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cache.folder: '{folder}' cannot be used ({error.strerror or error}); name a folder "
            "that can be written"
        ) from error
    found = read_manifest(folder)
    if found.identity != wanted.identity:
        mine, theirs = asdict(wanted.identity), asdict(found.identity)
        other = [key for key in mine if mine[key] != theirs[key]]
        raise ValueError(
            f"feature cache '{folder}': it was made for another {' and '.join(other)}; delete the "
            "folder"
        )
    return found


def _identity(told: dict[str, Any]) -> Identity:
    given = dict(told)
    given["layers"] = tuple(told["layers"])
    given["shapes"] = tuple(tuple(int(side) for side in shape) for shape in told["shapes"])
    if set(given) != set(get_type_hints(Identity)):
        raise TypeError(f"keys {sorted(given)}")
    if given["precision"] not in BYTES:
        raise TypeError(f"precision {given['precision']!r}")
    return Identity(**given)
