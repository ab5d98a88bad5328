"""Progress on a terminal (a real pseudo-terminal) and in a log file."""

import os
import pty
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

LOOP = """
import sys, time
from repfusion_env import progress
progress.PLAIN_LINE_SECONDS = float(sys.argv[1])
with progress.Progress(51_200, description="reinforce", initial=12_800) as bar:
    for done in range(12_800, 51_201, 2560):
        time.sleep(0.04)
        bar.update(done, reward=-0.51234, timestep=123.4, entropy=2.1)
"""


def run_plain(every: float, code: str = LOOP) -> list[str]:
    command = [sys.executable, "-c", code, str(every)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_a_log_file_gets_plain_lines() -> None:
    lines = run_plain(0.2)
    assert 2 <= len(lines) <= 5
    assert all(line.isascii() and line.isprintable() for line in lines)
    pattern = (
        r"reinforce: ([\d,]+)/51,200 decisions, ([\d,]+)/s, 0:00:0\d elapsed"
        r"(, 0:00:0\d left)?, reward -0\.512, timestep 123\.4, entropy 2\.100"
    )
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert all(matches), lines
    done = [int(match[1].replace(",", "")) for match in matches if match]
    assert done == sorted(done)
    assert done[-1] == 51_200
    last = matches[-1]
    assert last is not None
    # 38,400 decisions in 16 sleeps of 40 ms: what was done before is no part of the rate.
    assert 20_000 < int(last[2].replace(",", "")) < 38_400 / 0.6


def test_the_end_is_said_once_when_nothing_was_due() -> None:
    [line] = run_plain(1000)
    assert line.startswith("reinforce: 51,200/51,200 decisions")


def test_an_error_is_not_hidden_and_the_place_is_said() -> None:
    lines = run_plain(1000, LOOP + "        raise SystemExit('stopped')\n")
    assert lines[0].startswith("reinforce: 12,800/51,200 decisions")
    assert lines[1:] == ["stopped"]


def test_a_terminal_gets_a_bar_that_fits(tmp_path: Path) -> None:
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, "1000"],
        stderr=child,
        stdout=subprocess.DEVNULL,
        env=environment | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
    )
    os.close(child)
    received = b""
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:
            break
        if not chunk:
            break
        received += chunk
    os.close(parent)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received.decode())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert max(map(len, lines)) <= 100
    *_, bar, figures = lines
    assert re.search(r"reinforce ━+ 51,200/51,200 decisions [\d,]+/s 0:00:0\d", bar), bar
    assert figures.strip() == "reward -0.512 · timestep 123.4 · entropy 2.100"


SLOW = """
import time
from repfusion_env import progress
progress.PLAIN_LINE_SECONDS, progress.PATIENCE_SECONDS = 0.0, {patience}
with {outer}:
    pause = iter({pauses})
    for piece in progress.watched(["abc"] * 4, 12, description="evaluate", unit="images"):
        time.sleep(next(pause))
"""
EVEN = [0.05] * 4


def test_slow_work_is_watched_and_quick_work_is_not() -> None:
    alone = "progress.ExitStack()"
    lines = run_plain(0, SLOW.format(patience=0.06, outer=alone, pauses=EVEN))
    # Two pieces of three go by before it is slow.
    counts = [line.split(" images, ")[0] for line in lines]
    assert counts == ["evaluate: 6/12", "evaluate: 9/12", "evaluate: 12/12"]
    assert re.search(r"evaluate: 9/12 images, \d\d/s, 0:00:00 elapsed, 0:00:00 left", lines[1])
    assert run_plain(0, SLOW.format(patience=10, outer=alone, pauses=EVEN)) == []


def test_the_rate_counts_the_time_before_the_bar_is_shown() -> None:
    # All is nearly done when it shows: what comes then at once says nothing of the speed.
    code = SLOW.format(patience=0.06, outer="progress.ExitStack()", pauses=[0.5, 0.5, 0, 0])
    found = re.fullmatch(
        r"evaluate: 12/12 images, ([\d,.]+)/s, 0:00:01 elapsed", run_plain(0, code)[-1]
    )
    assert found is not None
    assert float(found[1]) <= 12


def test_a_bar_inside_another_is_silent() -> None:
    outer = 'progress.Progress(1, "runs", description="outer")'
    assert run_plain(0, SLOW.format(patience=0.06, outer=outer, pauses=EVEN)) == [
        "outer: 0/1 runs, 0.0/s, 0:00:00 elapsed"
    ]
