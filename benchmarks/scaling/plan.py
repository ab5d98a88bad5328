"""ImageNet on one GPU and on many: which runs are predicted, and how lanes are given to ranks.

Shape letters: N lanes, W ranks, K timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.scaling.hardware import COMPILED, EAGER, H100, Hardware, Regime
from benchmarks.scaling.model import Setup, Step, most_lanes, step
from benchmarks.scaling.networks import student, teacher

STUDENT = "torchvision/resnet50"
IMAGES = 1_281_167
TIMESTEPS = 20  # of configs/imagenet.yaml
RANKS = (1, 8, 64, 1024)
REGIMES = (EAGER, COMPILED)


@dataclass(frozen=True)
class Plan:
    """What is asked of the machines.

    Attributes:
        decisions: Of one run; 64 million are 50 epochs of ImageNet.
        lanes: Of one rank, where the batch may be large enough.
        largest_batch: Lanes of all ranks that one update still makes good use of; ImageNet's
            ResNet-50 keeps its accuracy up to 8,192 (Goyal et al., 2017).
        price: Dollars of one GPU for one hour.
        decoded: Images/s that one core decodes.
        hardware: Of every rank.
    """

    decisions: float = 64e6
    lanes: int = 256
    largest_batch: int = 8192
    price: float = 2.5
    decoded: float = 500.0
    hardware: Hardware = H100


def setups(plan: Plan) -> dict[str, Setup]:
    """The runs by name: 64x64 images stay on the device, 256x256 ones are streamed."""
    small, large = student(STUDENT, 64), student(STUDENT, 256)
    adm = Setup(teacher("ADM-64"), small)
    stable = Setup(teacher("SD 1.5 at 256"), large, decoded=plan.decoded)
    finer = replace(stable, teacher=teacher("SD 1.5 at 512"))
    return {
        "ADM-64, on line": adm,
        "ADM-64, cache warm": replace(adm, hits=1.0),
        "SD 1.5 at 256, on line": stable,
        "SD 1.5 at 256, latents kept": replace(stable, latents=True),
        "SD 1.5 at 256, cache warm": replace(stable, hits=1.0),
        "SD 1.5 at 512, on line": finer,
        "SD 1.5 at 512, latents kept": replace(finer, latents=True),
    }


def lanes_of_rank(setup: Setup, ranks: int, plan: Plan) -> float:
    """N of one rank: bounded by what is asked for, by the batch and by the memory."""
    return min(plan.lanes, plan.largest_batch / ranks, most_lanes(setup, plan.hardware))


def predict(setup: Setup, ranks: int, regime: Regime, plan: Plan) -> Step:
    """One step of the run on so many ranks."""
    return step(setup, lanes_of_rank(setup, ranks, plan), ranks, plan.hardware, regime)


@dataclass(frozen=True)
class Bill:
    """What a run takes.

    Attributes:
        hours: By the clock.
        gpu_hours: Of all GPUs together.
        dollars: At the plan's price.
    """

    hours: float
    gpu_hours: float
    dollars: float


def bill(rate: float, ranks: int, plan: Plan) -> Bill:
    """Hours and dollars at ``rate`` decisions/s of all ranks."""
    hours = plan.decisions / rate / 3600
    return Bill(hours, hours * ranks, hours * ranks * plan.price)
