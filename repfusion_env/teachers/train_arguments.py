"""The command line of ``repfusion_env.teachers.train``."""

from __future__ import annotations

import argparse
import re
from typing import Any

from repfusion_env.registry import DATASETS


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m repfusion_env.teachers.train",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def at_least(low: float, kind: type = int, below: float = float("inf")) -> Any:
        limit = f" and below {below}" if below < float("inf") else ""

        def number(text: str) -> float:
            value = kind(text)
            if not low <= value < below:
                raise argparse.ArgumentTypeError(f"{text} given; it must be {low} or more{limit}")
            return value

        return number

    def device(text: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
            raise argparse.ArgumentTypeError(
                f"'{text}' given; allowed: auto, cpu, cuda, cuda:<index>"
            )
        return text

    data = made.add_argument_group("data")
    data.add_argument("--data.name", default="digits", help=f"one of {', '.join(DATASETS)}")
    data.add_argument("--data.path", help="folder or .npz bank of the data set")
    data.add_argument("--data.image_size", type=at_least(1), help="resize to this side in pixels")
    data.add_argument("--data.train_limit", type=at_least(1), help="use only the first so many")
    data.add_argument("--data.heldout_limit", type=at_least(1), help="use only the first so many")
    data.add_argument("--data.download", action="store_true", help="let torchvision download")
    data.add_argument("--flip", action="store_true", help="mirror half of the images")

    network = made.add_argument_group("network")
    network.add_argument(
        "--widths", type=at_least(1), nargs="+", default=[32, 64, 64], help="channels by level"
    )
    network.add_argument("--layers-per-block", type=at_least(1), default=1, help="per level")
    network.add_argument(
        "--attention-levels", type=at_least(0), nargs="*", default=[2], help="0 is the finest"
    )
    network.add_argument("--norm-groups", type=at_least(1), default=8, help="of the group norm")
    network.add_argument("--attention-head-dim", type=at_least(1), help="none: one head")
    network.add_argument("--timesteps", type=at_least(1), default=1000, help="of the scheduler")

    training = made.add_argument_group("training")
    training.add_argument("--steps", type=at_least(1), default=8000, help="optimizer steps")
    training.add_argument("--batch-size", type=at_least(1), default=64, help="images per step")
    training.add_argument("--learning-rate", type=at_least(0, float), default=2e-3, help="peak")
    training.add_argument("--warmup", type=at_least(0), default=200, help="steps to the peak")
    training.add_argument("--weight-decay", type=at_least(0, float), default=1e-4, help="AdamW's")
    training.add_argument("--ema", type=at_least(0, float, 1), default=0.999, help="decay")
    training.add_argument("--seed", type=at_least(0), default=0, help="of weights, order, noise")
    training.add_argument(
        "--device", type=device, default="auto", help="auto, cpu, cuda, cuda:<index>"
    )

    files = made.add_argument_group("files")
    files.add_argument("--out", required=True, help="folder to write")
    files.add_argument("--dtype", choices=("fp16", "fp32"), default="fp32", help="saved weights")
    files.add_argument("--checkpoint-every", type=at_least(0), default=500, help="steps; 0: at end")
    files.add_argument("--keep-checkpoints", type=at_least(1), default=2, help="newest kept")
    files.add_argument("--sample-every", type=at_least(0), default=1000, help="steps; 0: at end")
    files.add_argument("--resume", action="store_true", help="go on where --out stopped")
    return made
