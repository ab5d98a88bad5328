from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import together
from torch import Tensor, nn

from repfusion_env import rank_memory, rank_slots
from repfusion_env.config_loading import load_config
from repfusion_env.rank_group import RankGroup
from repfusion_env.rank_norm import RankBatchNorm, share_norms
from repfusion_env.rank_rules import conflicts, device_conflicts
from repfusion_env.rank_slots import SharedSlots
from repfusion_env.ranks import ALONE, OtherRankError, Ranks, launched, refuse_several, say
from repfusion_env.vector_env import RepFusionVectorEnv

LAYERS = ["down_blocks.0.resnets.0", "mid_block.resnets.1.conv2"]


def rank(index: int, count: int) -> Ranks:
    """One that only takes its share."""
    found = Ranks()
    found.index, found.count = index, count
    return found


def test_shares_are_neighbouring_lanes_of_every_step():
    values = torch.arange(12).view(12, 1)
    assert rank(1, 3).share(values)[:, 0].tolist() == [4, 5, 6, 7]
    assert rank(1, 3).share(values, blocks=2)[:, 0].tolist() == [2, 3, 8, 9]
    assert ALONE.share(values) is values


@pytest.mark.parametrize("blocks", [1, 2])
def test_what_was_shared_comes_together_in_the_same_order(blocks: int):
    def work(ranks: Ranks) -> Any:
        values = torch.arange(24.0).view(12, 2)
        own = ranks.share(values, blocks)
        flags = ranks.all((own[:, 0] > 5), blocks)
        own_first = ranks.all_own_first(own)
        return [ranks.all(own, blocks), flags, own_first[: len(own)] - own]

    for found, flags, difference in together(work, 2):
        assert torch.equal(found, torch.arange(24.0).view(12, 2))
        assert torch.equal(flags, torch.arange(24.0).view(12, 2)[:, 0] > 5)
        assert not difference.any()


def test_small_exchanges_are_the_same_by_shared_memory_and_by_gloo():
    def work(ranks: Ranks) -> Any:
        assert isinstance(ranks, RankGroup)
        generator = torch.Generator().manual_seed(ranks.index)
        given = [
            torch.randn(5, 3, generator=generator),
            torch.randn(2, 4, generator=generator).bfloat16(),
            torch.arange(7) * (1 + ranks.index),
            torch.arange(3) > ranks.index,
        ]
        found = []
        for slots in (ranks._slots, None):
            ranks._slots = slots
            sums = [given[0].clone(), given[2].clone()]
            ranks.sum_(sums)
            gathered = [ranks.all(values) for values in given]
            found.append([*gathered, *sums, torch.tensor(ranks.any(ranks.index == 2))])
        return found

    for shared, plain in together(work, 3):
        for mine, theirs in zip(shared, plain, strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs)


def test_a_rank_that_has_ended_is_noticed():
    def work(ranks: Ranks) -> str:
        assert isinstance(ranks, RankGroup)
        if ranks._slots is None:
            pytest.skip("no memory that ranks share")
        if ranks.index == 1:
            return "ended"
        with pytest.raises(OtherRankError, match="rank 1 has ended") as raised:
            ranks._slots.meet()
        return str(raised.value)

    assert together(work, 2) == ["rank 1 has ended", "ended"]


def test_a_rank_that_ended_after_all_had_met_is_not_missed(monkeypatch: pytest.MonkeyPatch):
    class Two(Ranks):
        count = 2

        def any(self, flag: bool) -> bool:
            return flag

    slots = SharedSlots(Two(), [0, 0])
    monkeypatch.setattr(rank_slots, "_gone", lambda _: True)
    slots._number = 1
    slots._counts[:] = [1, 0]
    with pytest.raises(OtherRankError, match="rank 1 has ended"):
        slots._look()
    slots._counts[1] = 1
    slots._look()


def test_no_shared_memory_is_left_where_a_rank_dies_before_it_has_mapped_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    class Dying(Ranks):
        def any(self, flag: bool) -> bool:
            raise OtherRankError("rank 1 has ended")

    monkeypatch.setattr(rank_memory, "FOLDER", tmp_path)
    with pytest.raises(OtherRankError):
        rank_memory.mapped(Dying(), 4096)
    assert not list(tmp_path.iterdir())


