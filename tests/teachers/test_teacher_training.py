from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from warm_processes import WarmProcess

from repfusion_env.config import DataConfig, TeacherConfig
from repfusion_env.data import load_data
from repfusion_env.teachers import load_teacher
from repfusion_env.teachers.train import main
from repfusion_env.teachers.training.denoising import (
    build_scheduler,
    build_unet,
    denoising_loss,
    image_grid,
    learning_rate,
    step_generator,
    update_average,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = [
    *("--data.train_limit", "64", "--data.heldout_limit", "8"),
    *("--widths", "4", "4", "--norm-groups", "2", "--attention-levels"),
    *("--batch-size", "2", "--warmup", "5", "--timesteps", "20"),
    *("--sample-every", "0", "--device", "cpu"),
]


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "repfusion_env.teachers.train",
        *TINY,
        "--out",
        str(out),
        *words,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def newest_step(folder: Path) -> int:
    steps = [int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.ckpt")]
    return max(steps, default=0)


@pytest.mark.slow
def test_interrupted_and_killed_it_goes_on_to_the_same_weights(tmp_path):
    length = ("--steps", "160", "--checkpoint-every", "10")
    out, folder = tmp_path / "cut", tmp_path / "cut" / "checkpoints"

    def go_on(name: str) -> WarmProcess:
        words = [*TINY, "--out", str(out), *length, "--resume"]
        return WarmProcess("repfusion_env.teachers.train", words, tmp_path / name)

    cut = start(out, *length)
    end = time.monotonic() + 100
    while newest_step(folder) == 0:
        assert cut.poll() is None, cut.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)
    cut.send_signal(signal.SIGINT)
    said = cut.communicate(timeout=60)[0]
    assert cut.returncode == 130
    stopped = int(re.search(r"stopped at step (\d+); go on with:", said)[1])  # type: ignore[index]
    assert "--resume" in said
    assert "Traceback" not in said
    assert (folder / f"step-{stopped:09d}.ckpt").is_file()

    again = go_on("again")
    again.wait_until(lambda: newest_step(folder) > stopped)
    again.signal(signal.SIGKILL)
    assert again.code() == -signal.SIGKILL
    assert not (out / WEIGHTS).exists()

    last = go_on("last")
    assert last.code() == 0, last.said()
    assert "resumed at step" in last.said()

    assert main([*TINY, "--out", str(tmp_path / "whole"), *length]) == 0
    expected = load_file(tmp_path / "whole" / WEIGHTS)
    found = load_file(out / WEIGHTS)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name
    assert "--resume" not in (out / "README.md").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("training") / "teacher"
    words = ["--steps", "30", "--dtype", "fp16", "--sample-every", "20", "--out", str(out)]
    assert main([*TINY, *words]) == 0
    return out


def test_the_folder_is_a_teacher_with_card_and_samples(trained):
    teacher = load_teacher(TeacherConfig(model=str(trained)), device="cpu")
    assert (teacher.channels, teacher.image_size, teacher.num_timesteps) == (1, 16, 20)
    assert all(weight.dtype == torch.float16 for weight in load_file(trained / WEIGHTS).values())
    card = (trained / "README.md").read_text()
    for part in (
        "64 training images, 8 held out",
        "CC BY 4.0",
        "| seed | 0 |",
        "--steps 30",
        "fp16",
    ):
        assert part in card
    assert np.array(Image.open(trained / "samples.png")).shape == (8 * 50, 8 * 50)
    progress = {path.name for path in (trained / "progress").iterdir()}
    assert progress == {"step-000000020.png", "step-000000030.png"}


def test_training_lowers_the_heldout_loss(tmp_path, capsys):
    """A random network's error is about 1, the variance of the noise; some steps must halve it."""
    words = [word for word in TINY if word not in ("--data.train_limit", "64")]
    words[words.index("--widths") : words.index("--norm-groups")] = ["--widths", "16", "16"]
    words[words.index("--batch-size") + 1] = "32"
    assert (
        main(
            [
                *words,
                "--steps",
                "60",
                "--learning-rate",
                "5e-3",
                "--ema",
                "0.9",
                "--out",
                str(tmp_path / "x"),
            ]
        )
        == 0
    )
    table = (tmp_path / "x" / "README.md").read_text()
    losses = [float(value) for value in re.findall(r"^\| \d+ \| (\d+\.\d+) \|$", table, re.M)]
    assert len(losses) == 3  # timesteps 0, 10 and 19
    assert losses[-1] < 0.5
    assert losses[0] > losses[-1]


def refusal(capsys, *words: str) -> str:
    try:
        code = main([*TINY, *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said
    return " ".join(said.split())


def test_wrong_use_is_refused_in_one_sentence(trained, tmp_path, capsys):
    out = ("--out", str(tmp_path / "new"))
    assert "already holds a training run; go on with --resume" in refusal(
        capsys, "--out", str(trained)
    )
    assert "other arguments: --learning-rate was 0.002, now 0.5" in refusal(
        capsys, "--out", str(trained), "--steps", "30", "--resume", "--learning-rate", "0.5"
    )
    assert "there is no checkpoint in" in refusal(capsys, *out, "--resume")
    assert "4 cannot be divided into 3 --norm-groups" in refusal(capsys, *out, "--norm-groups", "3")
    assert "6 levels need square images whose side 32 divides" in refusal(
        capsys, *out, "--widths", "4", "4", "4", "4", "4", "4"
    )
    assert "--attention-levels: 2 given; the 2 levels are 0..1" in refusal(
        capsys, *out, "--attention-levels", "2"
    )
    assert "--ema: 1 given; it must be 0 or more and below 1" in refusal(capsys, *out, "--ema", "1")
    assert "Did you mean 'digits'?" in refusal(capsys, *out, "--data.name", "digit")
    assert "allowed: auto, cpu, cuda" in refusal(capsys, *out, "--device", "gpu")
    assert not (tmp_path / "new").exists()


def test_bf16_trains_the_same_fp32_weights_with_coarser_arithmetic():
    bank, _ = load_data(DataConfig(train_limit=32))
    unet = build_unet(
        bank.shape,
        widths=[8, 8],
        layers_per_block=1,
        attention_levels=[],
        norm_groups=2,
        attention_head_dim=None,
    )
    losses, gradients = {}, {}
    for precision in ("fp32", "bf16"):
        unet.zero_grad()
        loss = denoising_loss(
            unet,
            build_scheduler(100),
            bank,
            batch_size=16,
            flip=False,
            generator=step_generator(0, 0, bank.device),
            precision=precision,
        )
        loss.backward()
        losses[precision] = loss.item()
        gradients[precision] = torch.cat([p.grad.flatten() for p in unet.parameters()])
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]
    assert gradients["bf16"].dtype == torch.float32
    angle = torch.cosine_similarity(gradients["bf16"], gradients["fp32"], dim=0)
    assert angle > 0.98


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, peak=2.0, steps=110, warmup=10) for step in range(111)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)  # half a cosine, half way
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))


def test_the_average_follows_the_textbook_recursion():
    weights = torch.tensor([1.0, 4.0, 2.0, 8.0])
    average, network = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    average.weight.data.fill_(0.0)
    expected = 0.0
    for step, weight in enumerate(weights, start=1000):
        network.weight.data.fill_(weight)
        update_average(average, network, decay=0.9, step=step)
        expected = 0.9 * expected + 0.1 * float(weight)
    assert average.weight.item() == pytest.approx(expected)
    # The first step forgets nine tenths of the random beginning.
    update_average(average, network, decay=0.9, step=0)
    assert average.weight.item() == pytest.approx(0.1 * expected + 0.9 * 8)


def test_a_grid_holds_each_image_in_its_place():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4)
    grid = image_grid(images, columns=4, least_side=8)
    assert grid.shape == (3 * 10, 4 * 10, 3)
    centres = grid[5::10, 5::10, 0].flatten().tolist()
    assert centres == [*range(10), 128, 128]
