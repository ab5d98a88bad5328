"""Checkpoints of OpenAI's guided diffusion, ``64x64_diffusion.pt`` and its kin, read as diffusers'.

The network is told from the weights (:mod:`repfusion_env.teachers.networks.guided_layout`). What
these do not say comes from ``teacher.options``; a file that has the name, or else the widths, of a
published one has the settings under which that was published. Its class embedding is not read.

    python -m repfusion_env.teachers.guided_diffusion CHECKPOINT --out FOLDER

writes a folder in diffusers' layout once, so that later starts read only what they need.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError, unknown_layers
from repfusion_env.teachers.files.model_files import find_model
from repfusion_env.teachers.networks.guided_layout import (
    Architecture,
    GuidedWeights,
    modules,
    unet_config,
)
from repfusion_env.teachers.reading.family import known_trace, take_options
from repfusion_env.teachers.reading.network import NetworkTeacher, Plan, load_network
from repfusion_env.teachers.reading.noise_process import NoiseProcess, edm, process_of
from repfusion_env.teachers.reading.tracing import Trace
from repfusion_env.teachers.unet2d import DEFAULT_LAYERS, unet_plan

FAMILY = "guided_diffusion"
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "edm": "edm"}
ORDERS = ("legacy", "new")

# The published releases' flags, as far as their weights do not tell them.
_DEFAULTS: dict[str, Any] = {
    "attention_order": "legacy",
    "num_head_channels": 64,
    "num_heads": 0,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "rescale_timesteps": False,
    "image_size": 0,
}
_EDM = {"noise_schedule": "edm", "attention_order": "new"}
_IMPROVED = {"num_heads": 4, "noise_schedule": "cosine", "diffusion_steps": 4000}
_BEDROOM = {"num_heads": 1, "image_size": 256}
_RELEASES: dict[str, dict[str, Any]] = {
    "64x64_diffusion": {"attention_order": "new", "noise_schedule": "cosine", "image_size": 64},
    "128x128_diffusion": {"num_heads": 4, "image_size": 128},
    "256x256_diffusion": {"image_size": 256},
    "256x256_diffusion_uncond": {"image_size": 256},
    "512x512_diffusion": {"image_size": 512},
    "lsun_bedroom": {"image_size": 256},
    "lsun_cat": {"image_size": 256},
    "lsun_horse": {"image_size": 256},
    "lsun_horse_nodropout": {"image_size": 256},
    # Nichol & Dhariwal, 2021; these were trained with the script's rescaled timesteps.
    "cifar10_uncond_50M_500K": {**_IMPROVED, "rescale_timesteps": True, "image_size": 32},
    "cifar10_uncond_vlb_50M_500K": {**_IMPROVED, "rescale_timesteps": True, "image_size": 32},
    "imagenet64_uncond_100M_1500K": {**_IMPROVED, "rescale_timesteps": True, "image_size": 64},
    "imagenet64_uncond_vlb_100M_1500K": {**_IMPROVED, "rescale_timesteps": True, "image_size": 64},
    "imagenet64_cond_270M_250K": {**_IMPROVED, "image_size": 64},
    "lsun_uncond_100M_1200K_bs128": _BEDROOM,
    "lsun_uncond_100M_2400K_bs64": _BEDROOM,
}
# The release with the same widths and resampling, for a file that has been renamed.
_LIKE = {
    (True, 192, 384, 576, 768): "64x64_diffusion",
    (True, 256, 256, 512, 768, 1024): "128x128_diffusion",
    (True, 256, 256, 512, 512, 1024, 1024): "256x256_diffusion",
    (True, 128, 256, 256, 512, 512, 1024, 1024): "512x512_diffusion",
    (False, 192, 384, 576, 768): "imagenet64_cond_270M_250K",
    (False, 128, 256, 256, 256): "cifar10_uncond_50M_500K",
    (False, 128, 256, 384, 512): "imagenet64_uncond_100M_1500K",
    (False, 128, 128, 256, 256, 512, 512): "lsun_uncond_100M_1200K_bs128",
}


@dataclass(frozen=True)
class _Checkpoint:
    """One checkpoint, read as far as its names and shapes."""

    weights: GuidedWeights
    options: dict[str, Any]
    unet: dict[str, Any]
    process: NoiseProcess
    plan: Plan
    found: Trace

    @property
    def architecture(self) -> Architecture:
        return self.weights.architecture

    def names(self) -> dict[str, str]:
        """Diffusers' path of each layer that the checkpoint's own name can ask for."""
        paths = {module.theirs: module.ours for module in modules(self.architecture)}
        return {theirs: ours for theirs, ours in paths.items() if ours in self.found.shapes}

    def heads(self, width: int) -> int:
        return _heads(self.options, width)

    def convert(self, shapes: Mapping[str, tuple[int, ...]]) -> GuidedWeights:
        self.weights.convert(shapes, self.heads, self.options["attention_order"])
        return self.weights


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load a checkpoint, frozen, as far as the layers need it.

    ``teacher.layers`` takes diffusers' paths and the checkpoint's own, such as
    ``middle_block.2.out_layers.3``.

    Raises:
        TeacherError: The file is missing, damaged or another kind of model, an option is wrong or
            needed, or it has no such layer.
    """
    checkpoint = _open(config)
    names, card = checkpoint.names(), _card(checkpoint)
    problems = unknown_layers(config.layers, card.layers_available)
    if problems:
        raise TeacherError(f"teacher '{config.model}': {problems[0]}")
    layers = [names.get(layer, layer) for layer in config.layers]
    for index, layer in enumerate(layers):
        if layer in layers[:index]:
            first = config.layers[layers.index(layer)]
            raise TeacherError(
                f"teacher.layers: '{config.layers[index]}' is the same layer as '{first}'"
            )
    return load_network(
        checkpoint.plan,
        checkpoint.convert,
        checkpoint.process,
        replace(config, layers=tuple(layers)),
        card,
        checkpoint.found,
        description=json.dumps([checkpoint.unet, checkpoint.options], sort_keys=True),
    ).to(device)


