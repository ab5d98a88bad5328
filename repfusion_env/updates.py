"""The update of everything that is trained, and what happens where a step is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from repfusion_env.config import ExperimentConfig
from repfusion_env.ranks import ALONE, Ranks
from repfusion_env.student import learning_rate_factor, make_optimizer
from repfusion_env.student_buffers import restore_buffers, snapshot_buffers

N = TypeVar("N", bound=nn.Module)


class NonFiniteError(RuntimeError):
    """The loss was not finite for too many steps in a row."""


class Updates(Generic[N]):
    """Optimizer, averaged student, and the count of steps that were skipped.

    Args:
        config: The experiment.
        student: Is trained; its average follows it where ``student.ema`` is above 0.
        body: What is trained at ``optimizer.learning_rate``, with the student's part of it.
        heads: What is trained at ``optimizer.head_learning_rate``, likewise.
        others: What is trained beside the student, with buffers that its forward may move.
        device: Where all of them are.
        ranks: Whose gradients count.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        student: N,
        body: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        others: Sequence[nn.Module],
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self._config, self._student, self._device = config, student, device
        self._ranks = ranks
        self._networks: tuple[nn.Module, ...] = (student, *others)
        self._parameters = _parameters(self._networks)
        self.average: N | None = None
        if config.student.ema:
            self.average = deepcopy(student).requires_grad_(False).eval()
        self.optimizer = make_optimizer(config.optimizer, _parameters(body), _parameters(heads))
        self.bad_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        # Of the last step: whether it was bad, and the counts before it.
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._before = (self.bad_in_a_row, self.bad_steps)
        # Small gradients vanish in fp16 unless the loss is scaled. The scale follows what overflows
        # on the device; the host does not look.
        scaled = config.student.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def buffers(self) -> list[Tensor]:
        """A copy of the running statistics that a forward moves; taken before it."""
        return snapshot_buffers(*self._networks)

    def apply(
        self, total: Tensor, buffers: list[Tensor], progress: float, *, again: bool = False
    ) -> Tensor:
        """Backward, clip and optimizer step; skipped on the device where anything is not finite.

        Args:
            total: The loss, ().
            buffers: From :meth:`buffers`, before the forward.
            progress: Part of the run that is done, in [0, 1].
            again: A further update of the same step, counted with it as one.

        Returns:
            () bool, whether the update was skipped.
        """
        settings = self._config.optimizer
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        moved = [p for p in self._parameters if p.grad is not None]
        total = total.detach().clone()
        # The loss goes with the gradients: where it is not finite on one rank, all skip the step.
        self._ranks.mean_([total, *_gradients(moved)])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(_gradients(moved))
        bad = ~(torch.isfinite(total) & torch.isfinite(norm))
        if settings.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(moved, settings.gradient_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor(settings.schedule, progress)
        # Fused optimizers leave parameters and moments alone where found_inf is 1, without the host
        # having to look; gradient scalers use the same attributes.
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self._count(bad & self._meant(total) if self.scaler.is_enabled() else bad, again)
        self.scaler.update()
        # The forward has already moved the running statistics of batch norms.
        restore_buffers(buffers, bad, *self._networks)
        if self.average is not None:
            self._update_average(self.average, bad)
        return bad

    def _meant(self, total: Tensor) -> Tensor:
        """() bool, whether a gradient that is not finite is more than a scale too large for fp16.

        That happens at the beginning and now and then later, and lowers the scale.
        """
        scale = self.scaler.scale(torch.ones_like(total))
        return ~torch.isfinite(total) | (scale <= 1.0)

    def _count(self, bad: Tensor, again: bool) -> None:
        if again:
            bad = bad | self._bad
        else:
            self._before = (self.bad_in_a_row, self.bad_steps)
        self._bad = bad
        in_a_row, steps = self._before
        self.bad_in_a_row = (in_a_row + 1) * bad
        self.bad_steps = steps + bad

    @torch.no_grad()
    def _update_average(self, average: N, bad: Tensor) -> None:
        weight = (1.0 - self._config.student.ema) * ~bad
        parameters: list[Tensor] = list(average.parameters())
        if self._device.type == "cpu":
            # One way through the memory instead of three, which is what this costs.
            for held, moved in zip(parameters, self._student.parameters(), strict=True):
                held.lerp_(moved.to(held.dtype), weight.to(held.dtype))
        else:
            moves = list(torch._foreach_sub(list(self._student.parameters()), parameters))
            torch._foreach_mul_(moves, weight)
            torch._foreach_add_(parameters, moves)
        for mine, new in zip(average.buffers(), self._student.buffers(), strict=True):
            mine.copy_(new)

    def watch(self, steps: int) -> None:
        """Stop a run whose loss is not finite any more.

        Args:
            steps: Steps done.

        Raises:
            NonFiniteError: ``optimizer.nonfinite_patience`` steps in a row were skipped.
        """
        patience = self._config.optimizer.nonfinite_patience
        # Looking is free on a CPU; on CUDA it would stall every step, so it happens now and then.
        if self._device.type != "cpu" and steps % patience:
            return
        if int(self.bad_in_a_row) >= patience:
            raise NonFiniteError(
                f"the loss has not been finite for {int(self.bad_in_a_row)} steps in a row (step "
                f"{steps}); likely causes: optimizer.learning_rate "
                f"{self._config.optimizer.learning_rate} is too large, no optimizer.gradient_clip, "
                f"teacher.precision {self._config.teacher.precision} overflows, or teacher weights "
                "that hold NaN"
            )

    def state_dict(self) -> dict[str, Any]:
        """Averages, moments and counts."""
        return {
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bad": [self.bad_in_a_row, self.bad_steps],
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        # The optimizer would keep the given moments themselves, shared with whoever gave them.
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        _lay_out(self.optimizer)
        self.bad_in_a_row, self.bad_steps = (value.to(self._device) for value in state["bad"])
        if self.scaler.is_enabled() and state.get("scaler"):  # other precisions have none
            self.scaler.load_state_dict(state["scaler"])


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Bring moments, which may come from another memory layout, into that of their parameters.

    Fused optimizers walk through memory, not through indices.
    """
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            same = isinstance(value, Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _parameters(networks: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for network in networks for p in network.parameters()]


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
