"""The comparison of losses: its students, its intervals, its table."""

from __future__ import annotations

import pytest

from benchmarks import losses


def test_a_student_is_probed_and_one_step_changes_it():
    untrained, random, fixed = (
        losses.student_accuracy(name, 0, 3, timestep, "debug")
        for name, timestep in ((losses.UNTRAINED, 200), ("l1", None), ("l1", 200))
    )
    assert list(untrained) == [50, 200, 1400]
    assert 0.2 < untrained[50] < 1
    assert untrained != random and random != fixed and fixed != untrained


def test_the_interval_is_students_and_the_difference_is_paired():
    # Of three values 1, 2, 3: deviation 1, t quantile 4.303, over the root of 3.
    assert losses.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.484), abs=1e-3)
    hint = [dict.fromkeys(losses.LABELS, value) for value in (0.5, 0.7)]
    crd = [dict.fromkeys(losses.LABELS, value + 0.1) for value in (0.5, 0.7)]
    head, _, first, second = losses.table({"hint": hint, "crd": crd}).splitlines()
    assert head.startswith("| loss | 50 labels | 200 labels | 1400 labels | minus hint")
    assert first == f"| hint |{' 60.0 ± 127.1 |' * 3}  |"
    assert second.endswith("| +10.0 [+10.0, +10.0] |")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "1"], "an interval needs 2 or more"),
        (["--jobs", "0"], "--jobs: 0 given; it must be 1 or more"),
        (["--timestep", "90"], "--timestep: '90' given; random or one of 0, 40, 80"),
        (["--json", "nowhere/x.json"], "there is no folder 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        losses.main(arguments)
    assert sentence in capsys.readouterr().err
