"""Few-shot segmentation on teacher features: ``python -m repfusion_env.tasks.pixel_probe``.

A small classifier for each pixel, on a teacher's features at several timesteps and layers, learned
from a few labelled images. See ``docs/pixel_probe.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from repfusion_env.command_line import Parser, guarded_ours, number
from repfusion_env.config_loading import check, merge, read_config_file
from repfusion_env.config_options import key_overrides
from repfusion_env.tasks.pixel_probing.settings import PixelProbeSettings

PROG = "python -m repfusion_env.tasks.pixel_probe"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 2 for bad input and 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded_ours(
        lambda: _run(arguments),
        "stopped; classifiers that are trained are kept, the same command goes on from there",
    )


def parser() -> Parser:
    """The command's own arguments; keys of the configuration come beside them."""
    made = Parser(
        PROG,
        "[options] [--key value ...]",
        "Segment images by an ensemble of pixel classifiers on a teacher's features, trained on a "
        "few labelled images. Any key of the configuration is an option too: --teacher.model "
        "FOLDER, --data.path FILE, --device cuda.",
    )
    standard = PixelProbeSettings()
    option = made.add_argument
    option("--config", default="digits_segmentation", metavar="FILE", help="default: %(default)s")
    option("--out", metavar="FOLDER", help="default: pixel-probe-<configuration>")
    option(
        "--timesteps",
        nargs="+",
        type=number(int, 0),
        default=list(standard.timesteps),
        metavar="T",
        help="timesteps at which the teacher is read (default: 50 150 250)",
    )
    option(
        "--layers",
        nargs="+",
        default=[],
        metavar="LAYER",
        help="module paths of the teacher (default: up to five blocks of its later half)",
    )
    for name, least, text in (
        ("images", 1, "labelled training images"),
        ("members", 1, "classifiers that vote"),
        ("repeats", 1, "draws of the labelled images, each with its own ensemble"),
    ):
        option(
            f"--{name}",
            type=number(int, least),
            default=getattr(standard, name),
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    option(
        "--heldout",
        type=number(int, 1),
        metavar="N",
        help="held-out images, the first so many (default: evaluation.images, or all)",
    )
    option(
        "--seed",
        type=number(int, 0),
        metavar="N",
        help="of the first draw, its classifiers and the noise (default: the configuration's)",
    )
    return made


def _run(arguments: list[str]) -> int:
    chosen, others = parser().parse_known_args(arguments)
    config = check(merge(read_config_file(chosen.config), key_overrides(others, parser())))
    settings = PixelProbeSettings(
        timesteps=tuple(chosen.timesteps),
        layers=tuple(chosen.layers),
        images=chosen.images,
        heldout=chosen.heldout,
        members=chosen.members,
        repeats=chosen.repeats,
        seed=config.seed if chosen.seed is None else chosen.seed,
    )
    folder = Path(chosen.out or f"pixel-probe-{Path(chosen.config).stem}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: '{folder}' is a file; a folder is needed")

    from repfusion_env.tasks.pixel_probing import measure
    from repfusion_env.tasks.pixel_probing.report import print_table, write_report

    found = measure(config, settings, folder=folder, pictures=True)
    told = {"config": chosen.config, "data": config.data.name, "teacher": config.teacher.model}
    files = write_report(found, told, folder)
    print_table(found)
    print(f"wrote {' and '.join(map(str, files))}, {found.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
