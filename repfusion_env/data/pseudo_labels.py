"""Pseudo-labels: clusters of what the frozen teacher sees in the clean images.

Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018, section
3.2, take k-means clusters for labels; here the features are the frozen teacher's, so they are
clustered once.

Shape letters: M images, N of one piece, D feature width, K clusters.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from repfusion_env.config import ExperimentConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.features import chunks, pooled_layers
from repfusion_env.noise import derive_seed
from repfusion_env.progress import watched
from repfusion_env.teachers.base import Teacher

if TYPE_CHECKING:
    from sklearn.base import ClusterMixin

# Above so many images k-means on all of them at once takes minutes and finds nothing better.
WHOLE_IMAGES = 20_000
MINI_BATCH = 4_096
RESTARTS = 4


def require_labels(bank: ImageBank, why: str) -> None:
    """Refuse images that came without classes.

    Args:
        bank: As its loader gave it.
        why: Who needs labels, e.g. ``"the supervised control"``.

    Raises:
        ValueError: The bank is unlabelled.
    """
    if not bank.labelled:
        raise ValueError(
            f"data.labels: the images of '{bank.name}' have no labels, and {why} needs them; stage "
            "1 alone does without, by data.labels clusters (pseudo-labels from the teacher's "
            "features)"
        )


def cluster_labels(
    config: ExperimentConfig, teacher: Teacher, train: ImageBank, heldout: ImageBank
) -> tuple[ImageBank, ImageBank]:
    """Both banks with the numbers of their clusters as labels.

    K-means on the pooled feature of the clean image at ``observation.timestep``, standardised per
    channel; fitted on the training images, then each held-out image takes its nearest centre. Its
    seed is fixed, so that all seeds of an experiment learn from the same labels.

    Raises:
        ValueError: There are more clusters than training images, or the features are not finite.
    """
    count = config.data.clusters
    if count > len(train):
        raise ValueError(
            f"data.clusters: {count:,} given, but there are only {len(train):,} training images"
        )
    features = _pooled(config, teacher, train)
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    fitted = _fit((features - mean) / deviation, count)
    classes = tuple(f"cluster {number}" for number in range(count))
    found = []
    for bank, raw in ((train, features), (heldout, _pooled(config, teacher, heldout))):
        labels = _predict(fitted, (raw - mean) / deviation)
        found.append(bank.relabelled(labels.to(bank.device), classes))
    return found[0], found[1]


@torch.no_grad()
def _pooled(config: ExperimentConfig, teacher: Teacher, bank: ImageBank) -> np.ndarray:
    """(M, D) float32 on the CPU."""
    timestep = config.observation.timestep
    ids = torch.arange(len(bank), device=bank.device)
    size = {} if config.teacher.batch_size is None else {"size": config.teacher.batch_size}
    rows = []
    parts = bank.announced(chunks(ids, **size))
    for part in watched(parts, len(ids), description="clusters", unit="images"):
        clean = teacher.encode(bank.pixels(part))
        maps = teacher.features(clean, torch.full_like(part, timestep))
        pooled = pooled_layers([maps[layer] for layer in teacher.layers])  # (N, D)
        rows.append(pooled.float().cpu().numpy())
    features = np.concatenate(rows)
    if not np.isfinite(features).all():
        raise ValueError(
            f"data.labels: the teacher's features of '{bank.name}' at timestep {timestep} are not "
            "all finite, so they cannot be clustered; teacher.precision bf16 or fp32 may help"
        )
    return features


def _fit(features: np.ndarray, count: int) -> ClusterMixin:
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    seed = derive_seed(0, "clusters") % 2**32
    settings: dict[str, Any] = {"n_clusters": count, "n_init": RESTARTS, "random_state": seed}
    if len(features) > WHOLE_IMAGES:
        model = MiniBatchKMeans(batch_size=MINI_BATCH, **settings)
    else:
        model = KMeans(**settings)
    with _one_thread(), warnings.catch_warnings():
        # Fewer different images than clusters leave some clusters empty, which harms nobody.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features)


def _predict(model: ClusterMixin, features: np.ndarray) -> torch.Tensor:
    with _one_thread():
        return torch.from_numpy(model.predict(features).astype(np.int64))  # type: ignore[attr-defined]


def _one_thread() -> Any:
    """Threads add up centres in the order in which they end; a resumed run needs the same sums."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped,unused-ignore]

    return threadpool_limits(limits=1)
