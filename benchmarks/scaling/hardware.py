"""What is assumed of an accelerator and of the code that drives it: inputs, not measured here.

Sources of the H100's numbers (SXM, 80 GB): NVIDIA's H100 data sheet for matrix peak without
sparsity, memory and NVLink (900 GB/s both ways together); the DGX H100 data sheet for one 400 Gb/s
port per GPU and 112 cores to 8 GPUs. Latencies of collectives and launches are round figures of
what public NCCL and PyTorch measurements show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its neighbourhood.

    Attributes:
        name: For tables.
        matrix: Dense bf16 peak, FLOP/s.
        bandwidth: Of its memory, bytes/s.
        memory: Bytes.
        link: To its neighbours in the node, bytes/s one way.
        network: To other nodes, bytes/s one way, of each accelerator.
        node: Accelerators in a node.
        hop: Seconds of one hop of a collective inside a node.
        far_hop: The same between nodes.
        launch: Seconds that the host takes to start one kernel.
        kernel: Seconds that the shortest kernel takes, with the gap before the next.
        cores: Host cores per accelerator.
    """

    name: str
    matrix: float
    bandwidth: float
    memory: float
    link: float
    network: float
    node: int
    hop: float
    far_hop: float
    launch: float
    kernel: float
    cores: float


@dataclass(frozen=True)
class Regime:
    """How much of the hardware the code gets.

    Attributes:
        name: For tables.
        matrix: Share of the matrix peak that convolutions and products reach.
        bandwidth: Share of the memory's bandwidth that everything reaches.
        fused: Whether pointwise operations are part of their neighbours (``speed.compile``).
        graphs: Whether a step is launched at once (``speed.cuda_graphs``).
    """

    name: str
    matrix: float
    bandwidth: float
    fused: bool
    graphs: bool


H100 = Hardware(
    name="H100 SXM",
    matrix=989e12,
    bandwidth=3.35e12,
    memory=80e9,
    link=450e9,
    network=50e9,
    node=8,
    hop=3e-6,
    far_hop=10e-6,
    launch=5e-6,
    kernel=2.5e-6,
    cores=14,
)
# The two ends of what is predicted: kernels one by one, and compiled ones replayed as a graph.
EAGER = Regime("eager", matrix=0.30, bandwidth=0.60, fused=False, graphs=False)
COMPILED = Regime("compiled", matrix=0.60, bandwidth=0.85, fused=True, graphs=True)


def all_reduce(size: float, ranks: int, hardware: Hardware) -> float:
    """Seconds until ``size`` bytes are summed over ``ranks``.

    Ring inside the node (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009),
    then over the nodes each accelerator with its own share; a tree instead of the ring where that
    has the shorter way (latencies count for small messages, bandwidth for large ones).
    """
    if ranks == 1:
        return 0.0
    inside = min(ranks, hardware.node)
    nodes = math.ceil(ranks / inside)
    seconds = ring(size, inside, hardware.link, hardware.hop)
    return seconds + ring(size / inside, nodes, hardware.network, hardware.far_hop)


def ring(size: float, ranks: int, bandwidth: float, hop: float) -> float:
    """One level of :func:`all_reduce`: ``2 (W - 1) / W`` of the bytes pass each link."""
    if ranks == 1:
        return 0.0
    steps = min(2 * (ranks - 1), 2 * math.ceil(math.log2(ranks)))
    return 2 * (ranks - 1) / ranks * size / bandwidth + steps * hop
