"""What is compiled, when it is used, and that nothing else knows of it."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from repfusion_env import compile_choice, compiling, load_config
from repfusion_env.compiling import CompiledForward, CompiledRegions, regions
from repfusion_env.frozen import build_frozen_parts
from repfusion_env.trainer import DistillationTrainer

TAP = "mid_block.resnets.1.conv2"


class Backend:
    """Compiles nothing, and counts what it was asked for and how often that ran."""

    def __init__(self) -> None:
        self.graphs = 0
        self.runs: list[int] = []

    def __call__(self, graph: Any, inputs: Any, **settings: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*given: Any) -> Any:
            self.runs.append(1)
            return graph.forward(*given)

        return run


COUNTING = Backend()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    # Always the same one, so that what a test has traced serves the next.
    COUNTING.runs.clear()
    monkeypatch.setattr(compiling, "BACKEND", COUNTING)
    return COUNTING


def _trainer(tiny: dict[str, Any], parts: Any = None, **overrides: Any) -> DistillationTrainer:
    config = load_config(load_config(tiny, {"env.num_envs": 8}), overrides)
    return DistillationTrainer(config, parts or build_frozen_parts(config))


def _batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 96, (size,), generator=generator)
    timesteps = torch.randint(0, 5, (size,), generator=generator) * 200
    return ids, timesteps, torch.arange(step * size, (step + 1) * size)


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


ON = {"speed.compile": "on"}


@pytest.mark.parametrize("taps", [(TAP,), ("mid_block", "down_blocks.1.resnets.0"), ("conv_in",)])
def test_regions_are_the_largest_parts_without_a_tap(tiny, taps):
    network = build_frozen_parts(load_config(tiny)).teacher.network
    found = dict(regions(network, frozenset(taps)))
    assert found
    called = {name for name, module in network.named_modules() if not hasattr(module, "append")}
    for path, module in found.items():
        assert not any(f"{tap}.".startswith(f"{path}.") for tap in taps)
        parent = path.rpartition(".")[0]
        # The next module around it that is ever called holds a tap, or is the whole network.
        while parent and parent not in called:
            parent = parent.rpartition(".")[0]
        assert not parent or any(f"{tap}.".startswith(f"{parent}.") for tap in taps)
        assert parent not in found
        assert list(module.children())
    assert "" not in found


def test_a_module_in_several_places_is_compiled_once_and_nowhere_where_it_is_tapped(backend):
    part = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    both = nn.Sequential(nn.Sequential(part, nn.ReLU()), nn.Sequential(part, nn.ReLU()))
    compiled = CompiledRegions(both, ("0.1", "1.1"), cuda_graphs=False)
    assert len(compiled.paths) == 1 and "forward" in vars(part)
    compiled.remove()
    assert all("forward" not in vars(module) for module in both.modules())
    assert not dict(regions(both, frozenset({"0.0"}))).keys() & {"0", "1", "0.0", "1.0"}


def test_a_compiled_step_is_the_plain_one_at_its_own_size_alone(tiny, learned, backend):
    settings = {"student.ema": 0.5}
    plain, trainer = _trainer(tiny, **settings), _trainer(tiny, **settings, **ON)
    assert backend.runs == []  # statistics are measured as they were
    names = list(plain.parts.teacher.network.state_dict()), list(plain.student.state_dict())
    for step in range(2):
        mine, theirs = trainer.step(*_batch(step)), plain.step(*_batch(step))
        assert torch.equal(mine.reward, theirs.reward)
    assert _same(learned(trainer), learned(plain))
    assert names == (
        list(trainer.parts.teacher.network.state_dict()),
        list(trainer.student.state_dict()),
    )
    ran = len(backend.runs)
    assert ran >= 2 * (2 + len(trainer.parts.teacher.compiled.paths) // 2)
    # Evaluation, statistics and other numbers of lanes.
    trainer.heldout_metrics(16)
    trainer.embed(torch.zeros(5, *trainer.parts.train.shape))
    ids, *chosen = _batch(3, size=4)
    trainer.judge(trainer.parts.heldout, ids % 40, *chosen)
    assert len(backend.runs) == ran


def test_compiled_regions_give_what_the_uncut_forward_gives(tiny, tiny_teacher, backend):
    trainer = _trainer(tiny, **ON)
    teacher, (ids, timesteps, _) = trainer.parts.teacher, _batch(0)
    images = trainer.parts.train.pixels(ids)
    (cut,) = teacher.features(images, timesteps).values()
    assert backend.runs
    found: list[torch.Tensor] = []
    unet = UNet2DModel.from_pretrained(tiny_teacher).eval()
    unet.get_submodule(TAP).register_forward_hook(lambda *given: found.append(given[2].clone()))
    with torch.no_grad():
        unet(images, timesteps)
    assert torch.equal(found[0], cut)


def test_a_copy_of_the_teachers_network_runs_its_own_weights(tiny, backend):
    teacher = _trainer(tiny, **ON).parts.teacher
    other = copy.deepcopy(teacher.network)
    path = teacher.compiled.paths[0]
    with torch.no_grad():
        for parameter in other.get_submodule(path).parameters():
            parameter.zero_()
    rows = torch.ones(8, 16)
    with teacher.compiled.at(8):
        assert other.get_submodule(path)(rows).abs().max() == 0
        assert backend.runs == []
        assert teacher.network.get_submodule(path)(rows).abs().max() > 0
        assert backend.runs == [1]


def test_a_copy_of_the_student_runs_its_own_weights(tiny, backend):
    trainer = _trainer(tiny, **ON, **{"student.ema": 0.9})
    trainer.step(*_batch(0))
    trainer.step(*_batch(1))
    assert trainer.student.compiled is not None
    assert trainer.average.compiled is None
    images = trainer.parts.train.pixels(torch.arange(8))
    with torch.no_grad():
        average = trainer.average.features(images)[-1]
        expected = trainer.average.backbone(images)["stage3"]
        student = trainer.student.eval().features(images)[-1]
    assert torch.equal(average, expected)
    assert not torch.allclose(average, student)


def test_starting_over_compiles_nothing_again(tiny, backend):
    trainer = _trainer(tiny, **ON)
    trainer.step(*_batch(0))
    graphs = backend.graphs
    assert graphs
    trainer.reset(1)
    trainer.step(*_batch(0))
    assert backend.graphs == graphs


def test_a_saved_trainer_goes_on_to_the_last_bit(tiny, learned, backend):
    trainer, resumed = _trainer(tiny, **ON), _trainer(tiny, **ON)
    trainer.step(*_batch(0))
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    ran = len(backend.runs)
    assert torch.equal(trainer.step(*_batch(1)).reward, resumed.step(*_batch(1)).reward)
    assert _same(learned(trainer), learned(resumed))
    assert len(backend.runs) > ran


def test_trainers_on_one_teacher_compile_it_for_themselves(tiny, backend):
    first = _trainer(tiny, **ON)
    _trainer(tiny, parts=first.parts)
    images, timesteps = first.parts.train.pixels(torch.arange(8)), torch.zeros(8, dtype=torch.int64)
    first.parts.teacher.features(images, timesteps)
    assert backend.runs == []
    first.reset(0)
    first.parts.teacher.features(images, timesteps)
    assert backend.runs


def test_a_teacher_of_another_making_may_be_a_module_with_a_method_of_that_name(tiny, backend):
    class Other(nn.Module):
        """Every module has a ``compile`` of torch's own."""

        def __getattr__(self, name: str) -> Any:
            return getattr(parts.teacher, name)

    parts = build_frozen_parts(load_config(tiny))
    trainer = _trainer(tiny, parts=replace(parts, teacher=Other()), **ON)
    assert trainer.student.compiled is not None and parts.teacher.compiled is None


