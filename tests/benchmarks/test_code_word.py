"""The code word for the label, and its shuffled form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.code_word import main, measure
from repfusion_env.actions.choice import Choice
from repfusion_env.config_loading import load_config
from repfusion_env.trainer import DistillationTrainer


def test_a_code_follows_the_label_and_its_shuffled_form_the_same_counts(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    step = DistillationTrainer.step

    def watched(self: DistillationTrainer, ids: Tensor, choice: Choice, visits: Tensor) -> Any:
        seen.append((ids, self.parts.train.labels[ids] % 5, choice.indices[:, 0]))
        return step(self, ids, choice, visits)

    monkeypatch.setattr(DistillationTrainer, "step", watched)
    config = load_config(tiny | {"run": {"decisions": 40}, "env.num_envs": 8})
    result = measure(config, [0, 1])
    assert len(result["arms"]) == 5 and len(seen) == 20
    for code, shuffled in zip((*seen[:5], *seen[10:15]), (*seen[5:10], *seen[15:]), strict=True):
        assert torch.equal(code[1], code[2]) and torch.equal(code[0], shuffled[0])
        assert torch.equal(code[2].sort().values, shuffled[2].sort().values)
    assert any(not torch.equal(labels, chosen) for _, labels, chosen in seen)
    accuracy = result["quantities"]["linear probe accuracy, 50 labels"]
    assert accuracy["gain"]["mean"] == pytest.approx(
        sum(accuracy["code"]) / 2 - sum(accuracy["shuffled"]) / 2
    )


def test_single_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--seeds", "1"])
    assert "--seeds: 1 given; an interval needs 2 or more" in capsys.readouterr().err
