"""Small real material for all tests: a randomly built teacher on disk, and real images if there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Several test processes share two cores; more threads than cores would make each of them crawl.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a diffusers UNet2DModel for 1x16x16 images, random weights, and its scheduler."""
    from diffusers import DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("tiny-teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
        )
    unet.save_pretrained(folder)
    DDPMScheduler(num_train_timesteps=1000).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(tiny_teacher: str) -> dict[str, Any]:
    """Overrides of ``digits`` under which an environment is made and stepped in milliseconds."""
    return {
        "device": "cpu",
        "teacher": {"model": tiny_teacher, "standardize_images": 24},
        "data": {"train_limit": 96, "heldout_limit": 40},
        "timesteps": {"count": 5, "first": 0, "last": 800},
        "env": {"num_envs": 4},
        "optimizer": {"batch_size": 8},
        "run": {"decisions": 400},
    }


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An .npz bank, 48 images to train on and 16 held out: on black one rectangle, bright or dim.

    Known are its pixels' class, its corner pixels (clockwise from the upper left one) and its box.
    """
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "mask_classes": np.array(["ground", "bright", "dim"]),
        "box_classes": np.array(["bright", "dim"]),
        "mirror": np.array([1, 0, 3, 2]),
    }
    for part, count in (("train", 48), ("test", 16)):
        dim = random.integers(2, size=count)
        left, top = random.integers(0, 7, size=(2, count))
        right, bottom = left + random.integers(5, 10, size=count), top + random.integers(5, 10)
        rows, columns = np.mgrid[:16, :16]
        inside = (columns >= left[:, None, None]) & (columns < right[:, None, None])
        inside &= (rows >= top[:, None, None]) & (rows < bottom[:, None, None])
        corners = [(left, top), (right - 1, top), (right - 1, bottom - 1), (left, bottom - 1)]
        arrays |= {
            f"{part}_images": (inside * np.where(dim, 110, 255)[:, None, None]).astype(np.uint8),
            f"{part}_masks": (inside * (1 + dim)[:, None, None]).astype(np.uint8),
            f"{part}_keypoints": np.stack([np.stack(xy, 1) for xy in corners], 1).astype("f4"),
            f"{part}_boxes": (np.stack([left, top, right, bottom], 1) / 16).astype("f4"),
            f"{part}_box_labels": dim,
            f"{part}_box_image": np.arange(count),
        }
    path = tmp_path_factory.mktemp("squares") / "squares.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of unpacked real image banks, named by REPFUSION_DATA; skips without it."""
    folder = os.environ.get("REPFUSION_DATA")
    if not folder:
        pytest.skip("REPFUSION_DATA names no folder of image banks")
    return Path(folder)


@pytest.fixture
def learned() -> Callable[[Any], list[torch.Tensor]]:
    """Copies of all that a trainer learns: student, average, optimizer moments, buffers."""

    def copies(trainer: Any) -> list[torch.Tensor]:
        found = list(trainer.student.state_dict().values())
        if trainer.average is not None:
            found += trainer.average.state_dict().values()
        for moments in trainer.optimizer.state_dict()["state"].values():
            found += [value for value in moments.values() if isinstance(value, torch.Tensor)]
        return [value.detach().clone() for value in found]

    return copies


class _NoWaiting(TorchDispatchMode):
    """Refuses on any device what would make the host wait for CUDA.

    That are values that the host reads, results whose size depends on values, selections by a mask
    among them, and tensors of the host's numbers, whose way to the device is waited for.
    """

    REFUSED = (
        "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "lift_fresh",
        "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        selects = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for group in args[1:2] if isinstance(group, (list, tuple)) for index in group
        )  # fmt: skip
        if selects or name in self.REFUSED:
            raise AssertionError(f"the host waits for the device: {func}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], AbstractContextManager[None]]:
    """Makes a context in which whatever would make the host wait on CUDA raises."""

    def wait(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host waits for the device")

    @contextmanager
    def watched() -> Iterator[None]:
        with monkeypatch.context() as patch, _NoWaiting():
            # Nothing is dispatched for these on a CPU.
            for name in ("item", "tolist", "cpu", "numpy", "__bool__"):
                patch.setattr(torch.Tensor, name, wait)
            yield

    return watched
