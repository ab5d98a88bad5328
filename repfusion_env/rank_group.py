"""Several ranks: processes that Hugging Face Accelerate has brought together.

On CPUs they exchange tensors by gloo (gradients on one machine through shared memory), on GPUs by
NCCL. What concerns the host alone (flags, errors, files read by rank 0) always goes by gloo, so
that it never waits for a GPU.

Shape letters: W ranks, N lanes of all of them, n = N / W lanes of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from repfusion_env.rank_memory import SharedSum
from repfusion_env.rank_slots import SLOT, SharedSlots, ordered_stores
from repfusion_env.ranks import OtherRankError, Ranks

T = TypeVar("T")

# Ranks wait for rank 0 while it evaluates and writes, which may take hours at full size.
PATIENCE = timedelta(hours=24)
# Numbers from which ranks of one machine exchange them through shared memory.
LARGE = 1 << 16


class RankGroup(Ranks):
    """The processes that ``torchrun`` started."""

    def __init__(self) -> None:
        from accelerate import PartialState

        if not os.environ.get("OMP_NUM_THREADS"):
            # Accelerate would choose a number of threads by itself, and warn.
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        cpu = not torch.cuda.is_available() or here > torch.cuda.device_count()
        if not cpu and not dist.is_initialized():
            # A run on the CPU of a machine with GPUs is a run too, and which of them a resumed one
            # is only rank 0 knows.
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        self.index, self.count = state.process_index, state.num_processes
        self.local_index = state.local_process_index
        self._host = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        self._neighbours = here == self.count
        self._slots: SharedSlots | None = None
        if self._neighbours and ordered_stores():
            self._slots = self._made_slots()
        self._flat: dict[tuple[torch.dtype, int], Tensor] = {}
        self._sums: dict[tuple[torch.dtype, int], SharedSum] = {}

    def _made_slots(self) -> SharedSlots | None:
        found: list[int] = [0] * self.count
        dist.all_gather_object(found, os.getpid(), group=self._host)
        try:
            return SharedSlots(self, found)
        except OSError:
            return None

    def gathered(self, values: Tensor) -> Tensor:
        """:meth:`all` of one block, without gradients."""
        size = values.numel() * values.element_size()
        if self._slots is not None and values.device.type == "cpu" and 0 < size <= SLOT:
            return self._slots.gather(values)
        found = values.new_empty((self.count * len(values), *values.shape[1:]))
        # Bytes: gloo knows no bool and no bfloat16 everywhere.
        given, wanted = values, found
        if values.dtype in (torch.bool, torch.bfloat16):
            given, wanted = values.view(torch.uint8), found.view(torch.uint8)
        dist.all_gather_into_tensor(wanted, given)
        return found

    def all(self, values: Tensor, blocks: int = 1) -> Tensor:
        """See :class:`Ranks`."""
        gathered: Tensor = _Gather.apply(values.contiguous(), self)
        if blocks == 1:
            return gathered
        shape = (self.count, blocks, -1, *values.shape[1:])
        return gathered.reshape(shape).transpose(0, 1).flatten(0, 2)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """See :class:`Ranks`."""
        self._reduce(tensors, 1.0 / self.count)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """See :class:`Ranks`."""
        self._reduce(tensors, 1.0)

    @torch.no_grad()
    def _reduce(self, tensors: Sequence[Tensor], factor: float) -> None:
        lines = [_line(tensor.detach()) for tensor in tensors]
        for kind in dict.fromkeys(line.dtype for line in lines):
            self._reduce_lines([line for line in lines if line.dtype == kind], factor)

    def _reduce_lines(self, lines: list[Tensor], factor: float) -> None:
        sizes = [line.numel() for line in lines]
        key = (lines[0].dtype, sum(sizes))
        on_cpu = lines[0].device.type == "cpu"
        if self._slots is not None and on_cpu and key[1] * key[0].itemsize <= SLOT:
            total = self._slots.gather(torch.cat(lines)[None]).sum(0, dtype=key[0])
            total = total * factor if factor != 1.0 else total
            torch._foreach_copy_(lines, list(total.split(sizes)))
            return
        if self._neighbours and on_cpu and key[1] >= LARGE:
            try:
                if key not in self._sums:
                    self._sums[key] = SharedSum(self, *key)
                torch._foreach_copy_(lines, self._sums[key](lines, factor))
                return
            except OSError:
                self._neighbours = False
        # One buffer is kept for each size, since the gradients are exchanged at every step.
        if key not in self._flat:
            self._flat[key] = lines[0].new_empty(key[1])
        flat = self._flat[key]
        torch.cat(lines, out=flat)
        dist.all_reduce(flat)
        if factor != 1.0:
            flat.mul_(factor)
        torch._foreach_copy_(lines, list(flat.split(sizes)))

    def any(self, flag: bool) -> bool:
        """See :class:`Ranks`."""
        value = torch.tensor([int(flag)], dtype=torch.int32)
        if self._slots is not None:
            return bool(self._slots.gather(value).any())
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._host)
        return bool(value)

    def wait(self) -> None:
        """See :class:`Ranks`."""
        if self._slots is not None:
            self._slots.meet()
            return
        dist.barrier(group=self._host)

    def from_main(self, work: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        result: Any = None
        if self.main:
            try:
                result = work()
            except BaseException as error:
                # The others wait for an answer, whatever has happened here.
                self._broadcast((str(error) or type(error).__name__, None))
                raise
        problem, result = self._broadcast((None, result))
        if problem is not None:
            raise OtherRankError(f"rank 0: {problem}")
        return result  # type: ignore[no-any-return]

    def _broadcast(self, value: tuple[str | None, Any]) -> tuple[str | None, Any]:
        holder = [value if self.main else None]
        dist.broadcast_object_list(holder, src=0, group=self._host, device=torch.device("cpu"))
        assert holder[0] is not None
        return holder[0]

    def everywhere(self, work: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        problem, failure, result = None, None, None
        try:
            result = work()
        except Exception as error:
            failure, problem = error, str(error) or type(error).__name__
        said: list[str | None] = [None] * self.count
        dist.all_gather_object(said, problem, group=self._host)
        if failure is not None:
            raise failure
        for index, sentence in enumerate(said):
            if sentence is not None:
                raise OtherRankError(f"rank {index}: {sentence}")
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """See :class:`Ranks`."""
        if dist.is_initialized():
            dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """(n, ...) of each rank to (N, ...) on every rank."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: RankGroup) -> Tensor:
        ctx.ranks = ranks
        return ranks.gathered(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        ctx.ranks.sum_([total])
        return ctx.ranks.share(total), None


def _line(tensor: Tensor) -> Tensor:
    """A view (numel,) in the order of memory: convolutions' gradients may be channels-last."""
    if tensor.ndim == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(-1)
