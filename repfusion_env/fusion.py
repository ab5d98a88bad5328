"""Several timesteps and layers of the teacher as one target.

Shape letters: N lanes, B samples, k chosen timesteps, T slots of one target (the k chosen ones,
then ``fusion.timesteps``), L teacher layers, K grid length, F feature width, h,w positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from repfusion_env import fusion_rules
from repfusion_env.actions.choice import Choice
from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import ConfigError
from repfusion_env.data.bank import ImageBank
from repfusion_env.features import TeacherFeatures, resized
from repfusion_env.timesteps import TimestepGrid


@dataclass(frozen=True)
class Targets:
    """What B samples are to match.

    Attributes:
        features: Per layer (B, F), or dense (B, F, h, w); without gradients.
        weights: Of the layers' losses, (B, L) or for all samples (L,), each row of sum 1; None:
            equal.
        chosen: (B,) int64, the only layer that counts; None: all of them.
        probe: Input of the probe head, (B, sum of F), or for a task on maps (B, sum of F, h, w),
            with a gradient to the fusion's weights; None where these are not learned.
    """

    features: list[Tensor]
    weights: Tensor | None = None
    chosen: Tensor | None = None
    probe: Tensor | None = None

    def kept(self) -> Targets:
        """The same without gradients, for a later step."""
        return self if self.probe is None else replace(self, probe=self.probe.detach())


class Fusion(nn.Module):
    """Makes one target per lane out of a choice: ``sum_j w_lj z_lj`` over the slots j, per layer l.

    With ``weights: learned`` there is one logit per layer and timestep (of the grid and of
    ``fusion.timesteps``), and the softmax over those that a lane uses weighs them, as Luo et al.,
    "Diffusion Hyperfeatures", NeurIPS 2023, weigh layers and timesteps. As there, the task trains
    them: the gradient comes from the probe head's task loss alone. The distillation loss would make
    the target easy to match, not useful, so it gets the weights without their gradient.

    Args:
        config: Its section ``fusion``, and what has to fit it.
        layers: The teacher's layers.
        grid: What actions choose from.
        num_timesteps: Timesteps of the teacher.
        pooled: Whether the probe head reads averages; else it reads maps.

    Raises:
        ConfigError: The configuration does not fit the number of layers.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        layers: Sequence[str],
        grid: TimestepGrid,
        num_timesteps: int,
        pooled: bool = True,
    ) -> None:
        super().__init__()
        self.pooled = pooled
        # Only here the layers are known where the configuration leaves them to the teacher.
        known = replace(config, teacher=replace(config.teacher, layers=tuple(layers)))
        problems = fusion_rules.conflicts(known)
        if problems:
            raise ConfigError(problems)
        fusion = config.fusion
        self.layers, self.timesteps, self.mixture = tuple(layers), fusion.timesteps, fusion.mixture
        self._entries = (*grid.timesteps, *fusion.timesteps)
        device = grid.tensor.device
        self.logits: nn.Parameter | None = None
        if fusion.weights == "learned":
            self.logits = nn.Parameter(torch.zeros(len(layers), len(self._entries), device=device))
        shares = torch.tensor(fusion.layers, device=device)
        self._shares = shares / shares.sum() if len(fusion.layers) > 1 else None
        every = torch.arange(num_timesteps, device=device)
        self._nearest = (every[:, None] - grid.tensor).abs().argmin(1)  # (timesteps,)
        # The slots that are the same for every lane, as rows of the logits.
        self._constant = torch.arange(len(grid), len(self._entries), device=device)

    def choice(self, timesteps: Tensor) -> Choice:
        """The choice of one timestep (N,) per lane, of all layers."""
        return Choice(timesteps[:, None], self._nearest[timesteps][:, None])

    def forward(
        self,
        features: TeacherFeatures,
        bank: ImageBank,
        ids: Tensor,
        choice: Choice,
        visits: Tensor,
        noise_seed: int,
        images: Tensor | None = None,
        group: int = 1,
    ) -> Targets:
        """The targets of N lanes; one teacher forward per slot, whose features are not kept.

        Args:
            features: The teacher's, standardised.
            bank: Where ``ids`` point.
            ids: (N,) images.
            choice: What the actions chose.
            visits: (N,) keys of fresh noise.
            noise_seed: Seed of the noise.
            images: (N / group, C, H, W) in [-1, 1], what augmentation made of the images; None: as
                they are in the bank.
            group: So many neighbouring lanes hold the same image, which is encoded once.

        Raises:
            ValueError: ``fusion.mixture`` has another length than there are slots.
        """
        slots = choice.timesteps.shape[1] + len(self.timesteps)
        if self.mixture and len(self.mixture) != slots:
            raise ValueError(
                f"fusion.mixture: {len(self.mixture)} weights given, but a target has {slots} "
                f"timestep{'' if slots == 1 else 's'}"
            )
        mixture, weights = None, self._shares
        if self.logits is not None:
            mixture, weights = self._learned(self.logits, choice)
        if choice.layers is not None:
            places = torch.arange(len(self.layers), device=ids.device)
            weights = (choice.layers[:, None] == places).float()  # (N, L)
        at = torch.stack([self._at(slot, choice) for slot in range(slots)], dim=1)  # (N, T)
        fused: list[Tensor] = []
        pooled: list[Tensor] = []
        each = features.each(bank, ids, at, visits, noise_seed, images, group)
        for slot, found in enumerate(each):
            if slots == 1:
                fused = found
                pooled = [] if mixture is None else [self._seen(z) for z in found]
                break
            if mixture is None:
                fused = _summed(fused, [z * self._share(slot, slots) for z in found])
                continue
            shares = mixture[:, :, slot].unbind(1)  # L times (N,)
            terms = [z * _beside(w.detach(), z) for z, w in zip(found, shares, strict=True)]
            fused = _summed(fused, terms)
            # The gradient needs the features of all slots, but mostly only of their averages.
            seen = [self._seen(z) for z in found]
            terms = [z * _beside(w, z) for z, w in zip(seen, shares, strict=True)]
            pooled = _summed(pooled, terms)
        targets = Targets(fused, None if weights is None else weights.detach(), choice.layers)
        if self.logits is None:
            return targets
        return replace(targets, probe=_side_by_side(pooled, weights))

    def shares(self) -> dict[str, Tensor]:
        """The learned weights as metrics: of each layer and of each timestep, summing to 1 each."""
        if self.logits is None:
            return {}
        weights = self.logits.detach().flatten().softmax(0).view_as(self.logits)
        named = zip(self.layers, weights.sum(1), strict=True)
        found = {f"fusion/layer/{layer}": share for layer, share in named}
        for index, timestep in enumerate(self._entries):
            tag = f"fusion/timestep/{timestep}"
            share = weights[:, index].sum()
            # A timestep may stand in the grid and be part of every target.
            found[tag] = found[tag] + share if tag in found else share
        return found

    def _seen(self, z: Tensor) -> Tensor:
        """What the probe head reads of one layer."""
        return _pooled(z) if self.pooled else z

    def _at(self, slot: int, choice: Choice) -> Tensor:
        chosen = choice.timesteps.shape[1]
        if slot < chosen:
            return choice.timesteps[:, slot]
        return torch.full_like(choice.timesteps[:, 0], self.timesteps[slot - chosen])

    def _share(self, slot: int, slots: int) -> float:
        """The fixed weight of one slot."""
        return self.mixture[slot] / sum(self.mixture) if self.mixture else 1.0 / slots

    def _learned(self, logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """Mixture (N, L, T) within each layer, and the layers' weights (N, L)."""
        constant = self._constant.expand(len(choice.indices), -1)
        used = logits[:, torch.cat((choice.indices, constant), dim=1)].transpose(0, 1)  # (N, L, T)
        return used.softmax(2), used.logsumexp(2).softmax(1)


def probe_shape(layers: Sequence[tuple[int, int, int]], *, pooled: bool) -> tuple[int, int, int]:
    """The shape of one row of :func:`probe_input` for teacher layers of (F, h, w)."""
    width = sum(layer[0] for layer in layers)
    return (width, 1, 1) if pooled else (width, *_finest([layer[1:] for layer in layers]))


def probe_input(targets: Targets, *, pooled: bool = True) -> Tensor:
    """All layers side by side for the probe head: (B, sum of F), or maps (B, sum of F, h, w).

    Each is scaled by its weight, which is 1 on average over the layers that count; a layer that was
    not chosen is zeros.
    """
    if targets.probe is not None:
        return targets.probe
    features = [_pooled(z) for z in targets.features] if pooled else targets.features
    return _side_by_side(features, targets.weights)


def _side_by_side(features: list[Tensor], weights: Tensor | None) -> Tensor:
    if weights is not None:
        scale = weights * (weights > 0).sum(-1, keepdim=True)
        # where, since 0 times a non-finite feature of a layer nobody chose would not be 0.
        scales = [scale[..., layer, None] for layer in range(len(features))]
        features = [
            torch.where(_like(s, z) > 0, z * _like(s, z), 0.0)
            for s, z in zip(scales, features, strict=True)
        ]
    if features[0].ndim == 4:
        size = _finest([(z.shape[2], z.shape[3]) for z in features])
        features = [resized(z, size) for z in features]
    return torch.cat(features, dim=1)


def _finest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(size[0] for size in sizes), max(size[1] for size in sizes)


def _like(scale: Tensor, z: Tensor) -> Tensor:
    """(1,) or (B, 1) in the shape that multiplies (B, F) or (B, F, h, w)."""
    return scale.view(*scale.shape, *[1] * (z.ndim - 2))


def _pooled(z: Tensor) -> Tensor:
    return z.mean((2, 3)) if z.ndim == 4 else z


def _beside(share: Tensor, z: Tensor) -> Tensor:
    """A share (N,) in the shape that multiplies (N, ...)."""
    return share.view(-1, *[1] * (z.ndim - 1))


def _summed(total: list[Tensor], terms: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(total, terms, strict=True)] if total else terms
