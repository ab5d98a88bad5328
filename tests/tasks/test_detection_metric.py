"""Mean average precision against its definition, written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from repfusion_env.tasks.detection_metric import MeanPrecision

Array = np.ndarray[Any, Any]
CLASSES = ("nut", "bolt", "nail", "screw")
# Primes: no recall below 1 is one of the 101, at which rounding would decide.
OBJECTS = (7, 11, 13)
THRESHOLDS = np.arange(0.5, 1.0, 0.05)


def _overlap(first: Array, second: Array) -> float:
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:4], second[2:4])
    common = float(np.prod(np.clip(high - low, 0, None)))
    areas = [float(np.prod(box[2:4] - box[:2])) for box in (first, second)]
    return common / (sum(areas) - common)


def _average_precision(found: list[Array], known: list[Array], label: int, least: float) -> float:
    """The surest answers first, each takes the free object that it overlaps most."""
    judged: list[tuple[float, bool]] = []
    objects = 0
    for answers, image in zip(found, known, strict=True):
        free = [box for box in image if box[4] == label]
        objects += len(free)
        for answer in sorted((a for a in answers if a[4] == label), key=lambda a: -a[5]):
            overlaps = [_overlap(answer, box) for box in free]
            right = bool(overlaps) and max(overlaps) >= least
            if right:
                free.pop(int(np.argmax(overlaps)))
            judged.append((float(answer[5]), right))
    hits = np.cumsum([right for _, right in sorted(judged, key=lambda pair: -pair[0])])
    recall, precision = hits / objects, hits / np.arange(1, len(hits) + 1)
    # At each of 101 recalls the best precision at it or a higher one.
    best = [precision[recall >= at].max(initial=0.0) for at in np.linspace(0, 1, 101)]
    return float(np.mean(best))


def _scenes(seed: int) -> tuple[Array, Array]:
    """Objects (12, 5, 5) of three classes; answers (12, 100, 6), near them and elsewhere."""
    random = np.random.default_rng(seed)
    known, found = np.full((12, 5, 5), -1.0, "f4"), np.full((12, 100, 6), -1.0, "f4")
    labels = np.full(60, -1)
    labels[:31] = np.repeat(range(3), OBJECTS)
    labels = random.permutation(labels).reshape(12, 5)
    for objects, answers, own in zip(known, found, labels, strict=True):
        rows = []
        for place in np.flatnonzero(own >= 0):
            corner = random.uniform(0, 60, 2)
            box = [*corner, *(corner + random.uniform(8, 60, 2))]
            label = own[place]
            objects[place] = [*box, label]
            for _ in range(random.integers(0, 4)):
                said = label if random.random() < 0.8 else random.integers(0, 4)
                rows.append([*(box + random.normal(0, 3, 4)), said, random.random()])
        corner = random.uniform(0, 60, 2)
        rows.append([*corner, *(corner + 20), random.integers(0, 4), random.random()])
        answers[: len(rows)] = rows
    return known, found


@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_those_of_the_definition_over_all_batches(seed):
    known, found = _scenes(seed)
    metric = MeanPrecision(lambda outputs: outputs["answers"], CLASSES)
    for rows in (slice(0, 5), slice(5, 12)):
        metric.update({"answers": torch.from_numpy(found[rows])}, torch.from_numpy(known[rows]))
    values = metric.compute()
    answers, objects = ([row[row[:, 4] >= 0] for row in rows] for rows in (found, known))
    expected = {
        CLASSES[label]: [_average_precision(answers, objects, label, t) for t in THRESHOLDS]
        for label in range(3)
    }
    table = np.array(list(expected.values()))
    assert 0.05 < table.mean() < 0.95
    assert values == pytest.approx(
        {
            "map": table.mean(),
            "map_50": table[:, 0].mean(),
            "map_75": table[:, 5].mean(),
            # The fourth class has no object: what is said of it counts nowhere.
            **{f"map/{name}": np.mean(row) for name, row in expected.items()},
        },
        abs=1e-6,
    )