def test_groups_and_earlier_decisions_decide_the_sizes(tiny, backend):
    grouped = {"env": {"num_envs": 8, "group_size": 2}, "optimizer.batch_size": 8}
    assert compile_choice.student_sizes(_trainer(tiny, **grouped)) == {4}
    few = {"env": {"num_envs": 4}, "optimizer.batch_size": 8}
    trainer = _trainer(tiny, **few, **ON, **{"teacher.batch_size": 3})
    assert compile_choice.student_sizes(trainer) == {8, 4}
    assert trainer.parts.teacher.compiled.sizes == {3}


def test_a_compiler_that_fails_is_told_of_once_and_left_alone(tiny, monkeypatch, learned):
    torch._dynamo.reset()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    monkeypatch.setattr(compiling, "_told", set())
    plain, trainer = _trainer(tiny), _trainer(tiny, **ON)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(2):
            trainer.step(*_batch(step))
            plain.step(*_batch(step))
    mine = [str(w.message) for w in told if "speed.compile" in str(w.message)]
    assert len(mine) == 1
    assert "no compiler here" in mine[0]
    assert _same(learned(trainer), learned(plain))


def test_what_is_wrong_with_the_inputs_is_told_by_the_network_itself(backend):
    forward = CompiledForward(nn.Sequential(nn.Linear(3, 2)), cuda_graphs=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        forward(torch.zeros(2, 5))
    assert forward(torch.zeros(2, 3)).shape == (2, 2)


def test_compiling_leaves_the_callers_random_state_alone(tiny, backend):
    trainer = _trainer(tiny, **ON)
    torch._dynamo.reset()
    torch.manual_seed(3)
    random.seed(3)
    before, graphs = (torch.get_rng_state(), random.getstate()), backend.graphs
    trainer.step(*_batch(0))
    assert backend.graphs > graphs
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_auto_counts_the_runs_operations(tiny, monkeypatch, backend):
    trainer = _trainer(tiny, precision="bf16", **{"speed.compile": "auto"})
    assert trainer.student.compiled is None  # far too short a run
    flops = compile_choice.decision_flops(trainer)
    for threshold, compiled in ((flops * 400 * 0.99, True), (flops * 400 * 1.01, False)):
        monkeypatch.setitem(compile_choice.WORTHWHILE, "cpu", threshold)
        trainer.reset(0)
        assert (trainer.student.compiled is not None) == compiled
    monkeypatch.setitem(compile_choice.WORTHWHILE, "cpu", 0.0)
    slow = _trainer(tiny, **{"speed.compile": "auto"})
    assert slow.student.compiled is None


def test_operations_of_a_decision_are_those_of_its_forwards(tiny):
    counted = compile_choice.decision_flops
    looks = {"env.action": "timestep_set", "env.set_size": 2}
    one, two = (counted(_trainer(tiny, **more)) for more in ({}, looks))
    teacher = two - one
    student = (one - teacher) / 4
    again = counted(_trainer(tiny, **{"optimizer.updates": 2, "reward.student": "training"}))
    assert teacher > 0 < student
    assert again == pytest.approx(teacher + 6 * student)
    cached = counted(_trainer(tiny, **{"cache": "memory", "teacher.input": "clean"}))
    assert cached == pytest.approx(4 * student)


@pytest.mark.slow
def test_the_real_compiler_gives_the_plain_step_to_rounding(tiny):
    torch._dynamo.reset()
    settings = {"optimizer.name": "sgd", "precision": "bf16", "channels_last": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        plain, trainer = _trainer(tiny, **settings), _trainer(tiny, **settings, **ON)
        mine, theirs = trainer.step(*_batch(0)), plain.step(*_batch(0))
    torch.testing.assert_close(mine.distillation_loss, theirs.distillation_loss, rtol=0.1, atol=0.1)
    torch.testing.assert_close(mine.reward, theirs.reward, rtol=0.1, atol=0.1)
    assert trainer.student.compiled._forward._run is not None
