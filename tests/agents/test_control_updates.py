"""Controls share the section ``optimizer`` with distilled students, its ``updates`` too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agents.controls import ControlTrainer
from repfusion_env.config_loading import load_config, merge


@pytest.mark.parametrize("method", ["simclr", "supervised"])
def test_two_updates_are_two_steps_on_the_same_images(method: str, tiny: dict[str, Any]) -> None:
    more = {"env.num_envs": 8, "contrastive.hidden": 16, "contrastive.projection": 8}
    twice, once = (
        ControlTrainer(load_config("digits", merge(tiny, more | {"optimizer.updates": n})), method)
        for n in (2, 1)
    )
    if method == "simclr":
        # Views are drawn anew for each update; without any both see the same.
        for control in (twice, once):
            control.contrastive.views.forward = lambda images: images
    twice.step()
    once.step()
    first = once.drain_metrics()
    once.stream.reset(once.config.seed)
    once.steps = 0
    once.step()
    pairs = zip(twice.student.parameters(), once.student.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert twice.drain_metrics() == first
    assert twice.steps == 1
