"""Train a small DDPM on any image bank: ``python -m repfusion_env.teachers.train``.

Predicts the noise with DDPM's linear schedule, keeps an average of the weights, and leaves a folder
in diffusers' layout that ``teacher.model`` takes. A killed run goes on exactly with ``--resume``.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from repfusion_env.checkpoint import load_latest, save_checkpoint
from repfusion_env.command_line import stop_flag
from repfusion_env.config import DataConfig
from repfusion_env.data import ImageBank, load_data
from repfusion_env.devices import resolve_device
from repfusion_env.teachers.training.arguments import parser
from repfusion_env.teachers.training.denoising import (
    build_scheduler,
    build_unet,
    denoising_loss,
    heldout_losses,
    learning_rate,
    sample_images,
    step_generator,
    update_average,
)
from repfusion_env.teachers.training.model_folder import (
    TrainingRecord,
    write_model_folder,
    write_samples,
)

KIND = "teacher-training"
# What may differ when a run goes on: none of these changes the numbers it computes.
FREE_ON_RESUME = (
    "out",
    "resume",
    "device",
    "checkpoint_every",
    "sample_every",
    "keep_checkpoints",
    "dtype",
    "data.path",
    "data.download",
)


@dataclass
class Training:
    """Everything that a checkpoint holds."""

    unet: UNet2DModel
    average: UNet2DModel
    optimizer: torch.optim.AdamW
    losses: list[float]
    seconds: float = 0.0
    step: int = 0

    def state(self, arguments: dict[str, Any], data: str) -> dict[str, Any]:
        """What :meth:`restore` takes back."""
        return {
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "arguments": json.dumps(arguments),
            "data": data,
        }

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Go back to a state of the same network."""
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.seconds = float(state["seconds"])
        self.step = step


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 2 for a wrong use and 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = vars(parser().parse_args(words))
    # A resumed run ends as the uninterrupted one, so the card tells the command without it.
    words = [word for word in words if word != "--resume"]
    command = shlex.join(["python", "-m", "repfusion_env.teachers.train", *words])
    try:
        # Lines are never broken at 80 columns: logs are searched and commands are copied.
        return run(arguments, command, Console(soft_wrap=True))
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was not in a checkpoint is lost", file=sys.stderr)
        return 130


def run(arguments: dict[str, Any], command: str, console: Console) -> int:
    """Train as ``arguments`` say and write the model folder."""
    out = Path(arguments["out"])
    checkpoints = out / "checkpoints"
    device = resolve_device(arguments["device"])
    resumed = _resume(arguments, checkpoints)
    train, heldout = load_data(_data_config(arguments))
    if resumed and resumed[1]["data"] != train.fingerprint:
        raise ValueError(
            f"--resume: the training images differ from those that '{out}' was trained on"
        )
    scheduler = build_scheduler(arguments["timesteps"])
    training = build_training(arguments, train.shape, device)
    if resumed:
        training.restore(*resumed)
        console.print(f"resumed at step {training.step:,} of {arguments['steps']:,}")
    parameters = sum(weight.numel() for weight in training.unet.parameters())
    console.print(
        f"{len(train):,} images {train.shape} of '{train.name}', {parameters:,} parameters, "
        f"{device}, {arguments['steps']:,} steps of {arguments['batch_size']}"
    )
    train, heldout = train.to(device), heldout.to(device)

    def save() -> None:
        state = training.state(_essential(arguments), train.fingerprint)
        keep = arguments["keep_checkpoints"]
        save_checkpoint(checkpoints, training.step, state, kind=KIND, keep=keep)

    batch = arguments["batch_size"]
    with stop_flag() as interrupted:
        for _ in train_steps(arguments, training, scheduler, train, console, interrupted):
            if interrupted():
                save()
                console.print(
                    f"\nstopped at step {training.step:,}; go on with:\n  {command} --resume"
                )
                return 130
            if _due(training.step, arguments["checkpoint_every"], arguments["steps"]):
                save()
            if _due(training.step, arguments["sample_every"], arguments["steps"]):
                images = sample_images(training.average, scheduler, count=64, seed=0)
                write_samples(out / "progress" / f"step-{training.step:09d}.png", images)
                measured = heldout_losses(training.average, scheduler, heldout, batch_size=batch)
                console.print(
                    f"step {training.step:,}: held-out loss {_mean(measured.values()):.4f}, loss "
                    f"{_recent(training.losses):.4f}, {training.seconds:.0f} s"
                )

    measured = heldout_losses(training.average, scheduler, heldout, batch_size=batch)
    record = TrainingRecord(
        command=command,
        data=train,
        heldout=heldout,
        seed=arguments["seed"],
        steps=arguments["steps"],
        batch_size=batch,
        learning_rate=arguments["learning_rate"],
        ema=arguments["ema"],
        loss=_recent(training.losses),
        heldout_losses=measured,
        seconds=training.seconds,
        device=device,
    )
    weights = torch.float16 if arguments["dtype"] == "fp16" else torch.float32
    images = sample_images(training.average, scheduler, count=64, seed=0)
    write_model_folder(out, training.average, scheduler, images, record, weights)
    console.print(
        f"{training.seconds:.0f} s of training, loss {record.loss:.4f}, held-out loss by timestep: "
        + ", ".join(f"t={t} {loss:.4f}" for t, loss in measured.items())
    )
    console.print(f"wrote '{out}'; use it with --teacher.model {out}")
    return 0


