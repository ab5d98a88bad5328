"""Seconds of a step on hardware that is not at hand, and what bounds them.

A kernel takes the longer of its arithmetic and its traffic (Williams et al., "Roofline", 2009);
a step the longer of its kernels and of their launches, then the collectives, which wait for them;
and no step is shorter than decoding its images.

Shape letters: N lanes, W ranks, M images, K timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.scaling.hardware import Hardware, Regime, all_reduce
from benchmarks.scaling.networks import Student, Teacher
from benchmarks.scaling.work import Work
from repfusion_env.feature_cache.records import record_type

GRADIENT_BYTES = 4
# AdamW reads gradient, parameter and two moments and writes three of them; the average of the
# weights reads two and writes one.
OPTIMIZER_BYTES = (4 + 3) * 4 + 3 * 4
GRAPH_LAUNCHES = 4  # teacher, student, optimizer, reward
# Of a REINFORCE step besides the networks: observation, policy, its update, metrics.
OTHER_LAUNCHES = 250
# Baseline, normalisation of advantages, and the policy's gradient.
POLICY_COLLECTIVES = 3


@dataclass(frozen=True)
class Rates:
    """What kernels reach.

    Attributes:
        convolution: FLOP/s of convolutions.
        product: FLOP/s of matrix products and attention.
        traffic: Bytes/s of the kernels without either.
        bandwidth: Bytes/s that bound a convolution or a product of little arithmetic.
        least: Seconds that any kernel takes.
        width: Bytes of a number.
        fused: Whether pointwise operations are part of their neighbours.
    """

    convolution: float
    product: float
    traffic: float
    bandwidth: float = math.inf
    least: float = 0.0
    width: float = 2.0
    fused: bool = False


def rates_of(hardware: Hardware, regime: Regime) -> Rates:
    """What is assumed of an accelerator, in bf16."""
    matrix, bandwidth = regime.matrix * hardware.matrix, regime.bandwidth * hardware.bandwidth
    return Rates(matrix, matrix, bandwidth, bandwidth, hardware.kernel, fused=regime.fused)


@dataclass(frozen=True)
class Setup:
    """One run's shape.

    Attributes:
        teacher: Whose features are distilled.
        student: Into which network.
        hits: Share of the lanes whose feature comes from the cache.
        latents: Whether images come encoded, so that the VAE is not run.
        decoded: Images/s that one core decodes; None for a bank that is resident.
    """

    teacher: Teacher
    student: Student
    hits: float = 0.0
    latents: bool = False
    decoded: float | None = None


@dataclass(frozen=True)
class Step:
    """One step of one rank, in seconds by part.

    Attributes:
        lanes: Of this rank.
        ranks: W.
        kernels: Seconds of each part's kernels.
        launches: Seconds that the host takes to start them.
        collectives: Seconds of each part's collectives.
        decoding: Seconds of decoding a step's images on all of the rank's cores.
        flops: Of all kernels.
    """

    lanes: float
    ranks: int
    kernels: dict[str, float]
    launches: float
    collectives: dict[str, float]
    decoding: float
    flops: float

    @property
    def busy(self) -> float:
        """Seconds without collectives and decoding."""
        return max(sum(self.kernels.values()), self.launches)

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return max(self.busy + sum(self.collectives.values()), self.decoding)

    @property
    def rate(self) -> float:
        """Decisions/s of all ranks."""
        return self.lanes * self.ranks / self.seconds

    def utilization(self, hardware: Hardware) -> float:
        """Share of the matrix peak that the whole step makes use of."""
        return self.flops / self.seconds / hardware.matrix

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        if self.decoding >= self.seconds:
            return "decoding"
        kernels = sum(self.kernels.values())
        waiting = max(self.collectives.values(), default=0.0)
        if waiting > self.busy:
            return max(self.collectives, key=lambda name: self.collectives[name])
        if self.launches > kernels:
            return "launches"
        return max(self.kernels, key=lambda name: self.kernels[name])


def kernel_seconds(work: Work, images: float, rates: Rates) -> float:
    """Seconds of a network's kernels for a batch."""
    seconds = 0.0
    for operation in work.operations:
        moved = rates.width * (images * operation.elements + operation.fixed)
        if operation.flops:
            rate = rates.convolution if operation.convolution else rates.product
            arithmetic = images * operation.flops / rate
            seconds += max(arithmetic, moved / rates.bandwidth, rates.least)
        elif not (operation.pointwise and rates.fused):
            seconds += max(moved / rates.traffic, rates.least)
    return seconds


