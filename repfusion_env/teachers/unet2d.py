"""Unconditional DDPMs in diffusers' ``UNet2DModel``, read no deeper than the deepest layer asked.

Shape letters: N lanes, C channels, H height, W width of the image; F feature width, h, w feature
positions.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from diffusers.utils import logging
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError, unknown_layers
from repfusion_env.teachers.model_files import ModelFiles, find_model_files
from repfusion_env.teachers.unet2d_stages import drop_behind, run_stages, stage_of, stages

Shape = tuple[int, int, int]

_SHAPES: dict[str, dict[str, Shape]] = {}


def load(config: TeacherConfig, *, device: torch.device | str) -> UNet2DTeacher:
    """Load a ``UNet2DModel`` and its scheduler, frozen, cut after the deepest of the layers.

    Raises:
        TeacherError: Files are missing or damaged, weights and configuration do not fit together,
            it is another kind of model, or it has no such layer.
    """
    files = find_model_files(config.model, config.revision, weights=True)
    shapes = _known_shapes(files)
    problems = unknown_layers(config.layers, shapes)
    if problems:
        raise TeacherError(f"teacher '{config.model}': {problems[0]}")
    teacher = UNet2DTeacher(
        load_weights(files),
        alpha_bars(files),
        layers=config.layers,
        feature_shapes={layer: shapes[layer] for layer in config.layers},
        precision=config.precision,
        channels_last=config.channels_last,
        description=json.dumps([files.unet, files.scheduler], sort_keys=True),
    )
    return teacher.to(device)


def describe(config: TeacherConfig) -> TeacherCard:
    """Read the configuration files and build the network without memory for its weights.

    Raises:
        TeacherError: See :func:`load`.
    """
    files = find_model_files(config.model, config.revision, weights=False)
    unet = build_on_meta(files)
    return TeacherCard(
        channels=unet.config.in_channels,
        image_size=image_size(files),
        num_timesteps=len(alpha_bars(files)),
        layers_available=tuple(_known_shapes(files)),
        side_divisor=2 ** (len(unet.down_blocks) - 1),
    )


class UNet2DTeacher:
    """A frozen ``UNet2DModel`` as a :class:`repfusion_env.teachers.Teacher`.

    Args:
        unet: Whole, with weights; the parts behind the deepest layer are taken out of it.
        alpha_bars: Products of ``1 - beta`` by timestep, float32, (num_timesteps,).
        layers: Module paths whose outputs are the features.
        feature_shapes: (F, h, w) by layer.
        precision: Arithmetic of the forward, "fp32" or "bf16".
        channels_last: Memory layout of the convolutions.
        description: Of the configuration, for the fingerprint.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        alpha_bars: Tensor,
        *,
        layers: tuple[str, ...],
        feature_shapes: dict[str, Shape],
        precision: str = "fp32",
        channels_last: bool = False,
        description: str = "",
    ) -> None:
        self.layers = tuple(layers)
        self.feature_shapes = dict(feature_shapes)
        self.channels = int(unet.config.in_channels)
        self.image_size = _side(unet.config.sample_size)
        self.num_timesteps = len(alpha_bars)
        self.fingerprint = _fingerprint(unet, alpha_bars, (description, self.layers, precision))
        self.depth = max(stage_of(layer, unet) for layer in self.layers)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        # Training mode and gradients would only cost memory: nothing ever updates a teacher.
        self.unet = unet.eval().requires_grad_(False)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with _quiet_diffusers():
            self.unet.to(self.dtype).to(memory_format=self.layout)
        drop_behind(self.unet, self.depth)
        self._tables = _Tables(alpha_bars.float())
        self._outputs: dict[str, Tensor] = {}
        for layer in set(self.layers):
            self.unet.get_submodule(layer).register_forward_hook(_keep(self._outputs, layer))

    def features(self, images: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """See :meth:`repfusion_env.teachers.Teacher.features`."""
        # Inference mode rather than no_grad: it also skips version counters and view tracking,
        # which the many small operations of a UNet feel.
        with torch.inference_mode():
            images = images.to(self.dtype).contiguous(memory_format=self.layout)
            run_stages(self.unet, images, timesteps, self.depth)
        # Copied outside of it: autograd refuses to save an inference tensor in a loss.
        features = {
            layer: self._outputs[layer].to(torch.float32, copy=True) for layer in self.layers
        }
        self._outputs.clear()
        return features

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise`` (Ho et al., 2020, eq. 4)."""
        signal = self._tables.signal.index_select(0, timesteps)[:, None, None, None]
        spread = self._tables.spread.index_select(0, timesteps)[:, None, None, None]
        return signal * images + spread * noise

    def snr(self, timesteps: Tensor) -> Tensor:
        """``alpha_bar / (1 - alpha_bar)``, float32, (N,)."""
        return self._tables.snr.index_select(0, timesteps)

    def to(self, device: torch.device | str) -> UNet2DTeacher:
        """Move network and noise tables to ``device``."""
        self.unet.to(device)
        self._tables.to(device)
        return self


class _Tables(nn.Module):
    """What the noise scheduler says of each timestep, float32, (num_timesteps,) each."""

    signal: Tensor
    spread: Tensor
    snr: Tensor

    def __init__(self, alpha_bars: Tensor) -> None:
        super().__init__()
        self.register_buffer("signal", alpha_bars**0.5)
        self.register_buffer("spread", (1 - alpha_bars) ** 0.5)
        self.register_buffer("snr", alpha_bars / (1 - alpha_bars))


def build_on_meta(files: ModelFiles) -> UNet2DModel:
    """The network without memory for its weights.

    Raises:
        TeacherError: The configuration is of another class, or the class refuses it.
    """
    kind = files.unet.get("_class_name")
    if kind != "UNet2DModel":
        raise TeacherError(
            f"teacher '{files.model}' is a {kind or 'model of unknown class'}; "
            "family 'unet2d' takes a UNet2DModel"
        )
    image_size(files)
    try:
        with _quiet_diffusers(), torch.device("meta"):
            return UNet2DModel.from_config(files.unet).eval().requires_grad_(False)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise TeacherError(
            f"teacher '{files.model}': diffusers cannot build a UNet2DModel from its config.json "
            f"({_first_line(error)})"
        ) from error


def image_size(files: ModelFiles) -> int:
    """Side in pixels that the network was trained on.

    Raises:
        TeacherError: The configuration does not say.
    """
    size = files.unet.get("sample_size")
    sides = size if isinstance(size, list) else [size]
    if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise TeacherError(
            f"teacher '{files.model}': its config.json gives sample_size {size!r}; "
            "the side of its images in pixels is needed"
        )
    return _side(size)


def layer_shapes(files: ModelFiles, unet: UNet2DModel) -> dict[str, Shape]:
    """(F, h, w) of every module that gives a map, in the order of the forward.

    Args:
        files: For the messages.
        unet: On the meta device, where a forward costs no arithmetic.

    Raises:
        TeacherError: The network cannot run on images of its own sample_size.
    """
    shapes: dict[str, Shape] = {}
    handles = []
    for name, module in unet.named_modules():

        def note(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                shapes[name] = (output.shape[1], output.shape[2], output.shape[3])

        if name:
            handles.append(module.register_forward_hook(note))
    side = image_size(files)
    try:
        with torch.inference_mode(), torch.device("meta"):
            images = torch.empty(1, unet.config.in_channels, side, side)
            timesteps = torch.empty(1, dtype=torch.int64)
            run_stages(unet, images, timesteps, len(stages(unet)))
    except (RuntimeError, ValueError) as error:
        raise TeacherError(
            f"teacher '{files.model}': the network of its config.json cannot take images of its "
            f"sample_size {side} ({_first_line(error)})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _known_shapes(files: ModelFiles) -> dict[str, Shape]:
    """:func:`layer_shapes`, once for each architecture: describing comes before loading."""
    key = json.dumps(files.unet, sort_keys=True)
    if key not in _SHAPES:
        _SHAPES[key] = layer_shapes(files, build_on_meta(files))
    return _SHAPES[key]


def load_weights(files: ModelFiles) -> UNet2DModel:
    """The network with its weights in float32, on the CPU.

    diffusers reads a ``.bin`` with ``torch.load(weights_only=True)``, so no file can run code.

    Raises:
        TeacherError: The file is damaged or no such file, or its weights are not the network's.
    """
    assert files.weights is not None
    try:
        # Building the network draws initial weights; the caller's random numbers stay untouched.
        with _quiet_diffusers(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            unet, info = UNet2DModel.from_pretrained(
                str(files.unet_folder),
                use_safetensors=files.weights.suffix == ".safetensors",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                low_cpu_mem_usage=False,
                local_files_only=True,
            )
    except Exception as error:
        # safetensors and pickle raise kinds of their own, and diffusers wraps some of them.
        raise TeacherError(
            f"teacher '{files.model}': {files.weights.name} is damaged or not what its name says"
        ) from error
    kinds = {
        "missing_keys": "lacks",
        "unexpected_keys": "has the unknown",
        "mismatched_keys": "has a wrong shape of",
    }
    for kind, verb in kinds.items():
        names = sorted(str(key if isinstance(key, str) else key[0]) for key in info[kind])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise TeacherError(
                f"teacher '{files.model}': {files.weights.name} {verb} weights "
                f"{', '.join(names[:3])}{more}, so it belongs to another config.json"
            )
    unet = unet.float()
    broken = [name for name, weight in unet.state_dict().items() if not weight.isfinite().all()]
    if broken:
        raise TeacherError(
            f"teacher '{files.model}': {files.weights.name} holds values that are not finite in "
            f"{broken[0]}"
        )
    return unet


def alpha_bars(files: ModelFiles) -> Tensor:
    """Products of ``1 - beta`` by timestep, float32, (num_timesteps,).

    Raises:
        TeacherError: The class is no noise scheduler with discrete timesteps of diffusers.
    """
    name = files.scheduler.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not is_scheduler:
        raise TeacherError(
            f"teacher '{files.model}': its scheduler_config.json names {name!r}, which is no "
            "scheduler of diffusers"
        )
    assert kind is not None
    try:
        with _quiet_diffusers():
            scheduler = kind.from_config(files.scheduler)
    except Exception as error:
        raise TeacherError(
            f"teacher '{files.model}': diffusers cannot build a {name} from its "
            f"scheduler_config.json ({_first_line(error)})"
        ) from error
    products = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(products, Tensor) or products.ndim != 1:
        raise TeacherError(
            f"teacher '{files.model}': {name} has no alphas_cumprod; a scheduler with discrete "
            "timesteps is needed, such as DDPMScheduler"
        )
    return products.float()


def _keep(outputs: dict[str, Tensor], layer: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs[layer] = output

    return hook


def _fingerprint(unet: nn.Module, alpha_bars: Tensor, description: Any) -> str:
    digest = hashlib.sha256(repr(description).encode())
    for name, weight in sorted({**unet.state_dict(), "alpha_bars": alpha_bars}.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _side(size: Any) -> int:
    return int(max(size)) if isinstance(size, list | tuple) else int(size)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
