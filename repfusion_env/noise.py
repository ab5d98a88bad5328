"""Gaussian noise as a pure function of what it belongs to.

A generator's state would tie the noise of one lane to the lanes before it. Here each element is a
hash of (seed, image id, timestep, visit, position), so a decision gets the same noise whichever
lane or batch makes it, on one lane or on many, and a resumed run has no noise state to restore.

Shape letters: N lanes, C,H,W image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Odd constants whose low and high halves both have many bits set; products wrap modulo 2**64.
_STEP = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def derive_seed(seed: int, *purpose: object) -> int:
    """A seed in [0, 2**63) for one purpose, e.g. ``derive_seed(0, "stream", epoch)``."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@contextmanager
def own_randomness(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Whatever draws from torch's global generators draws from ``seed``; then they go on as before.

    Args:
        seed: Any int in [0, 2**63).
        device: A CUDA device whose generator is used too; those of other devices are not touched,
            as ``torch.manual_seed`` would.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _shifted(x: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic; masking the copies of the sign bit makes the shift logical.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _hash(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) on int64."""
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _uniform(bits: Tensor) -> Tensor:
    """Upper 24 bits -> float32 in (0, 1]; never 0, whose logarithm would be infinite."""
    return (_shifted(bits, 40).to(torch.float32) + 0.5) * 2.0**-24


def keyed_noise(
    shape: tuple[int, int, int], seed: int, ids: Tensor, timesteps: Tensor, visits: Tensor
) -> Tensor:
    """Standard normal noise for N images.

    Args:
        shape: ``(C, H, W)`` of one image.
        seed: Any int in [0, 2**63).
        ids: ``(N,)`` int64 image ids.
        timesteps: ``(N,)`` int64 timesteps.
        visits: ``(N,)`` int64; the same visit gives the same noise.

    Returns:
        ``(N, C, H, W)`` float32 on the device of ``ids``. Uniform bits by SplitMix64, made normal
        by the Box-Muller transform.
    """
    key = torch.full_like(ids, seed)
    for part in (ids, timesteps, visits):
        key = _hash(key + _STEP) ^ part
    key = _hash(key)
    numel = math.prod(shape)
    pairs = (numel + 1) // 2
    counter = torch.arange(2 * pairs, device=ids.device, dtype=torch.int64) * _STEP
    uniform = _uniform(_hash(key[:, None] + counter))  # (N, 2 * pairs)
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, :pairs]))
    angle = (2.0 * math.pi) * uniform[:, pairs:]
    normal = torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
    return normal[:, :numel].reshape(ids.shape[0], *shape)
