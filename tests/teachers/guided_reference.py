"""A compact guided-diffusion UNet, after Dhariwal & Nichol, 2021, with its checkpoints' names.

Independent of diffusers: what the conversion is tested against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    def __init__(self, wide: int, out: int, told: int, *, film: bool, resample: str = "") -> None:
        super().__init__()
        self.film, self.resample = film, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, wide), nn.SiLU(), conv(wide, out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(told, 2 * out if film else out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.1), conv(out, out)
        )
        self.skip_connection = nn.Identity() if wide == out else nn.Conv2d(wide, out, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        h = functional.silu(self.in_layers[0](x))
        if self.resample == "up":
            h, x = (functional.interpolate(map_, scale_factor=2) for map_ in (h, x))
        elif self.resample == "down":
            h, x = (functional.avg_pool2d(map_, 2) for map_ in (h, x))
        h, e = self.in_layers[2](h), self.emb_layers(told)[..., None, None]
        if self.film:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + e)
        return self.skip_connection(x) + self.out_layers[3](functional.silu(h))


class SelfAttention(nn.Module):
    def __init__(self, wide: int, heads: int, order: str, axes: int) -> None:
        super().__init__()
        self.heads, self.order = heads, order
        self.norm = nn.GroupNorm(32, wide)
        kind = nn.Conv1d if axes == 1 else nn.Conv2d
        self.qkv, self.proj_out = kind(wide, 3 * wide, 1), kind(wide, wide, 1)

    def forward(self, x: Tensor, _told: Tensor) -> Tensor:
        n, wide, *size = x.shape
        flat = x.flatten(2) if isinstance(self.qkv, nn.Conv1d) else x
        qkv = self.qkv(self.norm(flat)).flatten(2)  # (N, 3 wide, hw)
        if self.order == "legacy":
            q, k, v = qkv.reshape(n, self.heads, 3, -1, qkv.shape[-1]).unbind(2)
        else:
            q, k, v = qkv.reshape(n, 3, self.heads, -1, qkv.shape[-1]).unbind(1)
        weights = (q.transpose(-1, -2) @ k / math.sqrt(wide / self.heads)).softmax(-1)
        mixed = (v @ weights.transpose(-1, -2)).reshape(flat.shape)
        return x + self.proj_out(mixed).reshape(n, wide, *size)


class Down(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(wide, wide, 3, stride=2, padding=1)

    def forward(self, x: Tensor, _told: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.conv = conv(wide, wide)

    def forward(self, x: Tensor, _told: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2))


class Stage(nn.Sequential):
    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        for module in self:
            x = module(x) if isinstance(module, nn.Conv2d) else module(x, told)
        return x


def conv(wide: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(wide, out, 3, padding=1)


class Guided(nn.Module):
    """The published network, read without labels."""

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64),
        base: int = 32,
        blocks: int = 1,
        attention: tuple[int, ...] = (1,),
        heads: dict[int, int] | None = None,
        order: str = "legacy",
        updown: bool = True,
        film: bool = True,
        classes: int = 0,
        axes: int = 1,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.base, told = base, 4 * base
        self.time_embed = nn.Sequential(nn.Linear(base, told), nn.SiLU(), nn.Linear(told, told))
        if classes:
            self.label_emb = nn.Embedding(classes, told)
        heads = heads or {wide: wide // 16 for wide in widths}

        def residual(wide: int, out: int, resample: str = "") -> Residual:
            return Residual(wide, out, told, film=film, resample=resample)

        def attend(wide: int) -> SelfAttention:
            return SelfAttention(wide, heads[wide], order, axes)

        wide, kept = widths[0], [widths[0]]
        self.input_blocks = nn.ModuleList([Stage(conv(channels, wide))])
        for level, out in enumerate(widths):
            for _ in range(blocks):
                parts = [residual(wide, out)] + [attend(out)] * (level in attention)
                self.input_blocks.append(Stage(*parts))
                wide = out
                kept.append(wide)
            if level < len(widths) - 1:
                down = residual(wide, wide, "down") if updown else Down(wide)
                self.input_blocks.append(Stage(down))
                kept.append(wide)
        self.middle_block = Stage(residual(wide, wide), attend(wide), residual(wide, wide))
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for block in range(blocks + 1):
                parts = [residual(wide + kept.pop(), out)] + [attend(out)] * (level in attention)
                wide = out
                if level and block == blocks:
                    parts.append(residual(wide, wide, "up") if updown else Up(wide))
                self.output_blocks.append(Stage(*parts))
        self.out = nn.Sequential(nn.GroupNorm(32, wide), nn.SiLU(), conv(wide, 2 * channels))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        half = self.base // 2
        waves = timesteps[:, None] * 10000 ** (-torch.arange(half) / half)
        told = self.time_embed(torch.cat([waves.cos(), waves.sin()], 1))
        kept = []
        for block in self.input_blocks:
            x = block(x, told)
            kept.append(x)
        x = self.middle_block(x, told)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], 1), told)
        return self.out(x)