def step(setup: Setup, lanes: float, ranks: int, hardware: Hardware, regime: Regime) -> Step:
    """Predict one step with the default reward.

    Args:
        setup: What is run.
        lanes: N of each rank.
        ranks: W.
        hardware: On what.
        regime: How well.
    """
    read = lanes * (1 - setup.hits)
    rates = rates_of(hardware, regime)
    encoder = Work(()) if setup.latents else setup.teacher.encoder
    student = setup.student
    parts = {
        "VAE encoder": (encoder, read),
        "teacher": (setup.teacher.cut, read),
        "student": (student.training, lanes),
        "reward": (student.inference, lanes),
    }
    kernels = {
        name: kernel_seconds(work, images, rates)
        for name, (work, images) in parts.items()
        if images and work.operations
    }
    kernels["optimizer"] = OPTIMIZER_BYTES * student.parameters / rates.traffic
    launches = float(GRAPH_LAUNCHES)
    if not regime.graphs:
        launches = OTHER_LAUNCHES + sum(len(parts[name][0].operations) for name in parts)
        if not read:
            launches -= len(encoder.operations) + len(setup.teacher.cut.operations)
    collectives = {}
    if ranks > 1:
        # A norm over the ranks is no part of a graph: the graph around it, and its exchange.
        launches += 2 * 2 * student.norms
        small = all_reduce(4096, ranks, hardware)
        gradients = all_reduce(GRADIENT_BYTES * student.parameters, ranks, hardware)
        collectives = {
            "all-reduce of gradients": gradients,
            # One in the forward, one in the backward, each waiting for the last.
            "batch norm over ranks": 2 * student.norms * small,
            "policy's collectives": POLICY_COLLECTIVES * small,
        }
    decoding = 0.0 if setup.decoded is None else lanes / (setup.decoded * hardware.cores)
    flops = sum(images * work.flops for work, images in parts.values())
    return Step(lanes, ranks, kernels, launches * hardware.launch, collectives, decoding, flops)


def most_lanes(setup: Setup, hardware: Hardware, piece: int = 32) -> int:
    """Lanes that fit in the memory: the student's activations for the backward above all.

    Args:
        setup: What is run.
        hardware: On what.
        piece: ``teacher.batch_size``: images of which the teacher's activations are there at once.
    """
    teacher, student = setup.teacher, setup.student
    largest = max(
        (o.elements for o in (*teacher.cut.operations, *teacher.encoder.operations)), default=0.0
    )
    weights = 2 * teacher.parameters + 20 * student.parameters
    # An operation's inputs and outputs twice: what it works on, and what waits for a skip.
    held = weights + 2 * 2 * piece * largest
    # Autocast keeps some in fp32: three bytes of a number on average.
    return max(0, int((0.9 * hardware.memory - held) / (3 * student.training.kept)))


def hit_rate(decisions: float, pairs: float) -> float:
    """Expected share of decisions whose feature is in an initially empty, unbounded cache.

    A policy that draws evenly from ``pairs`` = M x K (image, timestep) pairs has seen
    ``pairs (1 - (1 - 1 / pairs) ** decisions)`` different ones. A policy that has settled hits
    more often.
    """
    different = -pairs * math.expm1(decisions * math.log1p(-1 / pairs)) if pairs > 1 else 1.0
    return max(0.0, 1 - different / decisions)


def cache_bytes(
    images: float, timesteps: float, shape: tuple[int, int, int], *, pooled: bool, width: int = 2
) -> float:
    """Bytes of a complete cache.

    Args:
        images: M, twice as many with mirrored ones.
        timesteps: K.
        shape: (F, h, w) of the layer.
        pooled: Whether (F,) is kept.
        width: Bytes of a number: ``cache.precision``.
    """
    numbers = shape[0] if pooled else math.prod(shape)
    return images * timesteps * record_type(numbers * width).itemsize
