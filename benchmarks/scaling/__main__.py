"""Predict runs on accelerators that are not at hand, by a model that is checked here.

    python -m benchmarks.scaling                                 # the predictions alone
    python -m benchmarks.scaling THROUGHPUT.json TEACHERS.json COLLECTIVES.json
    python -m benchmarks.scaling FILE... --docs docs/scaling.md --figure docs/images/scaling.png

The files are those that ``--json`` of ``python -m benchmarks.throughput``, ``benchmarks.teachers``
and ``benchmarks.scaling.collectives`` writes; the model's constants are fitted to them and its
errors shown. What is predicted follows from counted work and from the inputs of
:mod:`benchmarks.scaling.hardware`, not from these constants.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.scaling import tables
from benchmarks.scaling.measured import Measured, read
from benchmarks.scaling.plan import Plan
from repfusion_env.atomic import write_text


def blocks(plan: Plan, measured: Measured) -> dict[str, str]:
    """The tables by the name of their block; those without measurements are left out."""
    found = {
        "work": tables.work_table(),
        "inputs": tables.inputs_table(plan),
        "rates": tables.rates_table(plan),
        "bounds": tables.bounds_table(plan),
        "wide": tables.wide_table(plan),
        "cache": tables.cache_table(plan),
    }
    if measured.fits:
        found["fit"] = tables.fit_table(measured.fits)
        found["gpu"] = tables.gpu_table(measured.fits, plan.hardware)
    if measured.ring is not None and measured.shared is not None:
        found["ring"] = tables.ring_table(measured.ring, measured.shared)
    if measured.ranks:
        found["ranks"] = tables.ranks_table(measured.ranks)
    return found


def fill(text: str, found: Mapping[str, str]) -> str:
    """Put each block between ``<!-- name -->`` and ``<!-- /name -->`` of ``text``.

    Raises:
        ValueError: There is no place for one of them.
    """
    for name, block in found.items():
        place = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
        if place is None:
            raise ValueError(f"there is no place '<!-- {name} -->' ... '<!-- /{name} -->'")
        text = f"{text[: place.start(1)]}{block}\n{text[place.end(1) :]}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    default = Plan()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="measurements (JSON)")
    parser.add_argument("--price", type=float, help=f"dollars an hour ({default.price})")
    parser.add_argument("--decisions", type=float, help=f"of a run ({default.decisions:.0f})")
    parser.add_argument("--lanes", type=int, help=f"most on one GPU ({default.lanes})")
    parser.add_argument("--largest-batch", type=int, help=f"on all ({default.largest_batch})")
    parser.add_argument(
        "--decoded",
        type=float,
        help=f"images/s that a core decodes (from the files, else {default.decoded})",
    )
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the tables into this page")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the figure")
    chosen = parser.parse_args(argv)
    names = ("price", "decisions", "lanes", "largest_batch", "decoded")
    given = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    for name, value in given.items():
        if not value > 0:
            parser.error(f"--{name.replace('_', '-')}: {value} given; it must be above 0")
    try:
        measured = read(chosen.files)
        if measured.decoded is not None:
            given = {"decoded": measured.decoded, **given}
        plan = replace(default, **given)
        found = blocks(plan, measured)
        if chosen.docs is not None:
            write_text(chosen.docs, fill(chosen.docs.read_text(encoding="utf-8"), found))
        else:
            print("\n\n".join(found.values()))
    except OSError as error:
        parser.error(f"--docs: '{chosen.docs}' cannot be read or written: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    if chosen.figure is not None:
        from benchmarks.scaling.figure import figure
        from repfusion_env.figures import save_figure

        save_figure(figure(plan, [fit for _, fit in measured.fits]), chosen.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
