"""Any ``nn.Module`` that a user's own factory (``teacher.family: my_module:load``) returns.

Its forward takes images, or images and timesteps; its layers are its submodules. Of the rest it
must be known, from ``teacher.options`` or else from attributes of the module:

- ``channels`` and ``image_size``, of the images in [-1, 1] that it takes;
- its noise process: ``schedule`` of the options (``levels``, ``edm``, or a folder with diffusers'
  scheduler_config.json), else the attribute ``alpha_bars`` (products of ``1 - beta`` by timestep;
  the network is told the timestep) or ``sigmas`` (ascending noise levels, added to the images as
  they are; the network is told sigma, as those of Karras et al., 2022, are), else a scheduler in
  the folder ``teacher.model``, else noise levels on the pixels.

The forward ends at the deepest layer. A module that cannot be followed on the meta device, because
its path depends on values, runs whole.

Shape letters: T timesteps.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError, unknown_layers
from repfusion_env.teachers.files.model_files import ModelFiles
from repfusion_env.teachers.files.quiet import first_line
from repfusion_env.teachers.reading.network import DTYPES, NetworkTeacher, Plan
from repfusion_env.teachers.reading.noise_process import (
    NoiseProcess,
    edm,
    noise_levels,
    process_of,
    variance_preserving,
)
from repfusion_env.teachers.reading.output_maps import tokens_as_map
from repfusion_env.teachers.reading.tracing import Trace, plain_map, trace

TIMESTEP_NAMES = ("t", "ts", "timestep", "timesteps", "time", "sigma", "sigmas", "noise_level")
SCHEDULES: dict[str, Callable[[], NoiseProcess]] = {"levels": noise_levels, "edm": edm}


@dataclass(frozen=True)
class _Wrapped:
    """A user's module, frozen, and what one forward of it does."""

    network: nn.Module
    plan: Plan
    process: NoiseProcess
    found: Trace
    ordered: bool

    def card(self) -> TeacherCard:
        channels, side, _ = self.plan.input_shape
        return TeacherCard(
            channels=channels,
            image_size=side,
            num_timesteps=len(self.process),
            layers_available=tuple(self.found.shapes),
            trace=self.found,
        )


def wrap_module(
    module: nn.Module, config: TeacherConfig, *, device: torch.device | str
) -> NetworkTeacher:
    """A user's module as a teacher; the module itself is left as it is.

    Args:
        module: What the factory returned.
        config: Layers, options, precision, memory.
        device: Of the teacher.

    Raises:
        TeacherError: Something that must be known is not, its forward takes something else, or the
            layers are none of its.
    """
    wrapped = _wrap(module, config)
    available = wrapped.found.shapes
    if not config.layers:
        raise TeacherError(f"teacher.layers: {_of(config)} needs one named; {_listed(available)}")
    problems = unknown_layers(config.layers, available)
    if problems:
        raise TeacherError(f"{_of(config)}: {problems[0]}")
    network = wrapped.network
    if wrapped.ordered:
        needed = wrapped.found.needed(config.layers)
        for name, _ in list(network.named_parameters()):
            if name not in needed:
                path, _, leaf = name.rpartition(".")
                network.get_submodule(path)._parameters[leaf] = None
    for part in network.modules():
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            for parameter in part.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(DTYPES[config.precision])
    return NetworkTeacher(
        wrapped.plan,
        network,
        wrapped.process,
        config,
        layers=tuple(config.layers),
        found=wrapped.found,
        card=wrapped.card(),
        description=_written(module),
        cut=wrapped.ordered,
    ).to(device)


def describe_module(module: nn.Module, config: TeacherConfig) -> TeacherCard:
    """What a user's module takes and offers.

    Raises:
        TeacherError: See :func:`wrap_module`.
    """
    return _wrap(module, config).card()


