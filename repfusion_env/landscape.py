"""What a teacher offers by layer and timestep: ``python -m repfusion_env.landscape``.

Measures, before anything is trained, where a teacher's features are worth distilling and whether
choosing the timestep for each image can pay at all. See ``docs/landscape.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repfusion_env.command_line import guarded_ours
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import check, merge, read_config_file
from repfusion_env.config_options import key_overrides
from repfusion_env.landscapes.settings import LandscapeSettings
from repfusion_env.registry import did_you_mean
from repfusion_env.stage2.settings import ANNOTATIONS

PROG = "python -m repfusion_env.landscape"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 2 for bad input and 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded_ours(
        lambda: _run(arguments),
        "stopped; what was measured is kept, the same command goes on from there",
    )


def parser() -> argparse.ArgumentParser:
    """The command's own arguments; keys of the configuration come beside them."""
    made = argparse.ArgumentParser(
        prog=PROG,
        description="Measure probe accuracy, reward, representation and the worth of choosing the "
        "timestep per image, over a teacher's layers and the timestep grid.",
        epilog="Any key of the configuration is an option too: --teacher.model FOLDER, "
        "--timesteps.count 12, --data.train_limit 500, --device cuda.",
        allow_abbrev=False,
    )
    defaults = LandscapeSettings()
    made.add_argument("--config", metavar="FILE", help="configuration (default: digits)")
    made.add_argument(
        "--run",
        metavar="RUN_DIR",
        help="a finished run: its configuration, and its trained student's reward",
    )
    made.add_argument("--out", metavar="FOLDER", help="default: landscape-<configuration>")
    made.add_argument(
        "--layers", nargs="+", metavar="LAYER", default=[], help="default: a spread over the depth"
    )
    made.add_argument(
        "--images",
        type=int,
        default=defaults.images,
        help="most training and most held-out images (default: %(default)s)",
    )
    made.add_argument(
        "--labels", type=int, default=None, help="training labels of the heads (default: all)"
    )
    made.add_argument(
        "--draws",
        type=int,
        default=defaults.draws,
        help="noise draws of each (image, timestep) (default: %(default)s)",
    )
    made.add_argument(
        "--seed", type=int, help="of the experiment, folds and bootstrap (default: the config's)"
    )
    return made


def _run(arguments: list[str]) -> int:
    chosen, others = parser().parse_known_args(arguments)
    given = key_overrides(others, parser())
    if chosen.seed is not None:
        given["seed"] = chosen.seed
    config, name = _config(chosen, given)
    if config.task in ANNOTATIONS:
        raise ValueError(
            f"task: '{config.task}' given, but a landscape tells classes of whole images apart; "
            "give --task classification where the images have labels, or compare fixed timesteps "
            "by python -m agents.compare --arms fixed"
        )
    settings = LandscapeSettings(
        layers=tuple(chosen.layers),
        images=chosen.images,
        labels=chosen.labels,
        draws=chosen.draws,
        seed=config.seed,
    )
    folder = Path(chosen.out or f"landscape-{name}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: '{folder}' is a file; a folder is needed")

    from repfusion_env.landscapes import measure
    from repfusion_env.landscapes.report import write_report
    from repfusion_env.landscapes.verdict import verdict

    found = measure(config, settings, run=chosen.run, folder=folder)
    files = write_report(found, folder)
    layer, place = divmod(int(found.accuracy.argmax()), len(found.timesteps))
    print(
        f"linear probe  {100 * found.accuracy.max():.1f} % at best: {found.layers[layer]}, "
        f"t = {found.timesteps[place]}"
    )
    print(f"reward        {found.reward_kind} of {found.reward_rows[found.main]}")
    print(f"verdict       {verdict(found)}")
    print(f"written       {files[0]} and {len(files) - 1} files beside it, {found.seconds:.0f} s")
    return 0


def _config(chosen: argparse.Namespace, given: dict[str, Any]) -> tuple[ExperimentConfig, str]:
    """The configuration and what the folder is named after."""
    if chosen.run is None:
        name = chosen.config or "digits"
        return check(merge(read_config_file(name), given)), Path(name).stem
    if chosen.config is not None:
        raise ValueError("--config: given beside --run, whose own configuration is used; leave one")
    run = Path(chosen.run)
    if not run.is_dir():
        siblings = run.parent.iterdir() if run.parent.is_dir() else ()
        close = did_you_mean(run.name, [path.name for path in siblings if path.is_dir()])
        raise ValueError(f"--run: there is no run folder '{run}'.{close}")
    for name in ("config.yaml", "student.safetensors"):
        if not (run / name).is_file():
            raise ValueError(f"--run: '{run}' is no finished run: it has no {name}")
    return check(merge(read_config_file(run / "config.yaml"), given)), run.resolve().name


if __name__ == "__main__":
    sys.exit(main())
