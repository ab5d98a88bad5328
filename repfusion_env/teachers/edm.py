"""Denoisers on pixels in diffusers' ``UNet2DModel`` with the preconditioning of EDM.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022. The
action's timestep counts the noise levels of its eq. 5, from ``sigma_min`` (0) to ``sigma_max``
(``timesteps - 1``). A folder's EDM scheduler says which; ``teacher.options`` does where there is
none, or where another grid of levels is wanted of the same network.
"""

from __future__ import annotations

from typing import Any

import torch

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError
from repfusion_env.teachers.files.model_files import ModelFiles, find_model
from repfusion_env.teachers.reading.family import take_options
from repfusion_env.teachers.reading.network import NetworkTeacher
from repfusion_env.teachers.reading.noise_process import NoiseProcess, edm, process_of
from repfusion_env.teachers.unet2d import describe_unet, load_unet

FAMILY = "edm"
# Table 1 of the paper.
DEFAULTS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0, "timesteps": 1000}


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load a ``UNet2DModel`` under EDM's noise, frozen, as far as the layers need it.

    Raises:
        TeacherError: As family ``unet2d``; its scheduler is none of EDM's; an option is wrong.
    """
    files = find_model(config.model, config.revision)
    return load_unet(config, files, _process(config, files)).to(device)


def describe(config: TeacherConfig) -> TeacherCard:
    """Read the configuration files and build the network without memory for its weights.

    Raises:
        TeacherError: See :func:`load`.
    """
    files = find_model(config.model, config.revision)
    return describe_unet(files, _process(config, files))


def _process(config: TeacherConfig, files: ModelFiles) -> NoiseProcess:
    settings: dict[str, Any] = dict(DEFAULTS)
    schedules, prediction = ["karras", "exponential"], "edm"
    if any(
        (files.folder / place / "scheduler_config.json").is_file() for place in ("", "scheduler")
    ):
        scheduler = files.scheduler()
        name = scheduler.get("_class_name")
        if not str(name).startswith("EDM"):
            raise TeacherError(
                f"teacher '{config.model}': its scheduler is a {name}; family '{FAMILY}' takes an "
                "EDMEulerScheduler, an EDMDPMSolverMultistepScheduler or none"
            )
        prediction = process_of(scheduler, config.model).prediction  # refuses what makes no sense
        settings = {
            key: type(value)(
                scheduler.get("num_train_timesteps" if key == "timesteps" else key, value)
            )
            for key, value in settings.items()
        }
        if scheduler.get("sigma_schedule") == "exponential":
            schedules.reverse()
    options = take_options(config, FAMILY, {**settings, "sigma_schedule": tuple(schedules)})
    for name in DEFAULTS:
        if not options[name] > 0:
            raise TeacherError(f"teacher.options.{name}: {options[name]} given; it must be above 0")
    if options["sigma_min"] >= options["sigma_max"]:
        raise TeacherError(
            f"teacher.options.sigma_min: {options['sigma_min']} given; it must be below sigma_max, "
            f"which is {options['sigma_max']}"
        )
    schedule = options.pop("sigma_schedule")
    return edm(**options, schedule=schedule, prediction=prediction)
