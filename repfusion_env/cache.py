"""Teacher features ahead of the runs that read them: ``python -m repfusion_env.cache``.

Fills the cache of a configuration, lists what is kept, and verifies it. See ``docs/cache.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repfusion_env.command_line import INTERRUPTED, guarded_ours, stop_flag
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import check, merge, read_config_file
from repfusion_env.config_options import key_overrides

PROG = "python -m repfusion_env.cache"
STOPPED = "stopped; what was computed is kept, the same command goes on from there"
DAMAGED = 1
SPLITS = {"train": ("train",), "heldout": ("heldout",), "both": ("train", "heldout")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 where ``--verify`` met damage; 2 for bad input; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded_ours(lambda: _run(arguments), STOPPED)


def parser() -> argparse.ArgumentParser:
    """The command's own arguments; keys of the configuration come beside them."""
    made = argparse.ArgumentParser(
        prog=PROG,
        description="Compute the teacher features that runs of a configuration ask for, and keep "
        "them on disk; what is there already is not computed again.",
        epilog="Any key of the configuration is an option too: --teacher.noise fixed, "
        "--cache.folder FOLDER, --cache.precision bf16, --device cuda.",
        allow_abbrev=False,
    )
    made.add_argument("--config", metavar="FILE", help="configuration (default: digits)")
    made.add_argument(
        "--timesteps",
        nargs="+",
        type=int,
        metavar="T",
        help="only these (default: all that the run may choose)",
    )
    made.add_argument(
        "--split",
        choices=tuple(SPLITS),
        default="both",
        help="whose images (default: %(default)s)",
    )
    made.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="of the runs (default: the config's); with teacher.noise_seed all share one cache",
    )
    made.add_argument("--list", metavar="FOLDER", help="say what is kept in FOLDER, and stop")
    made.add_argument(
        "--verify",
        metavar="FOLDER",
        help="read every record in FOLDER, say how many are damaged, and stop",
    )
    made.add_argument(
        "--repair",
        action="store_true",
        help="with --verify: empty what is damaged, so that it is computed again",
    )
    return made


def _run(arguments: list[str]) -> int:
    chosen, others = parser().parse_known_args(arguments)
    if chosen.repair and chosen.verify is None:
        raise ValueError("--repair: given without --verify FOLDER, whose records it repairs")
    if chosen.list is not None or chosen.verify is not None:
        if others:
            raise ValueError(f"{others[0]}: given beside --list or --verify, which take a folder")
        if chosen.list is not None:
            return _list(Path(chosen.list))
        return _verify(Path(chosen.verify), chosen.repair)
    for name in ("timesteps", "seeds"):
        low = [value for value in getattr(chosen, name) or () if value < 0]
        if low:
            raise ValueError(f"--{name}: {low[0]} given; it must be 0 or more")
    return _fill(chosen, key_overrides(others, parser()))


def _fill(chosen: argparse.Namespace, given: dict[str, Any]) -> int:
    config = _config(chosen.config or "digits", given)

    from repfusion_env.feature_cache.filling import fill

    with stop_flag() as stopped:
        found = fill(
            config,
            timesteps=chosen.timesteps or (),
            splits=SPLITS[chosen.split],
            seeds=chosen.seeds or (),
            stopped=stopped,
        )
    for filled in found:
        noise = "" if filled.noise_seed is None else f", noise seed {filled.noise_seed}"
        print(
            f"{filled.split:8}  {filled.features:,} features, {filled.computed:,} computed, "
            f"{filled.features - filled.computed:,} were there{noise}"
        )
        print(f"{'':8}  {filled.folder}, {filled.bytes_on_disk / 2**20:,.1f} MiB")
    if not found[-1].finished:
        print(STOPPED, file=sys.stderr)
        return INTERRUPTED
    return 0


def _config(name: str, given: dict[str, Any]) -> ExperimentConfig:
    """The configuration; here its features are kept on disk, whatever it says itself."""
    return check(merge(merge(read_config_file(name), given), {"cache.store": "disk"}))


def _list(folder: Path) -> int:
    from repfusion_env.feature_cache.checking import caches_in, describe

    for path, manifest in caches_in(folder):
        print("\n".join(describe(path, manifest)))
    return 0


def _verify(folder: Path, repair: bool) -> int:
    from repfusion_env.feature_cache.checking import check as check_caches

    damage = 0
    for checked in check_caches(folder, repair=repair):
        damage += checked.damaged + len(checked.unusable)
        print(f"{checked.folder}: {checked.records:,} records, {checked.damaged:,} damaged")
        for sentence in checked.unusable:
            print(f"  {sentence}")
    if damage and repair:
        print("what was damaged is gone; runs compute it again")
    return DAMAGED if damage else 0


if __name__ == "__main__":
    sys.exit(main())
