"""Rewards: what a decision was worth, one number per lane, larger is better.

Each rule is a function of a :class:`Measurement`; what it needs measured stands beside it, so that
the trainer runs no forward whose result nobody reads.

Shape letters: N lanes, L teacher layers, S student width, F teacher width, H,W positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repfusion_env.config import RewardConfig
from repfusion_env.losses import DistillationLoss


@dataclass(frozen=True)
class Measurement:
    """One step's outcome for N lanes; no gradient flows to any parameter.

    Attributes:
        student: Student features after the step's update, in inference mode, that are matched:
            one ``(N, S)``, or ``(N, S, H, W)`` of one or several stages where positions matter.
            None unless the rule asks for it.
        teacher: Targets per layer, at the resolution at which they are matched.
        project: From features as in ``student`` to every layer's; what the student's other stages
            add is fixed per lane.
        jacobians: Derivatives (F, S) of ``project`` per layer where they are the same everywhere;
            None otherwise.
        sources: For each layer, which of ``student`` its Jacobian is by; none: the only one.
        loss: The configured distillation loss.
        task_losses: Task loss per lane of student features as given in ``student``.
        loss_before: Task loss before the update (N,).
        loss_after: Task loss after the update (N,), or None.
        probe_loss: Loss of the task head on the teacher's feature (N,), or None.
        config: Damping, eta, kind of look-ahead.
        ids: (N,) images of the training bank; None for others.
        weights: Of the layers' losses, (L,) or per lane (N, L), of sum 1; None: equal.
        chosen: (N,) the only layer that counts for a lane; None: all of them.
        others: From pooled features (N, ...) of these lanes to those that a loss compares them
            with: the same, with other ranks' lanes behind them.
    """

    student: list[Tensor] | None
    teacher: list[Tensor]
    project: Callable[[list[Tensor]], list[Tensor]]
    jacobians: list[Tensor] | None
    loss: DistillationLoss
    task_losses: Callable[[list[Tensor]], Tensor]
    loss_before: Tensor
    loss_after: Tensor | None
    probe_loss: Tensor | None
    config: RewardConfig
    ids: Tensor | None = None
    weights: Tensor | None = None
    chosen: Tensor | None = None
    sources: tuple[int, ...] = ()
    others: Callable[[Tensor], Tensor] = lambda own: own


@dataclass(frozen=True)
class RewardRule:
    """A reward and what must be measured for it.

    Attributes:
        compute: From the measurement to the rewards (N,).
        after: Needs the student's features after the update.
        before: Needs the task loss before the update in inference mode.
        probe: Needs the task head on the teacher's feature.
        attributable: Depends on the lane's own timestep even when nothing is trained, so that it
            can judge a policy on held-out images.
    """

    compute: Callable[[Measurement], Tensor]
    after: bool = False
    before: bool = False
    probe: bool = False
    attributable: bool = False


def look_ahead(measured: Measurement) -> list[Tensor]:
    """The student features that distilling each lane's teacher feature leads to.

    For squared residuals (``hint``) of a linear projection the damped Gauss-Newton move (Levenberg
    1944, Marquardt 1963) ``h' = h - J^T (J J^T + lambda I)^-1 (P(h) - z)`` with the projection's
    weight as J, all layers stacked and each scaled by the root of its weight (1 on average), or the
    lane's chosen layer alone; on dense features the same move at each position; where layers are
    matched with several stages, each stage by its own layers. ``l1`` has the same minimiser and
    takes the same move. Any other loss ``l``, or any loss behind another projection, is one
    residual ``sqrt(2 l)`` per sample, whose Gauss-Newton move is
    ``h' = h - 2 l g / (|g|^2 + 2 lambda l)``, ``g`` the gradient of ``l``.
    With ``lookahead: gradient`` the move is ``-eta * g``, scaled by the number of residuals so that
    it does not shrink with the feature's width.

    Returns:
        Features of the shape of ``measured.student``.
    """
    if measured.config.lookahead == "gauss_newton":
        if measured.jacobians is not None and measured.loss.names <= {"hint", "l1"}:
            return _residual_move(measured, measured.jacobians)
        return _scalar_move(measured)
    _, gradients = _loss_gradient(measured)
    assert measured.student is not None
    pairs = zip(measured.student, gradients, strict=True)
    return [feature - measured.config.eta * gradient for feature, gradient in pairs]


def _residual_move(measured: Measurement, jacobians: list[Tensor]) -> list[Tensor]:
    assert measured.student is not None
    targets = zip(measured.project(measured.student), measured.teacher, strict=True)
    residuals = [p - z for p, z in targets]
    sources = measured.sources or (0,) * len(residuals)
    return [
        h - _stage_step(measured, h, [source == stage for source in sources], jacobians, residuals)
        for stage, h in enumerate(measured.student)
    ]


def _stage_step(
    measured: Measurement,
    h: Tensor,
    mine: list[bool],
    jacobians: list[Tensor],
    residuals: list[Tensor],
) -> Tensor:
    """The step of one stage's feature ``h`` by the layers that are matched with it (``mine``)."""
    weights, damping, count = measured.weights, measured.config.damping, len(residuals)
    if measured.chosen is not None:
        steps = [
            _step(_damped(jacobian, damping), residual) if own else torch.zeros_like(h)
            for jacobian, residual, own in zip(jacobians, residuals, mine, strict=True)
        ]
        return torch.stack(steps)[measured.chosen, torch.arange(len(h), device=h.device)]
    kept = [index for index, own in enumerate(mine) if own]
    jacobians, residuals = [jacobians[i] for i in kept], [residuals[i] for i in kept]
    if weights is not None:
        # Not by a list of places, which would have to be sent to the device each step.
        weights = torch.stack([weights[..., i] for i in kept], dim=-1) * count
    if weights is not None and weights.ndim == 2:
        return _weighted_step(jacobians, residuals, weights, damping)
    if weights is not None:
        roots = weights.sqrt()
        jacobians = [jacobian * root for jacobian, root in zip(jacobians, roots, strict=True)]
        residuals = [residual * root for residual, root in zip(residuals, roots, strict=True)]
    return _step(_damped(torch.cat(jacobians), damping), torch.cat(residuals, dim=1))


