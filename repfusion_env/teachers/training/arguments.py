"""The command line of ``repfusion_env.teachers.train``."""

from __future__ import annotations

import argparse

from repfusion_env.command_line import device, number
from repfusion_env.registry import DATASETS

DESCRIPTION = """\
Train a small DDPM on any image bank, as a teacher. It predicts the noise with DDPM's linear
schedule, keeps an average of the weights, and leaves a folder in diffusers' layout that
teacher.model takes. A stopped or killed run goes on exactly with --resume.
"""


def parser() -> argparse.ArgumentParser:
    """The parser; option names become the keys of ``vars(parser().parse_args())``."""
    made = argparse.ArgumentParser(
        prog="python -m repfusion_env.teachers.train",
        usage="%(prog)s --out FOLDER [options]",
        description=DESCRIPTION,
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(
            prog, max_help_position=34, width=100
        ),
    )
    count, index = number(int, 1), number(int, 0)
    rate, decay = number(float, 0), number(float, 0, below=1)

    data = made.add_argument_group("data")
    option = data.add_argument
    option("--data.name", default="digits", metavar="NAME", help=f"one of {', '.join(DATASETS)}")
    option("--data.path", metavar="PATH", help="folder or .npz bank of the data set")
    option("--data.image_size", type=count, metavar="N", help="resize to this side in pixels")
    option("--data.train_limit", type=count, metavar="N", help="training images used at most")
    option("--data.heldout_limit", type=count, metavar="N", help="held-out images used at most")
    option("--data.download", action="store_true", help="let torchvision download CIFAR-10")
    option("--flip", action="store_true", help="mirror half of the images")

    option = made.add_argument_group("network").add_argument
    option(
        "--widths",
        type=count,
        nargs="+",
        default=[32, 64, 64],
        metavar="N",
        help="channels by level, the finest first; each level halves the side",
    )
    option("--layers-per-block", type=count, default=1, metavar="N", help="per level")
    option(
        "--attention-levels",
        type=index,
        nargs="*",
        default=[2],
        metavar="N",
        help="levels with self-attention; 0 is the finest",
    )
    option("--norm-groups", type=count, default=8, metavar="N", help="of the group norm")
    option(
        "--attention-head-dim", type=count, metavar="N", help="channels per head; None: one head"
    )
    option("--timesteps", type=count, default=1000, metavar="N", help="of the noise scheduler")

    option = made.add_argument_group("training").add_argument
    option("--steps", type=count, default=6000, metavar="N", help="optimizer steps")
    option("--batch-size", type=count, default=64, metavar="N", help="images per step")
    option("--learning-rate", type=rate, default=2e-3, metavar="X", help="peak; cosine after it")
    option("--warmup", type=index, default=200, metavar="N", help="steps up to the peak")
    option("--weight-decay", type=rate, default=1e-4, metavar="X", help="of AdamW")
    option("--ema", type=decay, default=0.999, metavar="X", help="decay of the averaged weights")
    option("--seed", type=index, default=0, metavar="N", help="of weights, image order and noise")
    option(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the arithmetic; the weights are trained in fp32 either way",
    )
    option(
        "--device", type=device, default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:INDEX"
    )

    option = made.add_argument_group("files").add_argument
    option("--out", required=True, metavar="FOLDER", help="folder to write")
    option("--dtype", choices=("fp16", "fp32"), default="fp32", help="of the saved weights")
    option("--checkpoint-every", type=index, default=500, metavar="N", help="steps; 0: at the end")
    option("--keep-checkpoints", type=count, default=2, metavar="N", help="newest checkpoints kept")
    option(
        "--sample-every",
        type=index,
        default=1000,
        metavar="N",
        help="steps between sample grids and held-out losses; 0: at the end",
    )
    option("--resume", action="store_true", help="go on where the run in --out stopped")
    return made
