"""What the commands that measure over seeds take alike."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Add ``--seeds`` and ``--json``."""
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (default: 5)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything here")


def check_seeds(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    """End the command where these, or ``--jobs`` and ``--steps``, cannot be."""
    if chosen.seeds < 2:
        parser.error(f"--seeds: {chosen.seeds} given; an interval needs 2 or more")
    for key in ("steps", "jobs"):
        if getattr(chosen, key, 1) < 1:
            parser.error(f"--{key}: {getattr(chosen, key)} given; it must be 1 or more")
    if chosen.json is not None and not chosen.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder '{chosen.json.parent}'")
