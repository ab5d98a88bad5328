"""Batch norm over the lanes of all ranks, so that W small batches train as one large batch.

Shape letters: W ranks, B samples of one rank, C channels, M values of a channel on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from repfusion_env.ranks import Ranks

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class RankBatchNorm(_BatchNorm):
    """A batch norm whose statistics in training are those of all ranks.

    Every rank must hold equally many samples. Parameters and buffers keep their names, so that
    weights are the same with it and without.

    Args:
        norm: What it takes the place of; parameters and buffers are shared with it.
        ranks: Whose samples count.
    """

    def __init__(self, norm: _BatchNorm, ranks: Ranks) -> None:
        super().__init__(
            norm.num_features,
            norm.eps,
            norm.momentum,  # type: ignore[arg-type]
            affine=False,
            track_running_stats=False,
        )
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.training = norm.training
        # timm's norms have the activation inside.
        for name in ("drop", "act"):
            if isinstance(part := getattr(norm, name, None), nn.Module):
                self.add_module(name, part)
        self.ranks = ranks

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"a batch norm takes (B, C, ...), not {tuple(input.shape)}")

    # Exchanges between ranks are no part of a compiled graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) to the same shape."""
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            found = super().forward(input)
        else:
            found, mean, variance = _Normalized.apply(
                input, self.weight, self.bias, self.eps, self.ranks
            )
            if self.training and self.running_mean is not None:
                values = input.numel() // input.shape[1] * self.ranks.count
                self._follow(mean, variance * (values / max(values - 1, 1)))
        for part in self.children():
            found = part(found)
        return found

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of one batch, (C,) each."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # a plain average over all batches
            weight = 1.0 / self.num_batches_tracked
            self.running_mean += (mean - self.running_mean) * weight
            self.running_var += (variance - self.running_var) * weight
            return
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def share_norms(network: nn.Module, ranks: Ranks) -> None:
    """Let every batch norm of a network take its statistics over all ranks; in place.

    Args:
        network: On its device.
        ranks: Nothing is done where there is only one.

    Raises:
        ValueError: The network has a kind of batch norm that is not known, or one that uses a
            batch's statistics in evaluation too.
    """
    if not ranks.several:
        return
    for name, module in list(network.named_modules()):
        if not isinstance(module, _BatchNorm) or isinstance(module, RankBatchNorm):
            continue
        if module.running_mean is None:
            raise ValueError(
                f"the student's '{name}' keeps no running statistics, so that rank 0 could not "
                f"evaluate while the other ranks wait; {ranks.count} ranks need "
                "track_running_stats=True"
            )
        known = type(module) in PLAIN or type(module).__module__.startswith("timm.")
        if not known or not name:
            raise ValueError(
                f"the student's '{name}' is a {type(module).__name__}, whose statistics cannot be "
                f"taken over {ranks.count} ranks; allowed: "
                + ", ".join(kind.__name__ for kind in PLAIN)
            )
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, RankBatchNorm(module, ranks))


class _Normalized(torch.autograd.Function):
    """Normalised values with the mean and the (biased) variance (C,) over all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        kind = torch.promote_types(x.dtype, torch.float32)
        own = torch.empty(2, channels, dtype=kind, device=x.device)
        # Statistics in float32, of bf16 values too; what is given is not moved at momentum 0.
        own[0], own[1] = torch.batch_norm_update_stats(
            x, own.new_zeros(channels), own.new_ones(channels), 0.0
        )
        means, variances = ranks.all(own[None]).unbind(1)  # (W, C) each
        # Squares less the squared mean would cancel; this does not (Chan et al., 1979).
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        found = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.ranks, ctx.eps = ranks, eps
        ctx.mark_non_differentiable(mean, variance)
        return found, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        gradient = gradients[0]
        scale = inverse.new_ones(len(inverse)) if weight is None else weight
        # The library's gradients are those of this rank's samples alone. Of weight and bias they
        # are sums over samples, which is what is wanted; that of the values lacks a line in x.
        moved, slope, offset = torch.ops.aten.native_batch_norm_backward(
            gradient, x, scale, None, None, mean, inverse, True, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            own = torch.stack((slope, offset)).to(mean.dtype)
            # The sums of all ranks; gathering two numbers is faster than adding them on the way.
            lack = own - ctx.ranks.all(own[None]).mean(0)
            lack = lack * (scale * inverse / (x.numel() // x.shape[1]))
            variance = inverse.square().reciprocal() - ctx.eps
            moved.add_(F.batch_norm(x, mean, variance, lack[0], lack[1], False, 0.0, ctx.eps))
        wanted = ctx.needs_input_grad[1:3]
        return moved, slope if wanted[0] else None, offset if wanted[1] else None, None, None
