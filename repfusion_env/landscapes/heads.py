"""Linear heads on features, fitted on the device: what a class label can be read from.

Shape letters: n rows (an image under one noise draw each), F feature width, C classes, P problems
that are solved at once, M images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from repfusion_env.stage2.labels import labelled_subset

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5
ITERATIONS = 50
# More draws of an image teach a head little, and cost as much as more images.
FITTED_DRAWS = 2


@dataclass(frozen=True)
class HeadReport:
    """What heads on one layer's features at one timestep make of the labels.

    Attributes:
        accuracy: On the held-out images, over all draws, of the head that learned from all labels.
        strength: The L2 strength that was chosen on a validation split of the training labels.
        train_losses: Cross-entropy of each training image by a head that never saw it, (D, M).
        heldout_losses: Cross-entropy of each held-out image, (D, M').
    """

    accuracy: float
    strength: float
    train_losses: Tensor
    heldout_losses: Tensor


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, use: Tensor, strengths: Tensor
) -> Tensor:
    """Multinomial logistic regressions: ``mean CE + strength / 2 |W|^2``, by L-BFGS.

    Args:
        features: (n, F), standardised.
        labels: (n,) int64.
        classes: C.
        use: (P, n) of 0 and 1, the rows that each problem learns from.
        strengths: (P,).

    Returns:
        Weights (P, F + 1, C), the last row the bias, which is not penalised.
    """
    rows, width = features.shape
    inputs = torch.cat((features, torch.ones_like(features[:, :1])), dim=1)
    share = (use / use.sum(1, keepdim=True)).T  # (n, P)
    answers = functional.one_hot(labels, classes).to(features.dtype)[:, None]  # (n, 1, C)
    weights = torch.zeros(width + 1, len(use), classes, device=features.device, requires_grad=True)
    penalty = torch.cat((strengths.expand(width, -1), torch.zeros_like(strengths)[None]))[..., None]
    solver = torch.optim.LBFGS(
        [weights],
        max_iter=ITERATIONS,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        # The gradient is written out: autograd would take twice the time.
        values = weights.detach()
        scores = (inputs @ values.flatten(1)).view(rows, len(use), classes).log_softmax(-1)
        losses = -(scores * answers).sum(-1)  # (n, P)
        errors = (scores.exp_() - answers).mul_(share[..., None])
        gradient = (inputs.T @ errors.flatten(1)).view_as(values)
        weights.grad = gradient.add_(penalty * values)
        return (losses * share).sum() + 0.5 * (penalty * values.square()).sum()

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach().transpose(0, 1).contiguous()


def judge_features(
    train: Tensor,
    train_labels: Tensor,
    heldout: Tensor,
    heldout_labels: Tensor,
    folds: Tensor,
    classes: int,
) -> HeadReport:
    """Heads of one (layer, timestep).

    Features are standardised by the labelled training images, of which heads learn from at most two
    draws. The strength of the regularisation is
    chosen by the cross-entropy on one fold of the labelled images; then each fold is judged by a
    head that learned from the others, and everything else by one that learned from all of them.

    Args:
        train: (D, M, F), D noise draws.
        train_labels: (M,).
        heldout: (D, M', F).
        heldout_labels: (M',).
        folds: (M,) the fold of each labelled training image, -1 without a label.
        classes: C.
    """
    draws = len(train)
    labelled = folds >= 0
    known = train[:FITTED_DRAWS, labelled].flatten(0, 1)
    mean, deviation = known.mean(0), known.std(0)
    deviation = deviation.clamp_min(1e-6 + 1e-3 * float(deviation.mean()))
    train, heldout = (train - mean) / deviation, (heldout - mean) / deviation
    known = train[:FITTED_DRAWS, labelled].flatten(0, 1)
    fold_of = folds[labelled].repeat(min(draws, FITTED_DRAWS))  # (n,)
    answers = train_labels[labelled].repeat(min(draws, FITTED_DRAWS))
    strengths = torch.tensor(STRENGTHS, device=train.device)

    kept = (fold_of != 0).float().expand(len(strengths), -1)
    weights = fit_logistic(known, answers, classes, kept, strengths)
    validation = torch.stack(
        [_losses(known[fold_of == 0], answers[fold_of == 0], each).mean() for each in weights]
    )
    strength = strengths[validation.argmin()]

    # The last problem holds nothing out.
    outside = torch.arange(-1, FOLDS, device=train.device).roll(-1)  # 0 ... FOLDS - 1, -1
    use = (fold_of != outside[:, None]).float()
    weights = fit_logistic(known, answers, classes, use, strength.expand(len(use)))
    train_losses = _losses(train, train_labels.expand(draws, -1), weights[-1])
    for fold in range(FOLDS):
        mine = folds == fold
        if bool(mine.any()):
            answers_here = train_labels[mine].expand(draws, -1)
            train_losses[:, mine] = _losses(train[:, mine], answers_here, weights[fold])
    heldout_losses = _losses(heldout, heldout_labels.expand(draws, -1), weights[-1])
    correct = _logits(heldout, weights[-1]).argmax(-1) == heldout_labels
    return HeadReport(float(correct.float().mean()), float(strength), train_losses, heldout_losses)


def balanced_folds(labels: Tensor, count: int | None, seed: int) -> Tensor:
    """A fold for each labelled image, every class spread evenly over folds; -1 for the others.

    Args:
        labels: (M,).
        count: How many images have a label, class-balanced as far as there are images; None: all.
        seed: Of the choice.
    """
    wanted = len(labels) if count is None else min(count, len(labels))
    chosen = labelled_subset(labels, wanted, seed)
    by_class = chosen[labels[chosen].argsort(stable=True)]
    folds = torch.full_like(labels, -1)
    folds[by_class] = torch.arange(wanted, device=labels.device) % FOLDS
    return folds


def _logits(features: Tensor, weights: Tensor) -> Tensor:
    return features @ weights[:-1] + weights[-1]


def _losses(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy in nats of (..., F) under weights (F + 1, C)."""
    logits = _logits(features, weights)
    return -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
