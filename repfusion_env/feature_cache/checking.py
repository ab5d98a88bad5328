"""What lies in a folder of caches, and whether every record of it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repfusion_env.feature_cache.files import DiskStore, file_name, files_of
from repfusion_env.feature_cache.filling import bytes_on_disk
from repfusion_env.feature_cache.identity import MANIFEST, Manifest, read_manifest
from repfusion_env.progress import watched

# No limit: what is there is read.
EVERYTHING_GIB = float(1 << 30)


@dataclass(frozen=True)
class Checked:
    """One cache.

    Attributes:
        folder: Of the cache.
        manifest: What it says it is.
        records: Whole ones.
        damaged: Slots that hold something else.
        unusable: Sentences about files that are no files of records at all.
    """

    folder: Path
    manifest: Manifest
    records: int
    damaged: int
    unusable: tuple[str, ...]


def caches_in(folder: Path) -> list[tuple[Path, Manifest]]:
    """The caches in ``folder``, or the one that it is.

    Raises:
        ValueError: There is none, or one's manifest cannot be used.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder '{folder}'")
    inside = [folder] if (folder / MANIFEST).exists() else sorted(folder.iterdir())
    found = [path.resolve() for path in inside if (path / MANIFEST).exists()]
    if not found:
        raise ValueError(f"there is no feature cache in '{folder}'")
    return [(path, read_manifest(path)) for path in found]


def check(folder: Path, *, repair: bool = False) -> Iterator[Checked]:
    """Read every record of the caches in ``folder``.

    Args:
        folder: Of one cache, or ``cache.folder``.
        repair: Empty what is damaged, and remove files of a wrong size, so that runs compute it
            again.

    Raises:
        ValueError: See :func:`caches_in`.
    """
    for path, manifest in caches_in(folder):
        yield _check(path, manifest, repair)


def _check(path: Path, manifest: Manifest, repair: bool) -> Checked:
    store = DiskStore(
        path.parent, manifest.identity, gib=EVERYTHING_GIB, parts=1, names=manifest.names
    )
    records = damaged = 0
    unusable: list[str] = []
    files = store.files()
    slots = [range(store.slots)] * len(files)
    pieces = watched(slots, store.slots * len(files), description=path.name, unit="slots")
    for (timestep, mirrored), _ in zip(files, pieces, strict=True):
        try:
            for part in store.scan(timestep, mirrored):
                records += len(part.images)
                damaged += len(part.damaged)
                if repair and len(part.damaged):
                    store.clear(timestep, mirrored, part.damaged)
        except ValueError as error:
            unusable.append(str(error))
            if repair:
                (path / file_name(timestep, mirrored)).unlink()
    return Checked(path, manifest, records, damaged, tuple(unusable))


def describe(path: Path, manifest: Manifest) -> list[str]:
    """A cache in a few lines for people."""
    identity, files = manifest.identity, files_of(path)
    mirrored = sum(part[1] for part in files)
    times = sorted({timestep for timestep, _ in files})
    shown = ", ".join(map(str, times[:12])) + (f", ... ({len(times)} in all)" if times[12:] else "")
    noise = "" if identity.noise_seed is None else f", noise seed {identity.noise_seed}"
    shapes = " + ".join("x".join(map(str, shape)) for shape in identity.shapes)
    return [
        str(path),
        f"  teacher    {manifest.names.get('teacher', '?')}: {', '.join(identity.layers)}",
        f"  features   {shapes}, {identity.precision}, {identity.feature_bytes:,} bytes each",
        f"  images     {identity.images:,} of {manifest.names.get('data', '?')}, "
        f"{identity.input}{noise}",
        f"  timesteps  {shown or 'none'}{f'; {mirrored} of them mirrored too' if mirrored else ''}",
        f"  on disk    {bytes_on_disk(path) / 2**20:,.1f} MiB",
    ]