def _damped(jacobian: Tensor, damping: float) -> Tensor:
    """``J^T (J J^T + lambda I)^-1``, (F, S) -> (S, F)."""
    eye = damping * torch.eye(min(jacobian.shape), dtype=jacobian.dtype, device=jacobian.device)
    # J^T (J J^T + l I)^-1 = (J^T J + l I)^-1 J^T; the smaller matrix is factored. cholesky_ex does
    # not wait for the device to report success, and the damped matrix is positive definite.
    if jacobian.shape[0] <= jacobian.shape[1]:
        factor, _ = torch.linalg.cholesky_ex(jacobian @ jacobian.T + eye)
        return torch.cholesky_solve(jacobian, factor).T
    factor, _ = torch.linalg.cholesky_ex(jacobian.T @ jacobian + eye)
    return torch.cholesky_solve(jacobian.T, factor)


def _step(move: Tensor, residual: Tensor) -> Tensor:
    """(S, F) applied to (N, F), or at each position of (N, F, H, W)."""
    if residual.ndim == 4:
        return torch.einsum("sf,nfhw->nshw", move, residual)
    return residual @ move.T


def _weighted_step(
    jacobians: list[Tensor], residuals: list[Tensor], weights: Tensor, damping: float
) -> Tensor:
    """The step where each lane weighs the layers by its own ``weights`` (N, L)."""
    jacobian, residual = torch.cat(jacobians), torch.cat(residuals, dim=1)
    lanes, positions = len(residual), residual.shape[2:]
    columns = [w[:, None].expand(-1, len(j)) for w, j in zip(weights.T, jacobians, strict=True)]
    roots = torch.cat(columns, dim=1).sqrt()  # (N, F)
    residual = residual.reshape(lanes, len(jacobian), -1) * roots[:, :, None]  # (N, F, H*W)
    eye = damping * torch.eye(min(jacobian.shape), dtype=jacobian.dtype, device=jacobian.device)
    if jacobian.shape[0] <= jacobian.shape[1]:
        gram = roots[:, :, None] * (jacobian @ jacobian.T) * roots[:, None]
        factor, _ = torch.linalg.cholesky_ex(gram + eye)
        solved = torch.cholesky_solve(residual, factor)
        step = jacobian.T @ (solved * roots[:, :, None])
    else:
        grams = torch.stack([j.T @ j for j in jacobians])
        factor, _ = torch.linalg.cholesky_ex(torch.einsum("nl,lst->nst", weights, grams) + eye)
        step = torch.cholesky_solve(jacobian.T @ (residual * roots[:, :, None]), factor)
    return step.reshape(lanes, jacobian.shape[1], *positions)