def describe(config: TeacherConfig) -> TeacherCard:
    """Read the names and shapes of a checkpoint's weights.

    Raises:
        TeacherError: See :func:`load`.
    """
    return _card(_open(config))


def _card(checkpoint: _Checkpoint) -> TeacherCard:
    found, names = checkpoint.found, checkpoint.names()
    both = replace(
        found,
        shapes={**found.shapes, **{theirs: found.shapes[ours] for theirs, ours in names.items()}},
        ends={**found.ends, **{theirs: found.ends[ours] for theirs, ours in names.items()}},
    )
    return TeacherCard(
        channels=checkpoint.architecture.in_channels,
        image_size=checkpoint.options["image_size"],
        num_timesteps=len(checkpoint.process),
        layers_available=tuple(both.shapes),
        side_divisor=2 ** (len(checkpoint.architecture.widths) - 1),
        default_layers=(DEFAULT_LAYERS[0],),
        trace=both,
    )


def _open(config: TeacherConfig) -> _Checkpoint:
    path = find_model(config.model, config.revision).file
    if path is None:
        raise TeacherError(
            f"teacher '{config.model}' is a folder; family '{FAMILY}' takes one checkpoint file "
            "such as 64x64_diffusion.pt"
        )
    weights = GuidedWeights(config.model, path)
    options = _options(config, path, weights)
    widths = {
        width
        for width, attends in zip(
            weights.architecture.widths, weights.architecture.attention, strict=True
        )
        if attends
    } | {weights.architecture.widths[-1]}
    for width in sorted(widths):
        _heads(options, width)  # refuses what does not divide
    head_width = weights.architecture.widths[-1] // _heads(options, weights.architecture.widths[-1])
    unet = unet_config(weights.architecture, options["image_size"], head_width)
    process = _process(options)
    plan = unet_plan(config.model, unet, process)
    plan = replace(plan, build=partial(_build, plan.build, options, weights.architecture.embedded))
    settings = {**unet, "embedded": weights.architecture.embedded, "heads": options["num_heads"]}
    return _Checkpoint(weights, options, unet, process, plan, known_trace(plan, settings))


def _options(config: TeacherConfig, path: Path, weights: GuidedWeights) -> dict[str, Any]:
    """The release's flags under the user's.

    Raises:
        TeacherError: One is unknown or not allowed, or the image size is not known.
    """
    like = path.stem if path.stem in _RELEASES else _LIKE.get(_likeness(weights), "")
    defaults = {**_DEFAULTS, **_RELEASES.get(like, {}), **(_EDM if weights.wide_qkv else {})}
    allowed: dict[str, Any] = dict(defaults)
    for name, values in (("attention_order", ORDERS), ("noise_schedule", tuple(SCHEDULES))):
        first = defaults[name]
        allowed[name] = (first, *(value for value in values if value != first))
    options = take_options(config, FAMILY, allowed)
    if "num_head_channels" in config.options and "num_heads" not in config.options:
        options["num_heads"] = 0
    for name in ("num_head_channels", "diffusion_steps"):
        if options[name] < 1:
            raise TeacherError(
                f"teacher.options.{name}: {options[name]} given; it must be at least 1"
            )
    if options["image_size"] < 1:
        widths = ", ".join(map(str, weights.architecture.widths))
        raise TeacherError(
            f"teacher '{config.model}': neither its name nor its widths ({widths}) are those of a "
            "published release, so give teacher.options.image_size: the side in pixels of the "
            "images that it was trained on"
        )
    return options


def _likeness(weights: GuidedWeights) -> tuple[int, ...]:
    return (weights.architecture.residual_resampling, *weights.architecture.widths)


