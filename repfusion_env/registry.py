"""Every part that a configuration names, in one light table each.

An entry maps a name to ``"module:attribute"`` and is imported only when it is asked for, so that a
configuration is checked in milliseconds and nothing heavy loads before the check has passed. To add
a part, write its file and add its line here. A part of your own needs no line: name it
``"my_package.my_module:attribute"``.
"""

from __future__ import annotations

import difflib
import gc
import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

DATASETS: dict[str, str] = {
    "digits": "repfusion_env.data.digits:load",
    "digit_scenes": "repfusion_env.data.digit_scenes:load",
    "cifar10": "repfusion_env.data.cifar10:load",
    "npz": "repfusion_env.data.npz:load",
    "folder": "repfusion_env.data.folder:load",
    "tiny_imagenet": "repfusion_env.data.tiny_imagenet:load",
    "webdataset": "repfusion_env.data.shards:load",
    "celebamask": "repfusion_env.data.celebamask:load",
    "mask_folder": "repfusion_env.data.mask_folder:load",
    "voc_segmentation": "repfusion_env.data.voc_segmentation:load",
    "oxford_pet": "repfusion_env.data.oxford_pet:load",
    "wflw": "repfusion_env.data.wflw:load",
    "pts": "repfusion_env.data.pts:load",
    "coco": "repfusion_env.data.coco:load",
    "voc": "repfusion_env.data.voc:load",
}

TEACHERS: dict[str, str] = {
    "unet2d": "repfusion_env.teachers.unet2d:load",
    "unet2d_condition": "repfusion_env.teachers.unet2d_condition:load",
    "autoencoder_kl": "repfusion_env.teachers.autoencoder_kl:load",
    "guided_diffusion": "repfusion_env.teachers.guided_diffusion:load",
    "edm": "repfusion_env.teachers.edm:load",
    "dit": "repfusion_env.teachers.dit:load",
    "pixart": "repfusion_env.teachers.pixart:load",
    "sd3": "repfusion_env.teachers.sd3:load",
    "flux": "repfusion_env.teachers.flux:load",
    "timm": "repfusion_env.teachers.timm:load",
    "gan": "repfusion_env.teachers.gan:load",
    "flow": "repfusion_env.teachers.flow:load",
}

# The family of a model by the class that its config.json names, or by a checkpoint's suffix.
TEACHER_FILES: dict[str, str] = {
    "UNet2DModel": "unet2d",
    "UNet2DConditionModel": "unet2d_condition",
    "AutoencoderKL": "autoencoder_kl",
    ".pt": "guided_diffusion",
    "DiTTransformer2DModel": "dit",
    "Transformer2DModel/ada_norm_zero": "dit",
    "PixArtTransformer2DModel": "pixart",
    "Transformer2DModel/ada_norm_single": "pixart",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "timm": "timm",  # a config.json that names an architecture instead of a class
    "DCGAN": "gan",
    "Glow": "flow",
    ".pth": "gan",
}

ACTIONS: dict[str, str] = {
    "discrete": "repfusion_env.actions.discrete:DiscreteTimestep",
    "continuous": "repfusion_env.actions.continuous:NearestTimestep",
    "continuous_timestep": "repfusion_env.actions.continuous_timestep:ContinuousTimestep",
    "layer": "repfusion_env.actions.layer:Layer",
    "timestep_and_layer": "repfusion_env.actions.timestep_and_layer:TimestepAndLayer",
    "timestep_set": "repfusion_env.actions.timestep_set:TimestepSet",
}

TASKS: dict[str, str] = {
    "classification": "repfusion_env.tasks.classification:ClassificationTask",
    "segmentation": "repfusion_env.tasks.segmentation:SegmentationTask",
    "landmarks": "repfusion_env.tasks.landmarks:LandmarksTask",
    "detection": "repfusion_env.tasks.detection:DetectionTask",
}

LOSSES: dict[str, str] = {
    "hint": "repfusion_env.losses.hint:hint",
    "l1": "repfusion_env.losses.l1:l1",
    "normalized_l2": "repfusion_env.losses.normalized_l2:normalized_l2",
    "cosine": "repfusion_env.losses.cosine:cosine",
    "attention": "repfusion_env.losses.attention:attention_transfer",
    "rkd_distance": "repfusion_env.losses.rkd_distance:rkd_distance",
    "rkd_angle": "repfusion_env.losses.rkd_angle:rkd_angle",
    "similarity_preserving": "repfusion_env.losses.similarity_preserving:similarity_preserving",
    "pkt": "repfusion_env.losses.pkt:pkt",
    "correlation_congruence": "repfusion_env.losses.correlation_congruence:correlation_congruence",
    "dist": "repfusion_env.losses.dist:dist",
    "vid": "repfusion_env.losses.vid:VariationalInformation",
    "factor_transfer": "repfusion_env.losses.factor_transfer:FactorTransfer",
    "infonce": "repfusion_env.losses.infonce:InfoNCE",
    "crd": "repfusion_env.losses.crd:ContrastiveRepresentation",
}

PROJECTIONS: dict[str, str] = {
    "linear": "students.projection:LinearProjections",
    "stages": "students.stage_projection:StageProjections",
    "pyramid": "students.pyramid:FeaturePyramid",
}

REWARDS: dict[str, str] = {
    "student_lookahead": "repfusion_env.rewards:student_lookahead",
    "student": "repfusion_env.rewards:student",
    "student_gain": "repfusion_env.rewards:student_gain",
    "teacher_probe": "repfusion_env.rewards:teacher_probe",
}

OBSERVATIONS: dict[str, str] = {
    "teacher": "repfusion_env.observations:teacher_embedding",
    "student": "repfusion_env.observations:student_embedding",
    "pixels": "repfusion_env.observations:pixels",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest of ``known``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def complaint(kind: str, name: str, table: Mapping[str, str]) -> str | None:
    """The sentence that refuses ``name``, or None where it can be looked up."""
    if name in table or ":" in name:
        return None
    allowed = ", ".join(table)
    return (
        f"unknown {kind} '{name}'.{did_you_mean(name, table)} "
        f"Allowed: {allowed}, or your own as 'module:attribute'"
    )


class WrongPartError(TypeError, ValueError):
    """A part of the user's own that is not what it must be: a type, but said as other input is."""


@contextmanager
def _without_collector() -> Iterator[None]:
    """Import without garbage collection: what diffusers makes all stays, and looking through it
    again and again takes a fifth of the time from ``gym.make`` to the first step.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def look_up(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """Import the part called ``name``.

    Args:
        kind: What the part is, for the message ("data set", "reward", ...).
        name: A key of ``table``, or ``"module:attribute"``.
        table: One of this module's tables.

    Raises:
        ValueError: The name is unknown, or the module or attribute does not exist.
    """
    sentence = complaint(kind, name, table)
    if sentence:
        raise ValueError(sentence)
    module_name, _, attribute = table.get(name, name).partition(":")
    try:
        with _without_collector():
            module = importlib.import_module(module_name) if module_name else None
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"{kind} '{name}': there is no module '{error.name}'") from error
        raise
    if module is None or not attribute:
        raise ValueError(f"{kind} '{name}': your own part is named 'module:attribute'")
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(
            f"{kind} '{name}': module '{module_name}' has no attribute '{attribute}'"
        ) from error