def _wrap(module: nn.Module, config: TeacherConfig) -> _Wrapped:
    shape = (_known(module, config, "channels"), *[_known(module, config, "image_size")] * 2)
    process = _process(module, config)
    try:
        network = _structure(module, lambda value: value.detach()).eval().requires_grad_(False)
    except Exception as error:
        # Copying runs what modules define for it, such as weights that hooks compute.
        raise TeacherError(
            f"{_of(config)} cannot be copied ({type(error).__name__}: {first_line(error)})"
        ) from error
    plan = Plan(
        config.family,
        lambda: network,
        _run_of(module, config),
        (shape[0], shape[1], shape[2]),
        _to_map,
        process.condition.dtype,
    )
    try:
        empty = _structure(network, lambda value: torch.empty_like(value, device="meta"))
        return _Wrapped(
            network, plan, process, _trace(replace(plan, build=lambda: empty), process), True
        )
    except Exception:
        # Whatever a module does that a tensor without data cannot answer. What is truly wrong
        # shows in the forward with data.
        pass
    network = network.cpu()
    try:
        return _Wrapped(network, plan, process, _trace(plan, process, "cpu"), False)
    except Exception as error:
        size = "x".join(map(str, shape))
        raise TeacherError(
            f"{_of(config)}: its forward fails on images of {size} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _trace(plan: Plan, process: NoiseProcess, device: str = "meta") -> Trace:
    inputs = torch.zeros(1, *plan.input_shape, device=device)
    conditions = process.condition[:1].to(device)
    return trace(
        plan.build(),
        lambda network: plan.run(network, inputs, conditions),
        plan.to_map,
        plan.input_shape,
        device,
    )


def _structure(module: nn.Module, value_of: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the modules with ``value_of`` their weights in the place of each."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(value_of(parameter), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = value_of(buffer)
    return copy.deepcopy(module, memo)


def _run_of(module: nn.Module, config: TeacherConfig) -> Callable[[Any, Tensor, Tensor], Any]:
    """How the forward is called, by its signature.

    Raises:
        TeacherError: It takes nothing, or asks for more than images and timesteps.
    """
    parameters = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind
        in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    positional = [part for part in parameters if part.kind is not part.KEYWORD_ONLY]
    needed = [part.name for part in parameters if part.default is part.empty]
    timed = len(positional) > 1 and (
        positional[1].default is positional[1].empty or positional[1].name.lower() in TIMESTEP_NAMES
    )
    given = {part.name for part in positional[: 2 if timed else 1]}
    more = [name for name in needed if name not in given]
    if more:
        raise TeacherError(
            f"{_of(config)}: its forward asks for {', '.join(more)} beside images and timesteps; "
            "labels and prompts have no way in, so give it a module that needs neither"
        )

    def run(network: Any, images: Tensor, conditions: Tensor) -> Any:
        half = images.dtype in (torch.bfloat16, torch.float16)
        # What the module makes in float32 itself, such as an embedding of the timestep, meets
        # weights of half precision.
        with torch.autocast(images.device.type, images.dtype) if half else nullcontext():
            return network(images, conditions) if timed else network(images)

    return run


def _written(module: nn.Module) -> str:
    """What a module computes beside its weights: its structure, plain attributes and code."""
    plain = (bool, int, float, str)
    # Where in memory something lies changes from process to process.
    told = [re.sub(r" at 0x[0-9a-f]+", "", repr(module))]
    kinds: dict[type, None] = {}
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if isinstance(value, plain)}
        settings.pop("training", None)
        told.append(f"{name} {sorted(settings.items())!r}")
        kinds.update(dict.fromkeys(type(part).__mro__))
    for kind in kinds:
        if kind.__module__.partition(".")[0] in ("torch", "builtins", "typing"):
            continue
        try:
            told.append(inspect.getsource(kind))
        except (OSError, TypeError):  # made by a program, or typed at a prompt
            told.append(kind.__qualname__)
    return "\n".join(told)


def _known(module: nn.Module, config: TeacherConfig, name: str) -> int:
    value = config.options.get(name, getattr(module, name, None))
    if type(value) is not int or value < 1:
        found = "nothing" if value is None else repr(value)
        raise TeacherError(
            f"teacher.options.{name}: {found} given; {_of(config)} needs a positive whole number "
            f"there, or as its attribute '{name}'"
        )
    return value


def _process(module: nn.Module, config: TeacherConfig) -> NoiseProcess:
    schedule = config.options.get("schedule")
    if schedule is not None:
        if schedule in SCHEDULES:
            return SCHEDULES[schedule]()
        folder = Path(str(schedule)).expanduser()
        if not folder.is_dir():
            raise TeacherError(
                f"teacher.options.schedule: {schedule!r} given; allowed: {', '.join(SCHEDULES)}, "
                "or a folder with a scheduler_config.json"
            )
        return process_of(ModelFiles(str(schedule), folder).scheduler(), str(schedule))
    if getattr(module, "alpha_bars", None) is not None:
        products = _levels(module, config, "alpha_bars")
        if not bool(((products > 0) & (products < 1)).all() and (products.diff() < 0).all()):
            raise TeacherError(
                f"{_of(config)}: its alpha_bars must fall with the timestep, within (0, 1)"
            )
        return variance_preserving(products)
    if getattr(module, "sigmas", None) is not None:
        sigmas = _levels(module, config, "sigmas")
        if not bool((sigmas > 0).all() and (sigmas.diff() > 0).all()):
            raise TeacherError(f"{_of(config)}: its sigmas must be positive and rise")
        deviation = float(getattr(module, "sigma_data", 0.5))
        ratio = (deviation / sigmas).square()
        return NoiseProcess(torch.ones_like(sigmas), sigmas, ratio, sigmas)
    files = ModelFiles(config.model, Path(config.model).expanduser())
    places = (files.folder, files.folder / "scheduler")
    if any((place / "scheduler_config.json").is_file() for place in places):
        return process_of(files.scheduler(), config.model)
    return noise_levels()


def _levels(module: nn.Module, config: TeacherConfig, name: str) -> Tensor:
    values = torch.as_tensor(getattr(module, name)).detach().to("cpu", torch.float32)
    if values.ndim != 1 or not len(values):
        raise TeacherError(
            f"{_of(config)}: its {name} must be one number for each timestep, not of shape "
            f"{tuple(values.shape)}"
        )
    return values


def _to_map(output: Any, input_shape: tuple[int, ...]) -> Tensor | None:
    """The output, or the first of several; tokens (N, L, F) where L makes a grid."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(first, Tensor) and first.ndim == 3:
        return tokens_as_map(first, input_shape)
    return plain_map(first, input_shape)


def _of(config: TeacherConfig) -> str:
    return f"the module of teacher family '{config.family}'"


def _listed(available: Any) -> str:
    names = [repr(name) for name in available]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"it has {', '.join(names[:12])}{more}" if names else "none of its modules gives a map"