def _heads(options: Mapping[str, Any], width: int) -> int:
    heads: int = options["num_heads"] or width // options["num_head_channels"]
    name = "num_heads" if options["num_heads"] else "num_head_channels"
    if heads < 1 or width % heads or (name != "num_heads" and width % options[name]):
        raise TeacherError(
            f"teacher.options.{name}: {options[name]} does not divide the width {width} of its "
            "attention"
        )
    return heads


def _process(options: Mapping[str, Any]) -> NoiseProcess:
    steps = options["diffusion_steps"]
    if options["noise_schedule"] == "edm":
        # As its consistency models, OpenAI's EDM is told 1000 ln(sigma) / 4.
        return edm(timesteps=steps, condition_scale=250.0)
    process = process_of(_scheduler_config(options), "guided diffusion")
    if options["rescale_timesteps"]:
        return replace(process, condition=process.condition * (1000.0 / steps))
    return process


def _scheduler_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Their schedules in diffusers' words; linear betas keep their noise whatever the steps."""
    factor = 1000 / options["diffusion_steps"]
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": options["diffusion_steps"],
        "beta_schedule": SCHEDULES[options["noise_schedule"]],
        "beta_start": 1e-4 * factor,
        "beta_end": 0.02 * factor,
        "prediction_type": "epsilon",
        "clip_sample": True,
    }


def _build(build: Any, options: Mapping[str, Any], embedded: int) -> nn.Module:
    """Diffusers' network, changed where its configuration cannot say what theirs can."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    network = build()
    for module in network.modules():
        if isinstance(module, Attention):
            # Diffusers knows one width of heads, theirs one number of heads too.
            width = module.to_q.out_features
            module.heads = _heads(options, width)
            module.scale = (width // module.heads) ** -0.5
    if network.time_proj.num_channels != embedded:
        network.time_proj = Timesteps(embedded, True, 0)
        network.time_embedding = TimestepEmbedding(embedded, 4 * embedded)
    return network


def write_folder(config: TeacherConfig, folder: Path) -> None:
    """Write a checkpoint as a folder in diffusers' layout, whole or not at all.

    Args:
        config: Names the checkpoint and its options.
        folder: Made where it is missing; must not hold a model yet.

    Raises:
        TeacherError: Diffusers' layout cannot express the network or its noise.
        FileExistsError: The folder holds a model.
    """
    from safetensors.torch import save

    from repfusion_env.atomic import atomic_file, write_text

    checkpoint = _open(config)
    architecture = checkpoint.architecture
    head_widths = {
        width // checkpoint.heads(width)
        for width, attends in zip(architecture.widths, architecture.attention, strict=True)
        if attends
    } | {checkpoint.unet["attention_head_dim"]}
    why = None
    if len(head_widths) > 1:
        why = f"its attention has {checkpoint.options['num_heads']} heads at every width"
    elif architecture.embedded != architecture.widths[0]:
        why = "its timestep embedding is wider than its first level"
    elif checkpoint.options["noise_schedule"] == "edm":
        why = "it is told a thousand times what diffusers' EDM schedulers say"
    elif checkpoint.options["rescale_timesteps"]:
        why = "its timesteps are rescaled"
    if why:
        raise TeacherError(
            f"teacher '{config.model}': a folder in diffusers' layout cannot say that {why}; "
            "give the checkpoint itself as teacher.model"
        )
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} already holds a model")
    network = checkpoint.plan.on_meta().state_dict()
    weights = checkpoint.convert({name: tuple(value.shape) for name, value in network.items()})
    tensors = {name: weights.read(name).contiguous().clone() for name in weights.shapes}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "diffusion_pytorch_model.safetensors") as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    scheduler = json.dumps(_scheduler_config(checkpoint.options), indent=2)
    write_text(folder / "scheduler_config.json", scheduler)
    write_text(folder / "config.json", json.dumps(checkpoint.unet, indent=2))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    made = argparse.ArgumentParser(
        prog="python -m repfusion_env.teachers.guided_diffusion",
        description="Write a guided-diffusion checkpoint as a folder that diffusers reads.",
    )
    made.add_argument("checkpoint", metavar="CHECKPOINT", help="such as 64x64_diffusion.pt")
    made.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="to be written")
    for name, default in _DEFAULTS.items():
        made.add_argument(
            f"--{name.replace('_', '-')}",
            type=json.loads if isinstance(default, bool) else type(default),
            help="default: that of the published release",
        )
    words = vars(made.parse_args(arguments))
    checkpoint, folder = words.pop("checkpoint"), words.pop("out")
    options = {name: value for name, value in words.items() if value is not None}
    try:
        write_folder(TeacherConfig(family=FAMILY, model=checkpoint, options=options), folder)
    except (TeacherError, OSError) as error:
        print(f"{made.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: teacher.model takes it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
