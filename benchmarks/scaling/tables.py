"""The tables of ``docs/scaling.md``, each a block that the command can write anew.

Shape letters: N lanes, W ranks, K timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scaling.checks import RanksCheck, RingFit
from benchmarks.scaling.fit import Fit
from benchmarks.scaling.hardware import COMPILED, Hardware
from benchmarks.scaling.model import Setup, cache_bytes, hit_rate, rates_of, step
from benchmarks.scaling.networks import TEACHERS, student, teacher
from benchmarks.scaling.plan import (
    IMAGES,
    RANKS,
    REGIMES,
    STUDENT,
    TIMESTEPS,
    Plan,
    bill,
    lanes_of_rank,
    predict,
    setups,
)
from benchmarks.timing import machine_lines

STUDENTS = (("resnet18", 32), (STUDENT, 64), (STUDENT, 256))
EPOCHS = (1, 10, 50, 200)


def work_table() -> str:
    """What each network does for one image."""
    rows = [
        "| teacher | layer's map | parameters, cut of all | forward to the layer, GFLOP | whole | "
        "VAE encoder | numbers moved by the cut, M (fused) |",
        "| --- " * 7 + "|",
    ]
    for name in TEACHERS:
        found = teacher(name)
        used = found.parameters / 1e6
        encoder = f"{found.encoder.flops / 1e9:.1f}" if found.encoder.operations else ""
        rows.append(
            f"| {name} | {'x'.join(map(str, found.shape))} | {used:.1f} of "
            f"{found.parameters_all / 1e6:.1f} M{' with the encoder' if encoder else ''} | "
            f"{found.cut.flops / 1e9:.1f} | {found.whole.flops / 1e9:.1f} | {encoder} | "
            f"{found.cut.elements / 1e6:.0f} ({found.cut.fused_elements / 1e6:.0f}) |"
        )
    rows += [
        "",
        "| student | parameters | forward, GFLOP | forward and backward | numbers moved, M (fused) "
        "| kept for the backward, M | batch norms |",
        "| --- " * 7 + "|",
    ]
    for name, side in STUDENTS:
        of = student(name, side)
        rows.append(
            f"| {name} at {side}x{side} | {of.parameters / 1e6:.1f} M | "
            f"{of.inference.flops / 1e9:.2f} | {of.training.flops / 1e9:.2f} | "
            f"{of.training.elements / 1e6:.1f} ({of.training.fused_elements / 1e6:.1f}) | "
            f"{of.training.kept / 1e6:.1f} | {of.norms} |"
        )
    return "\n".join(rows)


def inputs_table(plan: Plan) -> str:
    """What is assumed of the machines."""
    h = plan.hardware
    rows = [
        "| input | value |",
        "| --- | --- |",
        f"| {h.name}: dense bf16 peak | {h.matrix / 1e12:.0f} TFLOP/s |",
        f"| memory | {h.memory / 1e9:.0f} GB at {h.bandwidth / 1e12:.2f} TB/s |",
        f"| to the {h.node - 1} others of the node, one way | {h.link / 1e9:.0f} GB/s, "
        f"{h.hop * 1e6:.0f} µs a hop |",
        f"| to other nodes, of each GPU, one way | {h.network / 1e9:.0f} GB/s, "
        f"{h.far_hop * 1e6:.0f} µs a hop |",
        f"| launch of a kernel by the host; shortest kernel | {h.launch * 1e6:.1f} µs; "
        f"{h.kernel * 1e6:.1f} µs |",
        f"| cores of a GPU's share of the host | {h.cores:.0f}, each decoding "
        f"{plan.decoded:.0f} images/s |",
        f"| GPU-hour | ${plan.price:.2f} |",
        f"| run | {plan.decisions / 1e6:.0f} M decisions; {plan.lanes} lanes on each GPU, at most "
        f"{plan.largest_batch:,} on all |",
    ]
    for regime in REGIMES:
        rows.append(
            f"| *{regime.name}* | products at {regime.matrix:.0%} of the peak, traffic at "
            f"{regime.bandwidth:.0%} of the bandwidth, pointwise kernels "
            f"{'fused' if regime.fused else 'on their own'}, "
            f"{'one launch a graph' if regime.graphs else 'every kernel launched'} |"
        )
    return "\n".join(rows)


def rates_table(plan: Plan) -> str:
    """Decisions/s, hours and dollars by number of GPUs; each cell from eager to compiled."""
    heads = " | ".join(f"{ranks:,} GPU{'s' * (ranks > 1)}" for ranks in RANKS)
    rule = "| --- " * (len(RANKS) + 1) + "|"
    rows = [f"| predicted decisions/s | {heads} |", rule]
    bills = [f"| time by the clock; dollars | {heads} |", rule]
    used = [f"| share of the bf16 peak in use | {heads} |", rule]
    for name, setup in setups(plan).items():
        steps = [[predict(setup, ranks, regime, plan) for regime in REGIMES] for ranks in RANKS]
        cells = [_ends([s.rate for s in pair], _count) for pair in steps]
        shares = [_ends([s.utilization(plan.hardware) for s in pair], _percent) for pair in steps]
        costs = []
        for ranks, pair in zip(RANKS, steps, strict=True):
            found = [bill(s.rate, ranks, plan) for s in pair]
            hours = _time([b.hours for b in found])
            costs.append(f"{hours}; ${_ends([b.dollars for b in found], _count)}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
        bills.append(f"| {name} | {' | '.join(costs)} |")
        used.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join([*rows, "", *bills, "", *used])


def bounds_table(plan: Plan) -> str:
    """What a compiled step spends its time on, and how much of the GPUs the run makes use of."""
    rows = [
        "| run | GPUs | lanes of each | step, ms | most of it | collectives | efficiency |",
        "| --- " * 7 + "|",
    ]
    for name, setup in setups(plan).items():
        alone = predict(setup, 1, COMPILED, plan)
        for ranks in RANKS:
            found = predict(setup, ranks, COMPILED, plan)
            waiting = sum(found.collectives.values()) / found.seconds
            rows.append(
                f"| {name} | {ranks:,} | {found.lanes:.0f} | {1000 * found.seconds:.1f} | "
                f"{found.bound} | {waiting:.0%} | {found.rate / alone.rate / ranks:.0%} |"
            )
    return "\n".join(rows)


def wide_table(plan: Plan) -> str:
    """The same without a bound on the batch: every GPU keeps its lanes."""
    last = RANKS[-1]
    rows = [
        f"| run, compiled, {last:,} GPUs | lanes of all | step, ms | decisions/s | efficiency |",
        "| --- " * 5 + "|",
    ]
    for name, setup in setups(plan).items():
        lanes = lanes_of_rank(setup, 1, plan)
        alone = step(setup, lanes, 1, plan.hardware, COMPILED)
        found = step(setup, lanes, last, plan.hardware, COMPILED)
        rows.append(
            f"| {name} | {lanes * last:,.0f} | {1000 * found.seconds:.1f} | {_count(found.rate)} | "
            f"{found.rate / alone.rate / last:.0%} |"
        )
    return "\n".join(rows)


def cache_table(plan: Plan) -> str:
    """How large a complete cache of ImageNet is, what filling it takes, and how soon it hits."""
    rows = [
        f"| complete cache of {IMAGES:,} images, fp16 | pooled, K = {TIMESTEPS} | "
        f"pooled, K = 1,000 | dense, K = {TIMESTEPS} | filled, GPU-hours, K = {TIMESTEPS} |",
        "| --- " * 5 + "|",
    ]
    small, large = student(STUDENT, 64), student(STUDENT, 256)
    for name in ("ADM-64", "SD 1.5 at 256", "SD 1.5 at 512"):
        read = teacher(name)
        sizes = [
            cache_bytes(IMAGES, timesteps, read.shape, pooled=pooled)
            for timesteps, pooled in ((TIMESTEPS, True), (1000, True), (TIMESTEPS, False))
        ]
        hours = [
            _filling(Setup(read, small if name == "ADM-64" else large), regime, plan)
            for regime in REGIMES
        ]
        cells = [_size(size) for size in sizes]
        rows.append(f"| {name} | {' | '.join(cells)} | {_ends(hours, _short)} |")
    rows += [
        "",
        "| hits of an empty cache that fills on the way, even choice | "
        + " | ".join(f"{epochs} epoch{'s' * (epochs > 1)}" for epochs in EPOCHS)
        + " |",
        "| --- " * (len(EPOCHS) + 1) + "|",
    ]
    for timesteps in (TIMESTEPS, 1000):
        shares = [hit_rate(epochs * IMAGES, IMAGES * timesteps) for epochs in EPOCHS]
        rows.append(f"| K = {timesteps:,} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    return "\n".join(rows)


def _filling(setup: Setup, regime: Any, plan: Plan) -> float:
    """GPU-hours of teacher and VAE for all images at all timesteps, as the command fills it."""
    found = step(setup, plan.lanes, 1, plan.hardware, regime).kernels
    seconds = found["teacher"] + found.get("VAE encoder", 0.0)
    return seconds * TIMESTEPS / plan.lanes * IMAGES / 3600


def fit_table(fits: Sequence[tuple[Mapping[str, Any], Fit]]) -> str:
    """Fitted rates, and each measurement against what the model says of it."""
    rows: list[str] = []
    for machine in {str(machine_lines(facts)): facts for facts, _ in fits}.values():
        rows += machine_lines(machine)
    rows += [
        "",
        "| fitted to | convolutions, GFLOP/s | products, GFLOP/s | other traffic, GB/s | "
        "error of the fit (RMS) | of measurements left out (RMS) |",
        "| --- " * 6 + "|",
    ]
    for _, found in fits:
        rates = (found.rates.convolution, found.rates.product, found.rates.traffic)
        shown = " | ".join(_rate(rate) for rate in rates)
        left_out = found.error_of_others
        rows.append(
            f"| {found.name} | {shown} | {found.error:.1%} | "
            f"{'' if left_out is None else f'{left_out:.1%}'} |"
        )
    rows += [
        "",
        "| measured here | seconds | model | error | left out | error |",
        "| --- " * 6 + "|",
    ]
    for _, found in fits:
        others: Sequence[float | None] = found.others or [None] * len(found.samples)
        for sample, fitted, other in zip(found.samples, found.fitted, others, strict=True):
            cells = [_seconds(sample.seconds), *_against(fitted, sample.seconds)]
            cells += ["", ""] if other is None else _against(other, sample.seconds)
            rows.append(f"| {sample.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def gpu_table(fits: Sequence[tuple[Mapping[str, Any], Fit]], hardware: Hardware) -> str:
    """Steps in bf16 that were measured on a GPU, against the range that is predicted for them.

    Nothing is fitted here: this is what the inputs say.
    """
    rows = [
        f"| step | GPU | measured, ms | predicted for {hardware.name}, ms |",
        "| --- " * 4 + "|",
    ]
    for facts, found in fits:
        for sample in found.samples:
            if not (facts["gpu"] and sample.fast):
                continue
            launches = 0.0 if sample.fused else sample.kernels * hardware.launch
            ends = [
                max(1000 * sample.predicted(rates_of(hardware, regime)), 1000 * launches)
                for regime in REGIMES
            ]
            rows.append(
                f"| {sample.name} | {facts['gpu']} | {1000 * sample.seconds:.2f} | "
                f"{min(ends):.2f} to {max(ends):.2f} |"
            )
    if len(rows) == 2:
        return "No GPU was at hand: not measured."
    return "\n".join(rows)


def ring_table(gloo: RingFit, shared: RingFit) -> str:
    """The ring model against all-reduces measured here, by gloo and as ranks do them."""
    rates = [
        f"{fit.bandwidth / 1e9:.2f} GB/s one way and {fit.hop * 1e6:.1f} µs a hop (error "
        f"{fit.error:.0%} RMS)"
        for fit in (gloo, shared)
    ]
    rows = [
        *([] if gloo.machine is None else [*machine_lines(gloo.machine), ""]),
        f"Fitted: gloo {rates[0]}; shared memory {rates[1]}.",
        "",
        "| processes | size | gloo, ms | model, ms | shared memory, ms | model, ms |",
        "| --- " * 6 + "|",
    ]
    for one, other in zip(gloo.rows, shared.rows, strict=True):
        cells = [f"{1000 * seconds:.3f}" for seconds in (*one[2:], *other[2:])]
        rows.append(f"| {one[0]} | {one[1] / 1024:,.0f} KiB | {' | '.join(cells)} |")
    return "\n".join(rows)


def ranks_table(checks: Sequence[RanksCheck]) -> str:
    """Two processes against one: predicted from the one and the all-reduces alone."""
    rows = [
        "| run | one process, decisions/s | processes | predicted ratio | measured ratio |",
        "| --- " * 5 + "|",
    ]
    for check in checks:
        rows.append(
            f"| {check.name} | {check.alone:.1f} | {check.ranks} | {check.predicted:.2f} | "
            f"{check.measured:.2f} |"
        )
    return "\n".join(rows)


def _against(predicted: float, measured: float) -> list[str]:
    return [_seconds(predicted), f"{predicted / measured - 1:+.0%}"]


def _ends(values: Sequence[float], shown: Any) -> str:
    low, high = shown(min(values)), shown(max(values))
    return low if low == high else f"{low} to {high}"


def _count(value: float) -> str:
    """Two significant digits, with separators."""
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _time(hours: Sequence[float]) -> str:
    if max(hours) < 1:
        return f"{_ends([60 * value for value in hours], _short)} min"
    return f"{_ends(hours, _short)} h"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _seconds(value: float) -> str:
    return f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value / 1e9:,.1f}" if math.isfinite(value) else "not told"


def _size(value: float) -> str:
    return f"{value / 1e12:.1f} TB" if value >= 1e12 else f"{value / 1e9:.0f} GB"
