"""A small history of speed, so that a change that slows a step down shows.

    python -m benchmarks.throughput --only steps,costs --json now.json
    python -m benchmarks.history now.json             # compare, then keep it
    python -m benchmarks.history now.json --dry-run   # compare alone

Kept are one small file per run, in ``benchmarks/history/``: machine, date and medians. A run is
compared with the last one of the same kind of machine (processor or GPU, cores, threads) and size:
each line's ratio to the published step, whose code does not change, so that a slower machine is not
taken for a slower step. Exit code 1 where a line has become more than 10 % slower, or an overhead
over the trainer has grown by more than a tenth of the trainer's time; such a run is kept as well.

A file of the history::

    {"format": 1, "machine": {...}, "size": {...}, "lines": {name: decisions/s},
     "ratios": {setting: times the published step}, "costs": {"environment, setting": share}}
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repfusion_env.atomic import write_text

FOLDER = Path(__file__).parent / "history"
FORMAT = 1
TOLERANCE = 0.10
REFERENCE = "published step"
KIND = ("cpu", "gpu", "cores", "threads")  # of the machine


def entry(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a result of :mod:`benchmarks.throughput`.

    Raises:
        ValueError: It is no such result, of another format, a smoke run, or without its part
            ``steps``.
    """
    if result.get("format") != FORMAT or "parts" not in result:
        raise ValueError(
            f"a result of benchmarks.throughput in format {FORMAT} is needed; this one has the "
            f"format {result.get('format')!r}"
        )
    if result["smoke"]:
        raise ValueError("a smoke run's figures mean nothing; leave out --smoke")
    steps = result["parts"].get("steps")
    if steps is None:
        raise ValueError("the part 'steps' is missing; run benchmarks.throughput with it")
    costs = result["parts"].get("costs", {"settings": {}})["settings"]
    return {
        "format": FORMAT,
        "machine": result["machine"],
        "size": steps["size"],
        "lines": {
            name: line["decisions_per_second"]["median"] for name, line in steps["lines"].items()
        },
        "ratios": {name: found[REFERENCE]["median"] for name, found in steps["ratios"].items()},
        "costs": {
            f"{line}, {name}": found[line]["median"]
            for name, found in costs.items()
            for line in ("environment", "adapter")
        },
    }


def comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries are of one kind of machine and of one size."""
    machines = one["machine"], other["machine"]
    return one["size"] == other["size"] and all(
        machines[0].get(key) == machines[1].get(key) for key in KIND
    )


def last_like(new: Mapping[str, Any], folder: Path = FOLDER) -> dict[str, Any] | None:
    """The youngest entry that ``new`` may be compared with, or None.

    Raises:
        ValueError: A file in ``folder`` cannot be read.
    """
    found = []
    for file in folder.glob("*.json"):
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
            if old["format"] == FORMAT and comparable(new, old):
                found.append((old["machine"]["date"], file.name, old))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: this is no entry of the history ({error})") from error
    return max(found)[-1] if found else None


def changes(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By line that both have, what became of it.

    Returns:
        ``name``, ``old``, ``new``, and ``slower``: by what part of the old speed it has become
        slower; for overheads, by what part of the trainer's time they have grown.
    """
    rows = []
    for name, before in old["ratios"].items():
        after = new["ratios"].get(name)
        if after is not None:
            rows.append({"name": name, "old": before, "new": after, "slower": 1 - after / before})
    for name, before in old["costs"].items():
        after = new["costs"].get(name)
        if after is not None:
            rows.append({"name": name, "old": before, "new": after, "slower": after - before})
    return rows


def keep(new: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Write the entry into ``folder`` under its date; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^0-9]+", "-", new["machine"]["date"]).strip("-")
    kind = re.sub(r"\W+", "-", new["machine"]["gpu"] or new["machine"]["cpu"]).strip("-").lower()
    file = folder / f"{stem}-{kind}.json"
    write_text(file, json.dumps(new, indent=1) + "\n")
    return file


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The result of :func:`changes` in Markdown."""
    lines = ["| times the published step, or share of the trainer | last | now | slower |"]
    lines.append("| --- " * 4 + "|")
    for row in rows:
        mark = " **" if row["slower"] > TOLERANCE else ""
        lines.append(
            f"| {row['name']} | {row['old']:.3f} | {row['new']:.3f} |"
            f"{mark or ' '}{row['slower']:+.1%}{mark.strip()} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.history", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("file", type=Path, help="what benchmarks.throughput --json wrote")
    parser.add_argument("--dry-run", action="store_true", help="do not keep it")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="of the history (default: benchmarks/history)"
    )
    chosen = parser.parse_args(argv)
    try:
        new = entry(json.loads(chosen.file.read_text(encoding="utf-8")))
        old = last_like(new, chosen.folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows = [] if old is None else changes(new, old)
    if old is None:
        print("nothing to compare with: the first run of this kind of machine and size")
    else:
        print(f"against the run of {old['machine']['date']}\n")
        print(table(rows))
    if not chosen.dry_run:
        print(f"\nkept as {keep(new, chosen.folder)}")
    slow = [row for row in rows if row["slower"] > TOLERANCE]
    for row in slow:
        print(f"slower by more than {TOLERANCE:.0%}: {row['name']}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
