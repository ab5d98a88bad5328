"""GANs read at the layers of their discriminator, or of their generator where it can be given the
image's own latent.

A model is a folder with ``config.json`` (``{"_class_name": "DCGAN", "channels": 3, "latent": 100,
"discriminator": [64, 128, 256, 512], ...}``) and ``model.safetensors``, or a checkpoint of
PyTorch's DCGAN example (``netD.pth``), whose architecture its shapes tell. Images are [-1, 1], as
ours. ``teacher.options: {part: generator}`` reads the generator, behind the encoder of a BiGAN.

A GAN knows no timesteps: the action's timestep is a noise level on the pixels
(:func:`repfusion_env.teachers.reading.noise_process.noise_levels`; 0 is all but clean), or, under
``env.action layer``, its place is taken by the layer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError
from repfusion_env.teachers.files.model_files import ModelFiles, find_model
from repfusion_env.teachers.files.network_folder import read_settings
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.networks.dcgan import DCGAN, PARTS, GanSettings, checkpoint_settings
from repfusion_env.teachers.reading.family import known_trace, take_options
from repfusion_env.teachers.reading.network import (
    NetworkTeacher,
    OpenWeights,
    Plan,
    load_network,
)
from repfusion_env.teachers.reading.noise_process import noise_levels
from repfusion_env.teachers.reading.tracing import Trace

OPTIONS = {"part": ("discriminator", "generator")}


@dataclass(frozen=True)
class _Source:
    """One model: its architecture, and how its weights are opened under the names of a DCGAN."""

    model: str
    settings: GanSettings
    part: str
    weights: OpenWeights

    @property
    def parts(self) -> tuple[str, ...]:
        """What is built: the generator needs the encoder before it."""
        return ("encoder", "generator") if self.part == "generator" else ("discriminator",)

    def plan(self) -> Plan:
        side = self.settings.side(self.part)
        return Plan(
            self.model,
            partial(DCGAN, self.settings, self.parts),
            partial(_run, self.part),
            (self.settings.channels, side, side),
        )

    def trace(self, plan: Plan) -> Trace:
        return known_trace(plan, ["DCGAN", asdict(self.settings), self.part])

    def card(self, found: Trace) -> TeacherCard:
        widths = getattr(self.settings, self.part)
        if self.part == "generator":
            # A generator's middle holds objects, its end strokes and colours.
            default = f"generator.main.{3 * ((len(widths) - 1) // 2) + 2}"
        else:
            default = f"discriminator.main.{3 * len(widths) - 2}"  # all but its verdict
        return TeacherCard(
            channels=self.settings.channels,
            image_size=self.settings.side(self.part),
            num_timesteps=len(noise_levels()),
            layers_available=tuple(found.shapes),
            side_divisor=2 ** len(widths),
            default_layers=(default,),
            # The encoder leaves one latent at its own size only.
            fixed_size=self.part == "generator",
            trace=found,
        )


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load a GAN, frozen, as far as the layers need it.

    Raises:
        TeacherError: Files are missing or damaged, weights and configuration do not fit together,
            its generator is asked for without an encoder, or it has no such layer.
    """
    source = _open(config)
    plan = source.plan()
    found = source.trace(plan)
    return load_network(
        plan,
        source.weights,
        noise_levels(),
        config,
        source.card(found),
        found,
        description=json.dumps(["DCGAN", asdict(source.settings), source.part]),
    ).to(device)


def describe(config: TeacherConfig) -> TeacherCard:
    """Read the configuration, or of a checkpoint the shapes of its weights.

    Raises:
        TeacherError: See :func:`load`.
    """
    source = _open(config)
    return source.card(source.trace(source.plan()))


def _open(config: TeacherConfig) -> _Source:
    part = str(take_options(config, "gan", OPTIONS)["part"])
    files = find_model(config.model, config.revision)
    if files.file is not None:
        return _checkpoint(config, files, part)
    defaults = asdict(GanSettings())
    settings = GanSettings(**read_settings(files, "DCGAN", defaults))
    if not getattr(settings, part):
        has = [name for name in PARTS if getattr(settings, name)]
        raise TeacherError(
            f"teacher '{files.model}': its config.json gives no widths of a {part}; it has "
            f"{', '.join(has) or 'no part at all'}"
        )
    if part == "generator" and not settings.encoder:
        raise TeacherError(_no_encoder(files.model))
    if part == "generator" and settings.side("encoder") != settings.side("generator"):
        raise TeacherError(
            f"teacher '{files.model}': its encoder takes images of side "
            f"{settings.side('encoder')}, its generator makes such of side "
            f"{settings.side('generator')}"
        )
    left_out = tuple(
        f"{name}." for name in PARTS if name != part and (part, name) != ("generator", "encoder")
    )

    def weights(_shapes: object) -> WeightFiles:
        return WeightFiles(
            files.model, files.weights(), lambda name: "" if name.startswith(left_out) else name
        )

    return _Source(files.model, settings, part, weights)


def _checkpoint(config: TeacherConfig, files: ModelFiles, part: str) -> _Source:
    """One network of PyTorch's DCGAN example."""
    assert files.file is not None
    shapes = WeightFiles(files.model, [files.file]).shapes
    try:
        held, settings = checkpoint_settings(shapes)
    except (ValueError, IndexError) as error:
        raise TeacherError(
            f"teacher '{files.model}' is no checkpoint of a DCGAN's discriminator ({error})"
        ) from error
    if held == "generator":
        raise TeacherError(_no_encoder(files.model))
    if part == "generator":
        raise TeacherError(
            f"teacher '{files.model}' holds a discriminator, but teacher.options.part asks for the "
            "generator"
        )
    paths = [files.file]
    return _Source(
        files.model,
        settings,
        part,
        lambda _shapes: WeightFiles(files.model, paths, lambda name: f"discriminator.{name}"),
    )


def _no_encoder(model: str) -> str:
    return (
        f"teacher '{model}': a generator alone gives no features of an image, because the image's "
        "latent is unknown; give a folder with an encoder beside it (BiGAN), or the discriminator"
    )


def _run(part: str, network: nn.Module, images: Tensor, _conditions: Tensor) -> Any:
    return network(images, part)