def _loss_gradient(measured: Measurement) -> tuple[Tensor, list[Tensor]]:
    """Loss per lane (N,) and its gradients by the lane's own features."""
    assert measured.student is not None
    lanes = torch.arange(len(measured.student[0]), device=measured.student[0].device)
    counts = [z[0].numel() for z in measured.teacher]
    with torch.enable_grad():
        h = [feature.detach().clone().requires_grad_() for feature in measured.student]
        losses = []
        for index, (p, z) in enumerate(zip(measured.project(h), measured.teacher, strict=True)):
            # Related samples stay where they are: this lane's move is its own timestep's doing.
            others = measured.others
            anchors = (others(p.detach()), others(z)) if z.ndim == 2 else None
            losses.append(measured.loss.layer(index, p, z, anchors=anchors, ids=measured.ids))
        if measured.chosen is not None:
            total = torch.stack(losses)[measured.chosen, lanes]
        elif measured.weights is not None:
            total = (torch.stack(losses, 1) * measured.weights).sum(1) * len(losses)
        else:
            total = sum(losses[1:], losses[0])
        gradients = torch.autograd.grad(total.sum(), h)
    total = total.detach()
    if measured.chosen is None:
        return total * sum(counts), [gradient * sum(counts) for gradient in gradients]
    # Selected by comparison: a table of the counts would have to be sent to the device each step.
    residuals = torch.zeros_like(total)
    for index, count in enumerate(counts):
        residuals = residuals + count * (measured.chosen == index)
    return total * residuals, [_per_lane(residuals, g) * g for g in gradients]


def _scalar_move(measured: Measurement) -> list[Tensor]:
    assert measured.student is not None
    loss, gradients = _loss_gradient(measured)
    norms = [gradient.flatten(1).square().sum(1) for gradient in gradients]
    norm = sum(norms[1:], norms[0])
    scale = 2.0 * loss / (norm + 2.0 * measured.config.damping * loss).clamp_min(1e-12)
    pairs = zip(measured.student, gradients, strict=True)
    return [feature - _per_lane(scale, feature) * gradient for feature, gradient in pairs]


def _per_lane(values: Tensor, feature: Tensor) -> Tensor:
    """(N,) in the shape that multiplies (N, ...)."""
    return values.view(-1, *[1] * (feature.ndim - 1))


def _student_lookahead(measured: Measurement) -> Tensor:
    return -measured.task_losses(look_ahead(measured))


def _student(measured: Measurement) -> Tensor:
    assert measured.loss_after is not None
    return -measured.loss_after


def _student_gain(measured: Measurement) -> Tensor:
    assert measured.loss_after is not None
    return measured.loss_before - measured.loss_after


def _teacher_probe(measured: Measurement) -> Tensor:
    assert measured.probe_loss is not None
    return -measured.probe_loss


student_lookahead = RewardRule(_student_lookahead, after=True, attributable=True)
student = RewardRule(_student, after=True)
student_gain = RewardRule(_student_gain, after=True, before=True)
teacher_probe = RewardRule(_teacher_probe, probe=True, attributable=True)
