"""What a teacher offers: ``python -m repfusion_env.teachers.show MODEL``.

Reads configuration files alone, so it is quick however large the model is: family, size of the
images, noise process, and every layer that can be distilled with its map and the parameters that
are loaded for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from repfusion_env.config_loading import ConfigError, load_config, parse_yaml

WIDEST = 1_000  # characters of a line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 2 for a model that cannot be used."""
    arguments = parser().parse_args(argv)
    try:
        show(
            arguments.model,
            family=arguments.family,
            revision=arguments.revision,
            options=parse_yaml(arguments.options),
            matching=arguments.matching,
        )
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="python -m repfusion_env.teachers.show",
        description="Show what a teacher offers: its layers, their maps and what they cost.",
    )
    made.add_argument("model", help="as teacher.model: shipped name, folder, file or hub id")
    made.add_argument("--family", default="auto", help="as teacher.family (default: auto)")
    made.add_argument("--revision", help="as teacher.revision")
    made.add_argument("--options", default="{}", help="as teacher.options, e.g. '{part: decoder}'")
    made.add_argument("--matching", default="", help="only layers whose path holds this text")
    return made


def show(
    model: str,
    *,
    family: str = "auto",
    revision: str | None = None,
    options: object = None,
    matching: str = "",
) -> None:
    """Print what a teacher offers.

    Args:
        model: As ``teacher.model``.
        family: As ``teacher.family``.
        revision: As ``teacher.revision``.
        options: As ``teacher.options``.
        matching: Only layers whose path holds this text are listed.

    Raises:
        ValueError: The model cannot be used, in one sentence.
    """
    settings = {"model": model, "family": family, "revision": revision, "options": options or {}}
    config = load_config("digits", {"teacher": settings}).teacher

    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    from repfusion_env.teachers import describe_teacher
    from repfusion_env.teachers.detect import family_of

    card = describe_teacher(config)
    trace = card.trace
    console = Console(soft_wrap=True)
    wide = console.options.update(max_width=WIDEST)
    side = f"{card.image_size}x{card.image_size}"
    console.print(f"family      {family_of(config)}", highlight=False)
    console.print(f"images      {card.channels}x{side}", highlight=False, end="")
    console.print(", this size alone" if card.fixed_size else "", highlight=False)
    console.print(f"timesteps   0..{card.num_timesteps - 1}", highlight=False)
    if trace is not None:
        console.print(f"parameters  {trace.parameters:,}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    table.add_column("map (F, h, w)", justify="right")
    table.add_column("parameters loaded", justify="right")
    for layer in card.layers_available:
        if matching not in layer:
            continue
        name = f"{layer}  (default)" if layer in card.default_layers else layer
        if trace is None or layer not in trace.shapes:  # a second name of another row
            table.add_row(name, "", "")
            continue
        cost = trace.cost([layer])
        shape = ", ".join(map(str, trace.shapes[layer]))
        table.add_row(name, shape, f"{cost:,} ({cost / max(1, trace.parameters):.0%})")
    # Names and numbers are never cut short; a terminal breaks what is too long for it.
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
