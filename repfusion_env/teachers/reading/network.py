"""A frozen network as a teacher: built, traced, loaded as far as needed, and read at its taps.

What differs between families of networks is a :class:`Plan`; everything else is here once: the
forward stops after the deepest tap, weights behind it are never read from the file, large batches
go through in pieces, and weights may wait in main memory.

Shape letters: N lanes, C,H,W what the network sees, F feature width, h,w feature positions.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.compiling import CompiledRegions
from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError, unknown_layers
from repfusion_env.teachers.files.quiet import first_line, quiet_diffusers
from repfusion_env.teachers.files.weight_files import WeightFiles, fill
from repfusion_env.teachers.reading.noise_process import NoiseProcess
from repfusion_env.teachers.reading.offload import CpuOffload
from repfusion_env.teachers.reading.tracing import Shape, ToMap, Trace, plain_map, trace

# From the shapes of a network's weights by name to the files that hold them.
OpenWeights = Callable[[Mapping[str, tuple[int, ...]]], WeightFiles]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What one family knows of its network.

    Attributes:
        model: The teacher's name, for the messages.
        build: Makes the network, without weights of its own choosing.
        run: One forward: network, inputs (N, C, H, W), conditions (N,). Labels and prompts have no
            way in: what a network asks for in their place is made here. Where it holds tensors it
            has a method ``to(device)``, as :class:`prompted_run.PromptedRun` has.
        input_shape: (C, H, W) of what the network sees at the size that it was trained on.
        to_map: From a module's output and the input's shape (C, H, W) to a map (N, F, h, w), or
            None where it is none.
        condition_dtype: Of the conditions while tracing.
    """

    model: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor, Tensor], Any]
    input_shape: Shape
    to_map: ToMap = plain_map
    condition_dtype: torch.dtype = torch.int64

    def on_meta(self) -> nn.Module:
        """The network without memory for anything.

        Raises:
            TeacherError: Its configuration cannot be built.
        """
        with self._built(), torch.device("meta"):
            return self.build().eval().requires_grad_(False)

    def empty(self) -> nn.Module:
        """The network with buffers and without memory for its parameters."""
        from accelerate import init_empty_weights

        with self._built(), torch.random.fork_rng(devices=[]), init_empty_weights():
            return self.build().eval().requires_grad_(False)

    def trace(self) -> Trace:
        """Follow one forward on the meta device.

        Raises:
            TeacherError: The network cannot be built, or cannot run at its own size.
        """
        network = self.on_meta()
        inputs = torch.empty(1, *self.input_shape, device="meta")
        conditions = torch.empty(1, dtype=self.condition_dtype, device="meta")
        try:
            return trace(
                network,
                lambda net: self.run(net, inputs, conditions),
                self.to_map,
                self.input_shape,
            )
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            size = "x".join(map(str, self.input_shape))
            raise TeacherError(
                f"teacher '{self.model}': the network of its config.json cannot take inputs of its "
                f"own size {size} ({first_line(error)})"
            ) from error

    @contextlib.contextmanager
    def _built(self) -> Iterator[None]:
        try:
            with quiet_diffusers(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except TeacherError:
            raise
        except Exception as error:
            # Whatever a library raises over a configuration that makes no sense.
            raise TeacherError(
                f"teacher '{self.model}': the network of its config.json cannot be built "
                f"({first_line(error)})"
            ) from error


class _Reached(Exception):
    """The forward has reached the deepest tap."""


class NetworkTeacher:
    """A frozen network as a :class:`repfusion_env.teachers.Teacher`.

    Args:
        plan: How it is run and what its outputs mean.
        network: With the weights that ``layers`` need.
        process: Its noise process.
        config: Layers to read, precision, memory layout, offload, batch size, image size.
        layers: Module paths whose outputs are the features.
        found: What one forward does.
        card: What it takes.
        encoder: From pixels to what the network sees; default: the pixels themselves.
        description: Of the configuration, for the fingerprint.
        cut: Whether the forward ends at the deepest layer; not where the order is unknown.
    """

    def __init__(
        self,
        plan: Plan,
        network: nn.Module,
        process: NoiseProcess,
        config: TeacherConfig,
        *,
        layers: tuple[str, ...],
        found: Trace,
        card: TeacherCard,
        encoder: Any = None,
        description: str = "",
        cut: bool = True,
    ) -> None:
        self.plan = plan
        self.layers = layers
        self.feature_shapes = {layer: found.shapes[layer] for layer in layers}
        self.channels, self.image_size = card.channels, card.image_size
        self.num_timesteps = len(process)
        self.process = process
        self.encoder = encoder
        self.parameters_all = found.parameters
        self.parameters_used = sum(parameter.numel() for parameter in network.parameters())
        self.batch_size, self.shown_size = config.batch_size, config.image_size
        self.dtype = DTYPES[config.precision]
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        described = (
            description,
            sorted(config.options.items()),
            layers,
            config.precision,
            config.image_size,
            (process.scale, process.offset),
        )
        self.fingerprint = _fingerprint(network, encoder, process, described)
        self.network = network.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.offload = CpuOffload(self.network, found.users) if config.offload == "cpu" else None
        self.compiled: CompiledRegions | None = None
        self._outputs: dict[str, Tensor] = {}
        self._seen: tuple[int, ...] = plan.input_shape
        deepest = found.last(layers)
        self.taps = [
            self.network.get_submodule(layer).register_forward_hook(
                self._tap(layer, stop=cut and layer == deepest)
            )
            for layer in dict.fromkeys(layers)
        ]

    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`repfusion_env.teachers.Teacher.encode`."""
        if self.shown_size is not None and tuple(images.shape[2:]) != (self.shown_size,) * 2:
            images = nn.functional.interpolate(
                images, (self.shown_size,) * 2, mode="bilinear", antialias=True
            ).clamp(-1, 1)
        if self.encoder is not None:
            size = self.batch_size or len(images)
            images = torch.cat([self.encoder(part) for part in images.split(size)])
        scale, offset = self.process.scale, self.process.offset
        return images if (scale, offset) == (1.0, 0.0) else images * scale + offset

    def features(self, images: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """See :meth:`repfusion_env.teachers.Teacher.features`."""
        conditions = self.process.conditions(timesteps)
        size = self.batch_size or len(images)
        if len(images) <= size:
            return self._read(images, conditions)
        pieces = [
            self._read(*piece)
            for piece in zip(images.split(size), conditions.split(size), strict=True)
        ]
        return {layer: torch.cat([piece[layer] for piece in pieces]) for layer in self.layers}

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`repfusion_env.teachers.Teacher.add_noise`."""
        return self.process.add_noise(images, noise, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """See :meth:`repfusion_env.teachers.Teacher.snr`."""
        return self.process.snr(timesteps)

    def to(self, device: torch.device | str) -> NetworkTeacher:
        """Move to ``device``; offloaded weights stay in main memory and visit it layer by layer."""
        device = torch.device(device)
        self.process = self.process.to(device)
        move = getattr(self.plan.run, "to", None)
        if move is not None:
            move(device)
        (self.offload or self.network).to(device)
        if self.encoder is not None:
            self.encoder.to(device)
        return self

    def compile(self, sizes: Iterable[int], *, cuda_graphs: bool = False) -> None:
        """Run compiled where so many images come at once, and as it is at any other number.

        Weights that wait in main memory leave nothing to compile: they come and go by hooks.

        Args:
            sizes: Numbers of images; none: compiled nowhere.
            cuda_graphs: Replay what is compiled as CUDA graphs.
        """
        if self.compiled is not None and self.compiled.cuda_graphs != cuda_graphs:
            self.compiled.remove()
            self.compiled = None
        sizes = frozenset(sizes)
        if self.compiled is None and sizes and self.offload is None:
            self.compiled = CompiledRegions(self.network, self.layers, cuda_graphs=cuda_graphs)
        if self.compiled is not None:
            self.compiled.sizes = sizes

    def _read(self, images: Tensor, conditions: Tensor) -> dict[str, Tensor]:
        self._seen = tuple(images.shape[1:])
        # What a forward that failed has left.
        self._outputs.clear()
        # Inference mode rather than no_grad: it also skips version counters and view tracking,
        # which the many small operations of a UNet feel.
        regions = (
            contextlib.nullcontext() if self.compiled is None else self.compiled.at(len(images))
        )
        with torch.inference_mode(), regions, contextlib.suppress(_Reached):
            images = images.to(self.dtype).contiguous(memory_format=self.layout)
            self.plan.run(self.network, images, conditions)
        # Copied outside of it: autograd refuses to save an inference tensor in a loss.
        features = {
            layer: self._outputs[layer].to(torch.float32, copy=True) for layer in self.layers
        }
        self._outputs.clear()
        return features

    def _tap(self, layer: str, *, stop: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found = self.plan.to_map(output, self._seen)
            if found is None:
                raise TeacherError(
                    f"teacher '{self.plan.model}': layer '{layer}' gives no map (N, F, h, w) for "
                    f"inputs {self._seen}"
                )
            # What follows may work in place on it.
            self._outputs[layer] = found if stop else found.clone()
            if stop:
                raise _Reached

        return hook


def filled(plan: Plan, files: OpenWeights, needed: Iterable[str], dtype: torch.dtype) -> nn.Module:
    """A network with the weights that are needed, and no memory for the others.

    Args:
        plan: Of the network.
        files: Opens its weights, by the shapes that the network has.
        needed: Names of the parameters and buffers to read.
        dtype: Of the floating-point parameters.

    Raises:
        TeacherError: The weights are damaged or another network's.
    """
    network = plan.empty()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    weights = files(shapes)
    weights.check(shapes)
    return fill(network, weights, needed, dtype)


def load_network(
    plan: Plan,
    files: OpenWeights,
    process: NoiseProcess,
    config: TeacherConfig,
    card: TeacherCard,
    found: Trace,
    *,
    encoder: Any = None,
    description: str = "",
) -> NetworkTeacher:
    """Load as much of a network as the configured layers need.

    Args:
        plan: Of the network.
        files: Opens its weights, by the shapes that the network has.
        process: Its noise process.
        config: Layers (none: those of the card), precision, memory.
        card: What it takes.
        found: The plan's trace.
        encoder: From pixels to what the network sees.
        description: Of the configuration, for the fingerprint.

    Raises:
        TeacherError: It has no such layer, or the weights are damaged or another network's.
    """
    layers = config.layers or card.default_layers
    problems = unknown_layers(layers, found.shapes)
    if problems:
        raise TeacherError(f"teacher '{config.model}': {problems[0]}")
    return NetworkTeacher(
        plan,
        filled(plan, files, found.needed(layers), DTYPES[config.precision]),
        process,
        config,
        layers=tuple(layers),
        found=found,
        card=card,
        encoder=encoder,
        description=description,
    )


def _fingerprint(network: nn.Module, encoder: Any, process: NoiseProcess, description: Any) -> str:
    digest = hashlib.sha256(repr(description).encode())
    told = {"signal": process.signal, "spread": process.spread, "condition": process.condition}
    tensors = {**network.state_dict(), **told}
    if encoder is not None:
        tensors |= {f"encoder {name}": value for name, value in encoder.vae.state_dict().items()}
    for name, weight in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