def test_gradients_through_an_exchange_are_those_of_one_process():
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

    def loss(points: Tensor) -> Tensor:
        return (points @ points.T).tanh().mean(1)

    def work(ranks: Ranks) -> Tensor:
        own = ranks.share(values).clone().requires_grad_()
        ranks.share(loss(ranks.all(own))).mean().backward()
        assert own.grad is not None
        return own.grad / ranks.count

    whole = values.clone().requires_grad_()
    loss(whole).mean().backward()
    torch.testing.assert_close(torch.cat(together(work, 2)), whole.grad)


@pytest.mark.parametrize("shared", [True, False])
def test_large_means_go_through_shared_memory_where_there_is_room(
    shared: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 200, 30, 4, 4, generator=generator)
    others = torch.randn(3, 4001, generator=generator)
    monkeypatch.setattr(rank_memory, "FOLDER", tmp_path if shared else tmp_path / "nowhere")

    def work(ranks: Ranks) -> Any:
        # as gradients of channels-last convolutions lie in memory
        mine = weights[ranks.index].to(memory_format=torch.channels_last)
        found = [mine, others[ranks.index].clone()]
        for _ in range(2):
            ranks.mean_(found)
        assert isinstance(ranks, RankGroup) and bool(ranks._sums) is shared
        return found

    for found in together(work, 3):
        torch.testing.assert_close(found, [weights.mean(0), others.mean(0)])
    assert not list(tmp_path.iterdir())


def test_flags_means_and_errors_reach_everybody():
    def work(ranks: Ranks) -> Any:
        means = [torch.full((2,), float(ranks.index)), torch.tensor(4.0 * ranks.index)]
        ranks.mean_(means)
        flags = [ranks.any(ranks.index == 1), ranks.any(False)]
        said = []
        for failing in (0, 1):

            def fail(failing: int = failing) -> int:
                if ranks.index == failing:
                    raise ValueError("no such folder")
                return 3

            for ask in (ranks.everywhere, ranks.from_main):
                try:
                    said.append(str(ask(fail)))
                except OtherRankError as error:
                    said.append(f"other: {error}")
                except ValueError as error:
                    said.append(f"own: {error}")
        ranks.wait()
        return [*means, flags, said]

    first, second = together(work, 2)
    for ones, number, flags, _ in (first, second):
        assert ones.tolist() == [0.5, 0.5] and float(number) == 2.0 and flags == [True, False]
    own, other = "own: no such folder", "other: rank {}: no such folder"
    assert first[3] == [own, own, other.format(1), "3"]
    assert second[3] == [other.format(0), other.format(0), own, "3"]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(6 * 16, 4), nn.BatchNorm1d(4, momentum=None)
        )

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.conv(images)).relu())
        return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_over_ranks_is_batch_norm_of_the_whole_batch(layout: torch.memory_format):
    torch.manual_seed(0)
    network = Small().to(memory_format=layout)
    images = 3.0 + 2.0 * torch.randn(8, 3, 6, 6).to(memory_format=layout)
    target = torch.randn(8, 4)

    def trained(network: nn.Module, images: Tensor, target: Tensor, ranks: Ranks) -> Any:
        images = images.clone().requires_grad_()
        (network(images) - target).square().mean().backward()
        gradients = [p.grad for p in network.parameters()]
        ranks.mean_(gradients)  # type: ignore[arg-type]
        assert images.grad is not None
        return [gradients, images.grad / ranks.count, list(network.buffers())]

    def work(ranks: Ranks) -> Any:
        copy = deepcopy(network)
        share_norms(copy, ranks)
        assert isinstance(copy.norm, RankBatchNorm)
        assert copy.state_dict().keys() == network.state_dict().keys()
        average = deepcopy(copy)
        found = trained(copy, ranks.share(images), ranks.share(target), ranks)
        # A copy has its own statistics, and in inference mode no rank waits for another.
        assert not average.norm.num_batches_tracked
        if ranks.main:
            average.eval()(images)
        return found

    gradients, by_image, buffers = trained(deepcopy(network), images, target, ALONE)
    found = together(work, 2)
    torch.testing.assert_close(torch.cat([part[1] for part in found]), by_image)
    for part in found:
        torch.testing.assert_close(part[0], gradients)
        torch.testing.assert_close(part[2], buffers)


