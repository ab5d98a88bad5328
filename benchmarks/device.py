"""What the device can do at most, and what of it a step reaches.

Floating-point operations of a step are counted (:func:`benchmarks.settings.flops_per_decision`),
the peak is measured: large square matrix products, which do nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.settings import Size
from benchmarks.timing import Line, interleave, shown, spread
from repfusion_env.devices import resolve_device

SIDE = {"cpu": 2048, "cuda": 8192}
REPEAT = {"cpu": 2, "cuda": 20}
COPIED = 1 << 28  # bytes, far more than any cache holds


def measure(
    size: Size, device: str = "cpu", say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Run the part; its result is described in :mod:`benchmarks.throughput`."""
    where = resolve_device(device)
    side = 64 if size.smoke else SIDE[where.type]
    generator = torch.Generator().manual_seed(0)
    repeat = REPEAT[where.type]

    def product(dtype: torch.dtype) -> Callable[[int], object]:
        a, b = (torch.randn(side, side, generator=generator).to(where, dtype) for _ in range(2))
        return lambda _: torch.mm(a, b)

    source = torch.zeros(1024 if size.smoke else COPIED, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    lines = [
        Line("bf16", product(torch.bfloat16), repeat=repeat),
        Line("fp32", product(torch.float32), repeat=repeat),
        Line("copy", lambda _: target.copy_(source), repeat=repeat),
    ]
    timings = interleave(lines, rounds=size.rounds, steps=size.steps, device=where)
    say(f"device: products of {side} x {side} matrices")
    return {
        "matrix_side": side,
        "peak_flops_per_second": {
            name: spread([2 * side**3 / seconds for seconds in timings[name].seconds])
            for name in ("bf16", "fp32")
        },
        "copy_bytes_per_second": spread(
            [2 * source.nbytes / seconds for seconds in timings["copy"].seconds]
        ),
    }


def utilisation(device: dict[str, Any], steps: dict[str, Any]) -> dict[str, float]:
    """Share of the bf16 peak that each on-line line of the part ``steps`` reaches."""
    peak = device["peak_flops_per_second"]["bf16"]["median"]
    return {
        name: line["flops_per_decision"] * line["decisions_per_second"]["median"] / peak
        for name, line in steps["lines"].items()
        if line["flops_per_decision"] is not None
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    peaks = result["peak_flops_per_second"]
    scaled = {
        name: shown({key: value / 1e12 for key, value in peak.items()}, ".2f")
        for name, peak in peaks.items()
    }
    copied = {key: value / 1e9 for key, value in result["copy_bytes_per_second"].items()}
    rows = [
        f"Matrix products of side {result['matrix_side']}: bf16 {scaled['bf16']} TFLOP/s, fp32 "
        f"{scaled['fp32']} TFLOP/s; copy {shown(copied, '.1f')} GB/s read and written.",
    ]
    if result.get("utilisation"):
        rows += ["", "| on-line step | of the bf16 peak |", "| --- | --- |"]
        rows += [f"| {name} | {share:.1%} |" for name, share in result["utilisation"].items()]
    return "\n".join(rows)