def build_training(
    arguments: dict[str, Any], shape: tuple[int, int, int], device: torch.device
) -> Training:
    """Network, averaged network and optimizer at step 0, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments["seed"])
        unet = build_unet(
            shape,
            widths=arguments["widths"],
            layers_per_block=arguments["layers_per_block"],
            attention_levels=arguments["attention_levels"],
            norm_groups=arguments["norm_groups"],
            attention_head_dim=arguments["attention_head_dim"],
        )
    unet = unet.to(device)
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=arguments["learning_rate"], weight_decay=arguments["weight_decay"]
    )
    return Training(unet, average, optimizer, [])


def train_steps(
    arguments: dict[str, Any],
    training: Training,
    scheduler: DDPMScheduler,
    bank: ImageBank,
    console: Console,
    interrupted: Callable[[], bool],
) -> Iterator[int]:
    """Train to the last step under a progress bar, yielding after each block of 10 steps.

    A block ends early, but never within a step, when ``interrupted`` says so.
    """
    steps, unet = arguments["steps"], training.unet
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} steps/s"),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(
            "", total=steps, completed=training.step, rate=0.0, loss=_recent(training.losses)
        )
        while training.step < steps:
            begin, first = time.perf_counter(), training.step
            unet.train()
            losses: list[Tensor] = []
            for step in range(first, min(first - first % 10 + 10, steps)):
                rate = learning_rate(
                    step,
                    peak=arguments["learning_rate"],
                    steps=steps,
                    warmup=arguments["warmup"],
                )
                for group in training.optimizer.param_groups:
                    group["lr"] = rate
                loss = denoising_loss(
                    unet,
                    scheduler,
                    bank,
                    batch_size=arguments["batch_size"],
                    flip=arguments["flip"],
                    generator=step_generator(arguments["seed"], step, bank.device),
                    precision=arguments["precision"],
                )
                training.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
                training.optimizer.step()
                update_average(training.average, unet, decay=arguments["ema"], step=step)
                losses.append(loss.detach())
                training.step = step + 1
                if interrupted():
                    break
            # One synchronisation per block: reading each step's loss would stall a GPU.
            block = float(torch.stack(losses).mean())
            if not block < float("inf"):
                raise ValueError(
                    f"the loss is {block} at step {training.step}; try a lower --learning-rate"
                )
            training.losses = [*training.losses[-99:], block]
            elapsed = time.perf_counter() - begin
            training.seconds += elapsed
            progress.update(
                bar,
                completed=training.step,
                rate=(training.step - first) / elapsed,
                loss=_recent(training.losses),
            )
            yield training.step


def _resume(arguments: dict[str, Any], folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint, refused where it does not belong to these arguments."""
    if not arguments["resume"]:
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"--out: '{folder.parent}' already holds a training run; go on with --resume or "
                "choose another folder"
            )
        return None
    latest = load_latest(folder, kind=KIND)
    if latest is None:
        raise ValueError(f"--resume: there is no checkpoint in '{folder}'")
    before, now = json.loads(latest[1]["arguments"]), _essential(arguments)
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = ", ".join(
            f"{_flag(name)} was {before.get(name)}, now {now[name]}" for name in changed
        )
        raise ValueError(f"--resume: the run was started with other arguments: {told}")
    return latest


def _essential(arguments: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in arguments.items() if name not in FREE_ON_RESUME}
    return dict(json.loads(json.dumps(kept)))


def _data_config(arguments: dict[str, Any]) -> DataConfig:
    named = {name: value for name, value in arguments.items() if name.startswith("data.")}
    return DataConfig(**{name.removeprefix("data."): value for name, value in named.items()})


def _flag(name: str) -> str:
    return "--" + (name if name.startswith("data.") else name.replace("_", "-"))


def _due(step: int, every: int, steps: int) -> bool:
    # A block ends at a multiple of 10, so an interval is met at the block that crosses it.
    return step == steps or (every > 0 and step % every < 10 and step >= every)


def _recent(losses: Sequence[float]) -> float:
    return _mean(losses) if losses else float("nan")


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


if __name__ == "__main__":
    raise SystemExit(main())