def test_batch_norm_over_ranks_takes_bfloat16():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 4, 4)
    norm = nn.BatchNorm2d(3)

    def work(ranks: Ranks) -> Any:
        own = ranks.share(images).bfloat16().requires_grad_()
        found = RankBatchNorm(norm, ranks)(own)
        found.float().square().sum().backward()
        assert own.grad is not None and found.dtype == own.grad.dtype == torch.bfloat16
        return [found.detach().float(), own.grad.float()]

    given = images.clone().requires_grad_()
    expected = nn.BatchNorm2d(3)(given)
    expected.square().sum().backward()
    parts = together(work, 2)
    for found, wanted in ((0, expected), (1, given.grad)):
        torch.testing.assert_close(
            torch.cat([part[found] for part in parts]), wanted, atol=0.03, rtol=0.03
        )


def test_an_unknown_batch_norm_is_refused():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(
        ValueError, match=r"student's '0' is a Own, .* over 2 ranks; allowed: Batch"
    ):
        share_norms(nn.Sequential(Own(3)), rank(0, 2))
    # In evaluation rank 0, alone, would wait for the statistics of the others.
    with pytest.raises(ValueError, match=r"'0' keeps no running statistics, .* 2 ranks need track"):
        share_norms(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), rank(0, 2))


TRAJECTORIES: dict[str, dict[str, Any]] = {
    "filled up": {"optimizer.batch_size": 8, "student.ema": 0.9, "augmentation.flip": True},
    "groups": {
        "optimizer.batch_size": 4,
        "env.group_size": 2,
        "reward.kind": "teacher_probe",
        "augmentation.rotation": 10.0,
    },
    "relations": {
        "teacher.layers": LAYERS,
        "distillation.losses": {"similarity_preserving": 1, "dist": 1, "infonce": 0.1},
        "env.action": "timestep_and_layer",
    },
    "memory": {
        "distillation.losses": {"crd": 1},
        "distillation.options": {"crd": {"negatives": 20}},
    },
    "dense": {"distillation.dense": True, "distillation.losses": {"rkd_distance": 1, "hint": 1}},
}


def steps(
    ranks: Ranks, settings: dict[str, Any], state: dict[str, Any] | None, count: int
) -> dict[str, Any]:
    """Rewards of all lanes and the state after ``count`` steps with fixed actions."""
    env = RepFusionVectorEnv(config=settings, ranks=ranks)
    if state is None:
        env.reset(seed=3)
        first = 0
    else:
        env.load_state_dict(state)
        first = env.steps
    space, lanes = env.single_action_space, 4
    rewards = []
    for step in range(first, first + count):
        chosen = torch.arange(lanes) + step
        columns = getattr(space, "nvec", None)
        if columns is None:
            actions = chosen % 5
        else:
            actions = torch.stack([chosen % int(size) for size in columns], 1)
        rewards.append(ranks.all(env.step(ranks.share(actions))[1]))
    state = deepcopy(env.state_dict())
    return {"rewards": torch.stack(rewards), "state": state, "metrics": env.drain_metrics()}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_two_ranks_do_what_one_process_does(name: str, tiny: dict[str, Any]):
    settings = {**tiny, "data": {"train_limit": 40, "heldout_limit": 8}, **TRAJECTORIES[name]}
    settings = {"env": {"num_envs": 4}, **settings, "seed": 3}
    # sgd, since Adam divides rounding by rounding where a gradient is almost 0, and small steps:
    # rounding that moves a value across a ReLU's edge moves no weight by much
    settings |= {"optimizer.name": "sgd", "optimizer.learning_rate": 2e-3}
    one = steps(ALONE, settings, None, 4)
    for two in together(steps, 2, settings, None, 4):
        assert_alike(two, one)


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    close: Callable[..., None] = torch.testing.assert_close
    close(found["rewards"], expected["rewards"], atol=1e-4, rtol=1e-3)
    mine, theirs = found["state"], expected["state"]
    assert torch.equal(mine["ids"], theirs["ids"])
    assert mine["episodes"] == theirs["episodes"] and mine["stream"] == theirs["stream"]
    for key, value in theirs["decisions"].items():
        assert torch.equal(mine["decisions"][key], value), key
    for part in ("student", "loss", "average", "recent", "metrics"):
        close(mine["trainer"][part], theirs["trainer"][part], atol=1e-4, rtol=1e-3)
    for tag, value in expected["metrics"].items():
        assert found["metrics"][tag] == pytest.approx(value, abs=1e-4), tag


