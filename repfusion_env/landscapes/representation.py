"""Numbers that tell representations apart without a label: rank, norm, similarity.

Shape letters: M images, F feature width, T timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def effective_rank(features: Tensor) -> float:
    """Effective rank of features (M, F) around their mean: in [1, min(F, M - 1)].

    The exponential of the Shannon entropy of the singular values, normalised to sum 1 (Roy &
    Vetterli, "The effective rank", EUSIPCO 2007).
    """
    centred = features.double() - features.double().mean(0)
    values = torch.linalg.svdvals(centred)
    shares = values / values.sum().clamp_min(1e-300)
    return float(torch.special.entr(shares).sum().exp())


def mean_norm(features: Tensor) -> float:
    """Mean Euclidean norm of features (M, F)."""
    return float(features.double().norm(dim=1).mean())


def spread_share(features: Tensor) -> float:
    """Part of the mean squared norm that differs between images, in [0, 1]; features (M, F).

    Near 0 all images look alike to the layer, whatever the norm.
    """
    values = features.double()
    total = values.square().sum(1).mean()
    return float(values.var(0, correction=0).sum() / total.clamp_min(1e-300))


def linear_cka(sets: Sequence[Tensor], *, debiased: bool = False) -> Tensor:
    """Linear centred kernel alignment between representations of the same images.

    Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, eq. 1
    and 3. The debiased form takes the unbiased estimator of HSIC (Song et al., "Feature Selection
    via Dependence Maximization", JMLR 2012, eq. 5; Nguyen et al., ICLR 2021), without which few
    images and wide features look similar by chance; it may fall slightly below 0.

    Args:
        sets: T representations (M, F), of any widths; M is 4 or more.
        debiased: Which form.

    Returns:
        (T, T) float64, symmetric, with ones on the diagonal.
    """
    count = len(sets[0])
    rows = []
    for features in sets:
        centred = features.double() - features.double().mean(0)
        gram = centred @ centred.T  # (M, M)
        if debiased:
            gram.fill_diagonal_(0.0)
            # U-centred, kernels have the unbiased HSIC as inner product (Szekely & Rizzo, 2014).
            means = gram.sum(0) / (count - 2)
            gram = gram - means[:, None] - means[None] + gram.sum() / ((count - 1) * (count - 2))
            gram.fill_diagonal_(0.0)
        rows.append(gram.flatten().float())
    flat = torch.stack(rows)
    products = (flat @ flat.T).double()
    scale = products.diagonal().clamp_min(1e-300).sqrt()
    return (products / scale[:, None] / scale[None]).cpu()
