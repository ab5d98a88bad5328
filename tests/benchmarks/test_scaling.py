"""The cost model: counted work against hand counts and published numbers, formulas by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.scaling.__main__ import fill, main
from benchmarks.scaling.fit import Sample, fit, step_samples
from benchmarks.scaling.hardware import COMPILED, EAGER, H100, all_reduce, ring
from benchmarks.scaling.model import (
    Rates,
    Setup,
    cache_bytes,
    hit_rate,
    kernel_seconds,
    most_lanes,
    step,
)
from benchmarks.scaling.networks import measure_forward, student, teacher
from benchmarks.scaling.plan import Plan, bill, lanes_of_rank, predict
from benchmarks.scaling.work import Operation, Work, count

DDPM = "DDPM CIFAR-10"
PLAIN = Operation("add", 0.0, 3.0, 0.0, pointwise=True)


def work(*operations: Operation) -> Work:
    return Work(operations)


def test_a_convolution_is_counted_as_by_hand() -> None:
    with torch.device("meta"):
        layer = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    def run(batch: int) -> None:
        with torch.no_grad():
            layer(torch.empty(batch, 3, 10, 10, device="meta"))

    (operation,) = count(run).operations
    assert operation.flops == 2 * 3 * 9 * 8 * 100  # a multiplication and an addition each
    assert operation.elements == 3 * 100 + 8 * 100
    assert operation.fixed == 3 * 9 * 8
    assert operation.convolution
    assert not operation.pointwise


def test_a_backward_is_counted_and_what_it_needs_is_kept() -> None:
    with torch.device("meta"):
        layer = nn.Linear(5, 7, bias=False)

    def run(batch: int) -> None:
        layer(torch.empty(batch, 5, device="meta")).relu().sum().backward()
        layer.zero_grad()

    found = count(run)
    # Forward and the gradient of the weights; the input needs none.
    assert found.flops == 2 * 2 * 5 * 7
    assert found.kept == 5 + 7  # the input for the weights, the output for relu


def test_attention_moves_no_scores() -> None:
    heads, tokens, texts, width = 4, 64, 7, 8

    def run(batch: int) -> None:
        q, k = (torch.empty(batch, heads, n, width, device="meta") for n in (tokens, texts))
        nn.functional.scaled_dot_product_attention(q, k, k)

    (operation,) = count(run).operations
    assert operation.flops == 2 * (2 * heads * tokens * texts * width)
    assert operation.elements == heads * width * (2 * tokens + 2 * texts)


def test_the_work_must_not_depend_on_the_batch() -> None:
    def run(batch: int) -> None:
        for _ in range(batch):
            torch.empty(4, device="meta").add(1)

    with pytest.raises(ValueError, match="cannot be told per image"):
        count(run)


def test_networks_have_their_published_sizes() -> None:
    assert teacher(DDPM).parameters_all == 35_746_307
    # 295.9 M with the class embedding (1000 x 768), which no teacher reads.
    assert round((teacher("ADM-64").parameters_all + 768_000) / 1e6, 1) == 295.9
    assert teacher("SD 1.5 at 256").parameters_all == 859_520_964
    # torchvision's own tables: 4.09 G multiply-adds at 224 x 224, with the classifier's 2 M.
    found = student("torchvision/resnet50", 224).inference.flops
    assert found == pytest.approx(2 * 4.09e9, rel=0.003)


def test_counts_agree_with_torchs_own_counter() -> None:
    from diffusers import UNet2DModel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.material import DDPM_CIFAR10_UNET

    with torch.device("meta"):
        network = UNet2DModel(**DDPM_CIFAR10_UNET).eval()
        inputs = torch.empty(1, 3, 32, 32), torch.empty(1, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    assert teacher(DDPM).whole.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_cut_ends_at_the_layer() -> None:
    with torch.device("meta"):
        network = nn.Sequential(*(nn.Conv2d(4, 4, 1, bias=False) for _ in range(5)))

    def run(network: nn.Module, batch: int) -> None:
        network(torch.empty(batch, 4, 6, 6, device="meta"))

    cut, whole, shape, used = measure_forward(network, run, "1")
    assert (len(cut.operations), len(whole.operations)) == (2, 5)
    assert shape == (4, 6, 6)
    assert used == 2 * 16
    # The hooks are gone.
    assert count(lambda batch: run(network.eval(), batch)).flops > cut.flops


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic() -> None:
    product = Operation("mm", flops=100.0, elements=10.0, fixed=30.0, pointwise=False)
    rates = Rates(convolution=1.0, product=50.0, traffic=6.0, bandwidth=20.0, width=2.0)
    assert kernel_seconds(work(product), 4, rates) == 4 * 100 / 50
    assert kernel_seconds(work(product), 4, replace(rates, bandwidth=5.0)) == 2 * (40 + 30) / 5
    assert kernel_seconds(work(product), 4, replace(rates, least=99.0)) == 99
    assert kernel_seconds(work(PLAIN), 4, rates) == 2 * 12 / 6
    assert kernel_seconds(work(PLAIN), 4, replace(rates, fused=True)) == 0
    assert kernel_seconds(work(replace(product, name="convolution_backward")), 4, rates) == 400


def test_a_ring_sends_twice_its_share_and_waits_for_each_hop() -> None:
    assert ring(1000.0, 1, 10.0, 5.0) == 0
    assert ring(1000.0, 2, 10.0, 5.0) == 2 * 0.5 * 100 + 2 * 5
    assert ring(1000.0, 4, 10.0, 0.0) == 2 * 0.75 * 100
    # A tree's way where a ring's is longer.
    assert ring(0.0, 64, 10.0, 1.0) == 2 * 6
    # Over nodes, a GPU sends its eighth.
    inside = ring(8e9, 8, H100.link, H100.hop)
    assert all_reduce(8e9, 8, H100) == inside
    assert all_reduce(8e9, 16, H100) == inside + ring(1e9, 2, H100.network, H100.far_hop)


def test_more_ranks_never_make_a_decision_cheaper_and_a_warm_cache_does() -> None:
    setup = Setup(teacher(DDPM), student("resnet18", 32))
    plan = Plan(largest_batch=1024)
    steps = [predict(setup, ranks, COMPILED, plan) for ranks in (1, 2, 8, 64)]
    each = [found.rate / found.ranks for found in steps]
    assert each == sorted(each, reverse=True)
    assert [found.lanes for found in steps] == [256, 256, 128, 16]
    warm = predict(replace(setup, hits=1.0), 1, COMPILED, plan)
    assert "teacher" not in warm.kernels
    assert warm.rate > steps[0].rate
    assert steps[0].seconds == pytest.approx(sum(steps[0].kernels.values()))
    assert steps[3].bound == "batch norm over ranks"


def test_an_eager_step_of_few_lanes_waits_for_its_launches() -> None:
    setup = Setup(teacher(DDPM), student("resnet18", 32))
    few = step(setup, 1, 1, replace(H100, kernel=0.0), EAGER)
    assert few.bound == "launches"
    assert few.seconds == few.launches
    parts = (setup.teacher.cut, setup.student.training, setup.student.inference)
    assert few.launches > sum(len(part.operations) for part in parts) * H100.launch


def test_no_step_is_shorter_than_decoding_its_images() -> None:
    setup = Setup(teacher(DDPM), student("resnet18", 32), decoded=10.0)
    found = step(setup, 280, 4, H100, COMPILED)
    assert found.bound == "decoding"
    assert found.rate == 4 * 10 * H100.cores


def test_utilization_is_work_over_peak() -> None:
    setup = Setup(teacher(DDPM), student("resnet18", 32))
    found = step(setup, 100, 1, H100, COMPILED)
    flops = sum(
        part.flops for part in (setup.teacher.cut, setup.student.training, setup.student.inference)
    )
    assert found.utilization(H100) == pytest.approx(100 * flops / found.seconds / 989e12)
    assert found.utilization(H100) < COMPILED.matrix


def test_lanes_are_bounded_by_memory() -> None:
    setup = Setup(teacher(DDPM), student("resnet18", 32))
    small = replace(H100, memory=4e9)
    fits = most_lanes(setup, small)
    assert 0 < fits < most_lanes(setup, H100)
    held = fits * 3 * setup.student.training.kept
    assert held < small.memory
    assert lanes_of_rank(setup, 1, Plan(lanes=10**9, largest_batch=10**9, hardware=small)) == fits


@pytest.mark.parametrize("decisions", [1, 50, 400])
def test_the_hit_rate_is_that_of_a_simulated_cache(decisions: int) -> None:
    pairs = 100
    drawn = np.random.default_rng(0).integers(pairs, size=(2000, decisions))
    different = np.mean([len(np.unique(row)) for row in drawn])
    assert hit_rate(decisions, pairs) == pytest.approx(1 - different / decisions, abs=0.01)


def test_a_cache_holds_its_numbers_and_the_heads_of_its_records() -> None:
    assert cache_bytes(10, 20, (768, 8, 8), pooled=True) == 200 * (768 * 2 + 16)
    assert cache_bytes(10, 20, (768, 8, 8), pooled=False, width=4) == 200 * (768 * 64 * 4 + 16)


def test_a_bill_counts_all_gpus() -> None:
    found = bill(1000.0, 8, Plan(decisions=36e6, price=3.0))
    assert (found.hours, found.gpu_hours, found.dollars) == (10.0, 80.0, 240.0)


def _samples(rates: Rates, mixes: list[tuple[float, float, float]]) -> list[Sample]:
    samples = []
    for number, (convolved, multiplied, moved) in enumerate(mixes):
        done = work(
            Operation("convolution", convolved, 0.0, 0.0, False),
            Operation("mm", multiplied, 0.0, 0.0, False),
            Operation("native_group_norm", 0.0, moved, 0.0, False),
        )
        sample = Sample(str(number), 1.0, ((done, 2.0),))
        samples.append(replace(sample, seconds=sample.predicted(rates)))
    return samples


def test_the_fit_finds_the_rates_that_made_the_measurements() -> None:
    truth = Rates(4e11, 1e11, 5e9)
    mixes = [(1e9, 2e8, 1e6), (5e8, 5e8, 5e6), (1e8, 1e7, 8e6), (9e8, 0.0, 1e5), (1e7, 7e8, 3e6)]
    samples = _samples(truth, mixes)
    found = fit("made up", samples)
    for name in ("convolution", "product", "traffic"):
        assert getattr(found.rates, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    assert found.error < 1e-6
    assert found.error_of_others is not None
    assert found.error_of_others < 1e-6
    # One that does not follow the model: the others cannot tell it.
    odd = replace(samples[0], seconds=3 * samples[0].seconds)
    assert fit("odd", [odd, *samples[1:]]).others[0] == pytest.approx(samples[0].seconds)


def test_few_measurements_are_fitted_with_few_rates() -> None:
    samples = _samples(Rates(1e11, 1e11, 5e9), [(1e9, 2e8, 1e6), (5e8, 5e8, 9e6)])
    found = fit("two", samples)
    assert found.rates.convolution == found.rates.product == pytest.approx(1e11)
    assert found.others == ()
    assert found.error_of_others is None
    with pytest.raises(ValueError, match="1 measurements given; 2 or more"):
        fit("one", samples[:1])


def _line(name: str | None, seconds: float, **changes: Any) -> dict[str, Any]:
    setting = {
        "fast": False,
        "compiled": False,
        "cache": "off",
        "group": 1,
        "reward": "student_lookahead",
        "start": "updated",
    }
    return {
        "lanes": 8,
        "setting": None if name is None else setting | changes,
        "seconds_per_step": [seconds, seconds * 9, seconds / 9],
    }


def test_lines_are_charged_with_the_work_of_their_settings() -> None:
    read_, net = teacher(DDPM), student("resnet18", 32)
    lines = {
        "published step": _line(None, 1.0),
        "published step without policy": _line(None, 2.0),
        "default": _line("", 3.0),
        "grouped": _line("", 4.0, group=4),
        "cached": _line("", 5.0, cache="memory", start="training"),
        "fast": _line("", 6.0, fast=True, reward="teacher_probe"),
        "compiled": _line("", 7.0, fast=True, compiled=True),
    }
    kinds = step_samples({"lines": lines}, read_, net)
    assert {kind: [s.name for s in found] for kind, found in kinds.items()} == {
        "fp32": ["published step without policy", "default", "grouped", "cached"],
        "bf16": ["fast"],
        "bf16, compiled": ["compiled"],
    }
    flops = [sum(w.flops * n for w, n in sample.parts) for sample in kinds["fp32"]]
    train, infer = net.training.flops, net.inference.flops
    assert flops == pytest.approx(
        [
            8 * (read_.whole.flops + train),
            8 * (read_.cut.flops + train + infer),
            8 * read_.cut.flops + 2 * (train + infer),
            8 * train,
        ]
    )
    (fast,) = kinds["bf16"]
    assert sum(w.flops * n for w, n in fast.parts) == 8 * (read_.cut.flops + train)
    assert [sample.seconds for sample in kinds["fp32"]] == [2.0, 3.0, 4.0, 5.0]


def test_blocks_go_where_the_page_has_a_place_for_them() -> None:
    page = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\n"
    filled = fill(page, {"two": "| 2 |", "one": r"\1 new"})
    assert filled == (
        "a\n<!-- one -->\n\\1 new\n<!-- /one -->\nb\n<!-- two -->\n| 2 |\n<!-- /two -->\n"
    )
    with pytest.raises(ValueError, match="no place '<!-- three -->'"):
        fill(page, {"three": ""})


def test_the_command_writes_page_and_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {"cpu": "a", "cores": 1, "bf16_instructions": [], "threads": 1, "gpu": None}
    machine |= {"system": "b", "python": "3", "torch": "2", "date": "d", "others": None}
    measured = tmp_path / "measured.json"
    lines = {f"line {n}": _line("", 1.0 + n, group=2**n) for n in range(4)}
    file = {
        "machine": machine,
        "size": {"student": "resnet18"},
        "parts": {"steps": {"lines": lines}},
    }
    measured.write_text(json.dumps(file), encoding="utf-8")
    page, drawn = tmp_path / "page.md", tmp_path / "figure.png"
    names = ("work", "inputs", "rates", "bounds", "wide", "cache", "fit", "gpu")
    page.write_text("".join(f"<!-- {n} -->\n<!-- /{n} -->\n" for n in names), encoding="utf-8")
    arguments = [str(measured), "--price", "7.5", "--docs", str(page), "--figure", str(drawn)]
    assert main(arguments) == 0
    text = page.read_text(encoding="utf-8")
    assert "| GPU-hour | $7.50 |" in text
    assert "steps, CPU, fp32" in text
    assert text.count("line 3") == 1
    assert drawn.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(SystemExit):
        main(["--price", "0"])
    assert "--price: 0.0 given; it must be above 0" in capsys.readouterr().err


def test_no_cell_of_a_prediction_is_empty() -> None:
    from benchmarks.scaling import tables

    for table in (tables.rates_table(Plan()), tables.bounds_table(Plan())):
        cells = [cell.strip() for row in table.splitlines() if row for cell in row.split("|")[1:-1]]
        assert all(cells)
        assert "nan" not in table
        assert str(math.inf) not in table