def test_gradients_of_a_deep_student_are_those_of_the_full_batch(tiny: dict[str, Any]):
    settings = {**tiny, "student.name": "resnet18", "env.num_envs": 8}

    def gradients(ranks: Ranks) -> Tensor:
        env = RepFusionVectorEnv(config=settings, ranks=ranks)
        env.reset(seed=0)
        env.step(ranks.share(torch.arange(8) % 5))
        found = [p.grad for p in env.trainer.student.parameters() if p.grad is not None]
        return torch.cat([gradient.reshape(-1) for gradient in found])

    one = gradients(ALONE)
    for two in together(gradients, 2):
        # Rounding that moves one value across a ReLU's edge is seen; statistics of half the batch
        # would be off by half.
        assert float((two - one).norm() / one.norm()) < 1e-2


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(ranks: tuple[int, int], tiny: dict[str, Any]):
    settings = {**tiny, "optimizer.batch_size": 8, "student.ema": 0.9, "env.episode_length": 3}
    # Small steps: rounding that moves a value across a ReLU's edge moves no weight by much.
    settings |= {"optimizer.name": "sgd", "optimizer.learning_rate": 2e-3}
    whole = steps(ALONE, settings, None, 5)
    state, rewards = None, []
    for count, part in zip(ranks, (3, 2), strict=True):
        found = (
            together(steps, count, settings, state, part)[-1]
            if count > 1
            else steps(ALONE, settings, state, part)
        )
        state = found["state"]
        rewards.append(found["rewards"])
    assert_alike({**found, "rewards": torch.cat(rewards)}, {**whole, "metrics": {}})


def test_as_many_ranks_go_on_to_the_last_bit(tiny: dict[str, Any]):
    settings = {**tiny, "student.ema": 0.9}
    whole = together(steps, 2, settings, None, 4)[0]
    half = together(steps, 2, settings, None, 2)[0]
    again = together(steps, 2, settings, half["state"], 2)[0]
    assert torch.equal(torch.cat((half["rewards"], again["rewards"])), whole["rewards"])
    for part in ("student", "average", "optimizer"):
        found, expected = (run["state"]["trainer"][part] for run in (again, whole))
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(tiny: dict[str, Any]):
    def work(ranks: Ranks) -> Any:
        env = RepFusionVectorEnv(config=tiny, ranks=ranks)
        env.reset(seed=0)
        before = [p.detach().clone() for p in env.trainer.student.parameters()]
        if ranks.index == 1:
            head = env.trainer.student.head
            head.register_forward_hook(lambda _m, _i, out: out * float("nan"))
        env.step(torch.zeros(env.num_envs, dtype=torch.int64))
        same = all(map(torch.equal, before, env.trainer.student.parameters()))
        return [int(env.trainer.updates.bad_steps), same]

    assert together(work, 2) == [[1, True], [1, True]]


def test_lanes_that_cannot_be_shared_are_refused_in_a_sentence(tiny: dict[str, Any]):
    config = load_config("digits", {**tiny, "env": {"num_envs": 6, "group_size": 2}})
    assert conflicts(config, 1) == []
    assert conflicts(config, 2) == [
        "env.num_envs: 6 lanes in groups of 2 cannot be shared by 2 ranks; it must be a multiple "
        "of 4, such as 8",
        "optimizer.batch_size: 8 given; under 2 ranks it must be at most env.num_envs (6) or a "
        "multiple of it, such as 6",
    ]
    gpu = load_config("digits", {"device": "cuda:1"})
    assert device_conflicts(gpu, 2)[0].startswith("device: 'cuda:1' names one GPU, but 2 ranks")


def test_a_launcher_is_known_by_all_its_variables():
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host"}
    assert launched(torchrun) == (1, 4)
    assert launched({"RANK": "1", "WORLD_SIZE": "4"}) == (0, 1)
    with pytest.raises(ValueError, match="RANK 'one' and WORLD_SIZE '4' stand in the environment"):
        launched({**torchrun, "RANK": "one"})


def test_the_first_rank_of_each_machine_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in {"WORLD_SIZE": "4", "MASTER_ADDR": "host"}.items():
        monkeypatch.setenv(name, value)
    for index in range(4):  # two on each of two machines
        monkeypatch.setenv("RANK", str(index))
        monkeypatch.setenv("LOCAL_RANK", str(index % 2))
        say(f"rank {index}")
    assert capsys.readouterr().err.split("\n") == ["rank 0", "rank 2", ""]


def test_other_commands_say_that_they_run_in_one_process(monkeypatch: pytest.MonkeyPatch):
    refuse_several("train_sb3")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="train_sb3 runs in one process, but 2 were started"):
        refuse_several("train_sb3")
