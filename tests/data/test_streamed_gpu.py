"""Streaming to a CUDA device; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repfusion_env.config import DataConfig
from repfusion_env.data import load_data
from repfusion_env.stream import ImageStream, next_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(48):
        path = tmp_path / f"class{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path


def test_announced_images_arrive_whole_and_the_host_waits_for_no_copy(folder):
    device = torch.device("cuda")
    made = {"name": "folder", "path": str(folder)}
    streamed = load_data(DataConfig(**made, storage="stream", prefetch=3))[0].to(device)
    resident = load_data(DataConfig(**made))[0].to(device)
    stream = ImageStream(len(resident), device, shuffle=True)
    stream.peek(3 * len(resident))
    work = torch.randn(2048, 2048, device=device)
    found = []
    for step in range(40):
        # A new epoch's order is brought to the device once, and waited for.
        turns = len(resident) - stream.state_dict()["cursor"] <= 6
        torch.cuda.set_sync_debug_mode("default" if turns or step < 2 else "error")
        try:
            ids = next_images(stream, streamed, 12, 2)
            found.append((ids, streamed.pixels(ids), streamed.pixels(ids[::2])))
            work = (work @ work).clamp(-1, 1)  # keeps the device behind the host
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for ids, pixels, half in found:
        assert torch.equal(pixels, resident.pixels(ids))
        assert torch.equal(half, resident.pixels(ids[::2]))
    assert streamed.images._decoding.start(np.arange(3)).images.is_pinned()


def test_images_that_were_not_announced_are_looked_up(folder):
    made = {"name": "folder", "path": str(folder)}
    streamed = load_data(DataConfig(**made, storage="stream"))[0].to("cuda")
    resident = load_data(DataConfig(**made))[0].to("cuda")
    ids = torch.tensor([5, 1, 5, 30], device="cuda")
    assert torch.equal(streamed.pixels(ids), resident.pixels(ids))
