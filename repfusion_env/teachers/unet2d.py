"""Denoisers on pixels in diffusers' ``UNet2DModel``: DDPM, DDIM, score models, EDM.

The action's timestep is that of the folder's noise scheduler, whichever of diffusers' it is and
whatever the network predicts (epsilon, v or the image). A class-conditional network is read without
its class embedding, which diffusers adds to that of the timestep.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError
from repfusion_env.teachers.files.attention_names import current_names
from repfusion_env.teachers.files.model_files import ModelFiles, find_model
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.reading.family import known_trace, no_options, side_of
from repfusion_env.teachers.reading.network import NetworkTeacher, Plan, load_network
from repfusion_env.teachers.reading.noise_process import NoiseProcess, process_of

# As many as a config.json has that does not say.
DEFAULT_LEVELS = range(4)
DEFAULT_LAYERS = ("mid_block.resnets.1.conv2", "down_blocks.0.resnets.0")


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load a ``UNet2DModel`` and its scheduler, frozen, as far as the layers need it.

    Raises:
        TeacherError: Files are missing or damaged, weights and configuration do not fit together,
            it is another kind of model, or it has no such layer.
    """
    no_options(config, "unet2d")
    files = find_model(config.model, config.revision)
    return load_unet(config, files, process_of(files.scheduler(), config.model)).to(device)


def describe(config: TeacherConfig) -> TeacherCard:
    """Read the configuration files and build the network without memory for its weights.

    Raises:
        TeacherError: See :func:`load`.
    """
    no_options(config, "unet2d")
    files = find_model(config.model, config.revision)
    return describe_unet(files, process_of(files.scheduler(), config.model))


def load_unet(config: TeacherConfig, files: ModelFiles, process: NoiseProcess) -> NetworkTeacher:
    """A ``UNet2DModel`` under a given noise process.

    Args:
        config: Layers, precision, memory.
        files: Where its configuration is.
        process: Its noise process.
    """
    unet = files.config("unet")
    plan = unet_plan(files.model, unet, process)
    found = known_trace(plan, unet)
    return load_network(
        plan,
        lambda shapes: WeightFiles(files.model, files.weights("unet"), current_names(shapes)),
        process,
        config,
        describe_unet(files, process),
        found,
        description=json.dumps([unet, str(process.prediction)], sort_keys=True),
    )


def describe_unet(files: ModelFiles, process: NoiseProcess) -> TeacherCard:
    """What can be known of a ``UNet2DModel`` without its weights."""
    unet = files.config("unet")
    plan = unet_plan(files.model, unet, process)
    found = known_trace(plan, unet)
    default = next((layer for layer in DEFAULT_LAYERS if layer in found.shapes), "conv_in")
    return TeacherCard(
        channels=plan.input_shape[0],
        image_size=plan.input_shape[1],
        num_timesteps=len(process),
        layers_available=tuple(found.shapes),
        side_divisor=2 ** (len(unet.get("down_block_types", DEFAULT_LEVELS)) - 1),
        default_layers=(default,),
        trace=found,
    )


def unet_plan(model: str, unet: dict[str, Any], process: NoiseProcess) -> Plan:
    """How a ``UNet2DModel`` is built and run.

    Raises:
        TeacherError: It is of another class, or does not say the size of its images.
    """
    kind = unet.get("_class_name")
    if kind != "UNet2DModel":
        raise TeacherError(
            f"teacher '{model}' is a {kind or 'model of unknown class'}; "
            "family 'unet2d' takes a UNet2DModel"
        )
    side = side_of(model, unet)
    return Plan(
        model,
        partial(_build, unet),
        _run,
        (int(unet.get("in_channels", 3)), side, side),
        condition_dtype=process.condition.dtype,
    )


def _build(unet: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel.from_config(unet)


def _run(network: Any, images: Tensor, conditions: Tensor) -> Any:
    # Labels never reach a teacher: the forward asks for none where there is no such embedding.
    network.class_embedding = None
    return network(images, conditions, return_dict=False)
