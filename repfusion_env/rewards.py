"""Rewards: what a decision was worth, one number per lane, larger is better.

Each rule is a function of a :class:`Measurement`; what it needs measured stands beside it, so that
the trainer runs no forward whose result nobody reads.

Shape letters: N lanes, S student width, F teacher width (all layers together), H,W positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repfusion_env.config import RewardConfig
from repfusion_env.losses import DistillationLoss
from students import Projection


@dataclass(frozen=True)
class Measurement:
    """One step's outcome for N lanes; no gradient flows to any parameter.

    Attributes:
        student: Student features after the step's update, in inference mode: ``(N, S)``, or
            ``(N, S, H, W)`` for dense distillation. None unless the rule asks for it.
        teacher: Standardised teacher features per layer on the student's positions.
        projections: From the student's width to each layer's.
        loss: The configured distillation loss.
        task_losses: Task loss per lane of student features as given in ``student``.
        loss_before: Task loss before the update (N,).
        loss_after: Task loss after the update (N,), or None.
        probe_loss: Loss of the task head on the teacher's feature (N,), or None.
        config: Damping, eta, kind of look-ahead.
    """

    student: Tensor | None
    teacher: list[Tensor]
    projections: list[Projection]
    loss: DistillationLoss
    task_losses: Callable[[Tensor], Tensor]
    loss_before: Tensor
    loss_after: Tensor | None
    probe_loss: Tensor | None
    config: RewardConfig


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


def look_ahead(measured: Measurement) -> Tensor:
    """The student feature that distilling each lane's teacher feature leads to.

    For squared residuals (``hint``) the damped Gauss-Newton move (Levenberg 1944, Marquardt 1963)
    ``h' = h - J^T (J J^T + lambda I)^-1 (P(h) - z)`` with the projection's weight as J, all layers
    stacked; on dense features the same move at each position. ``l1`` has the same minimiser and
    takes the same move. Any other loss ``l`` is one residual ``sqrt(2 l)`` per sample, whose
    Gauss-Newton move is ``h' = h - 2 l g / (|g|^2 + 2 lambda l)``, ``g`` the gradient of ``l``.
    With ``lookahead: gradient`` the move is ``-eta * g``, scaled by the number of residuals so that
    it does not shrink with the feature's width.

    Returns:
        Features of the shape of ``measured.student``.
    """
    if measured.config.lookahead == "gauss_newton":
        if measured.loss.names <= {"hint", "l1"}:
            return _residual_move(measured)
        return _scalar_move(measured)
    _, gradient = _loss_gradient(measured)
    assert measured.student is not None
    return measured.student - measured.config.eta * gradient


def _residual_move(measured: Measurement) -> Tensor:
    h = measured.student
    assert h is not None
    jacobian = torch.cat([projection.weight for projection in measured.projections])  # (F, S)
    residual = torch.cat(
        [p(h) - z for p, z in zip(measured.projections, measured.teacher, strict=True)], dim=1
    )
    eye = torch.eye(min(jacobian.shape), dtype=jacobian.dtype, device=h.device)
    damping = measured.config.damping * eye
    # J^T (J J^T + l I)^-1 = (J^T J + l I)^-1 J^T; the smaller matrix is factored. cholesky_ex does
    # not wait for the device to report success, and the damped matrix is positive definite.
    if jacobian.shape[0] <= jacobian.shape[1]:
        factor, _ = torch.linalg.cholesky_ex(jacobian @ jacobian.T + damping)
        move = torch.cholesky_solve(jacobian, factor).T  # (S, F)
    else:
        factor, _ = torch.linalg.cholesky_ex(jacobian.T @ jacobian + damping)
        move = torch.cholesky_solve(jacobian.T, factor)  # (S, F)
    if h.ndim == 4:
        return h - torch.einsum("sf,nfhw->nshw", move, residual)
    return h - residual @ move.T


def _loss_gradient(measured: Measurement) -> tuple[Tensor, Tensor]:
    """Loss per lane (N,) and its gradient by the lane's own feature."""
    assert measured.student is not None
    fixed = measured.student.detach()
    with torch.enable_grad():
        h = fixed.clone().requires_grad_()
        total = torch.zeros(h.shape[0], device=h.device)
        for projection, z in zip(measured.projections, measured.teacher, strict=True):
            # Related samples stay where they are: this lane's move is its own timestep's doing.
            anchors = (projection(fixed).detach(), z) if h.ndim == 2 else None
            total = total + measured.loss(projection(h), z, anchors)
        (gradient,) = torch.autograd.grad(total.sum(), h)
    residuals = sum(z[0].numel() for z in measured.teacher)
    return total.detach() * residuals, gradient * residuals


def _scalar_move(measured: Measurement) -> Tensor:
    assert measured.student is not None
    loss, gradient = _loss_gradient(measured)
    norm = gradient.flatten(1).square().sum(1)
    scale = 2.0 * loss / (norm + 2.0 * measured.config.damping * loss).clamp_min(1e-12)
    return measured.student - scale.view(-1, *[1] * (gradient.ndim - 1)) * gradient


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
